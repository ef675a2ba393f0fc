"""The report of results: figures, tables and findings in one directory.

command  ``python -m analysis report``
writing  files of a report
"""
