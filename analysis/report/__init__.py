"""The report of results: a page that needs nothing else, figures, tables and findings.

command   ``python -m analysis report``
content   what a report says: findings, warnings, tables, what is missing, provenance
sections  scaling laws, best precisions, the best cells for their bits
parts     what a report is made of
cells     the measured cells as columns
encoding  columns as few bytes
page      one HTML file of it all; page/ has its style and script
places    where the files lie
writing   page, figures and tables on disk
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from analysis.report.content import Report, build_report
    from analysis.report.parts import Section, TablePart
    from analysis.report.places import Places
    from analysis.report.writing import report_of, write_report, write_tables

__all__ = [
    "Places",
    "Report",
    "Section",
    "TablePart",
    "build_report",
    "report_of",
    "write_report",
    "write_tables",
]

_HOME = {
    **dict.fromkeys(("Report", "build_report"), "content"),
    **dict.fromkeys(("Section", "TablePart"), "parts"),
    "Places": "places",
    **dict.fromkeys(("report_of", "write_report", "write_tables"), "writing"),
}


def __getattr__(name: str) -> object:
    """Import a name when it is asked for: where a report lies is known without pandas."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"analysis.report.{_HOME[name]}"), name)
