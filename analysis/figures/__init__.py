"""Figures of a result table (matplotlib): a function each, and ``FIGURES``, the names under which they are written.

registry     the figures' names, and writing them
entries      what the registry says of a figure
paper        the paper's figures by its numbers
missing      which of the paper's figures the data don't allow, and what would measure them
results      the data, what a figure holds fixed, why it can't be drawn
scaling      a metric against total model bits, by precision
comparisons  data types, block sizes and methods at one precision
one_shot     one-shot methods beside zero-shot types
questions    outlier dimensions, exponent bits, options on against off
over_bits    costs against bits per parameter, of every format
correlation  perplexity against accuracy
outliers     correlations of weights and activations; outlier features (python -m analysis outliers)
latency      decoding speed by bits
chart        curves in panels, with changes from a baseline below
drawing      what a panel is made of: curves, bars, compressed axes, notes
sheet        where panels, legend, title and notes stand, by width
chance       what guessing gives on a task
style        colours, markers, names and axes
showing      from a chart to a figure, or to the reason why there is none
saving       files
"""

from analysis.figures.comparisons import block_sizes, data_types, methods
from analysis.figures.entries import Entry
from analysis.figures.missing import Missing, missing_figures
from analysis.figures.one_shot import one_shot_scaling
from analysis.figures.registry import FIGURES, figure_metrics, save_figures, write_figures
from analysis.figures.results import NoFigureError, Results
from analysis.figures.scaling import bit_scaling

__all__ = [
    "FIGURES",
    "Entry",
    "Missing",
    "NoFigureError",
    "Results",
    "bit_scaling",
    "block_sizes",
    "data_types",
    "figure_metrics",
    "methods",
    "missing_figures",
    "one_shot_scaling",
    "save_figures",
    "write_figures",
]
