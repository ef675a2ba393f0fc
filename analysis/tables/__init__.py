"""Tables of results.

pivoting a pivot over any axes and metrics; ``select`` (choosing) chooses rows for it
showing  a pivot as text: terminal, Markdown, LaTeX, HTML, CSV, parquet
plotting a pivot as lines
by_bits  a metric by model, bits and data type
others   the cells without a place there, a line each
files    results as CSV, parquet, Markdown, LaTeX or HTML
paper    the paper's Tables 1 and 2 by their numbers
text     values with their errors; Markdown; the terminal
"""

from analysis.tables.by_bits import bits_by_dtype, block_sizes_held, render, to_markdown
from analysis.tables.choosing import select
from analysis.tables.files import TABLE_SUFFIXES, write_table
from analysis.tables.observations import shown_metrics
from analysis.tables.others import other_cells, others_markdown, others_text, render_others
from analysis.tables.pivoting import pivot
from analysis.tables.plotting import plot
from analysis.tables.showing import pivot_markdown, show, write_pivot

__all__ = [
    "TABLE_SUFFIXES",
    "bits_by_dtype",
    "block_sizes_held",
    "other_cells",
    "others_markdown",
    "others_text",
    "pivot",
    "pivot_markdown",
    "plot",
    "render",
    "render_others",
    "select",
    "show",
    "shown_metrics",
    "to_markdown",
    "write_pivot",
    "write_table",
]
