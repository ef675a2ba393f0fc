"""Tables of results.

by_bits  a metric by model, bits and data type
others   the cells without a place there, a line each
files    results as CSV, parquet, Markdown or LaTeX
text     values with their errors; Markdown; the terminal
"""

from analysis.tables.by_bits import bits_by_dtype, render, to_markdown
from analysis.tables.files import TABLE_SUFFIXES, write_table
from analysis.tables.others import other_cells, others_markdown, others_text, render_others

__all__ = [
    "TABLE_SUFFIXES",
    "bits_by_dtype",
    "other_cells",
    "others_markdown",
    "others_text",
    "render",
    "render_others",
    "to_markdown",
    "write_table",
]
