"""Figures of a result table (matplotlib): one function each, and ``FIGURES``, the files that a study gets.

registry     the figures' names, and writing them
scaling      a metric against total model bits, by precision
comparisons  data types, block sizes and methods at one precision
one_shot     one-shot methods beside zero-shot types
drawing      what a figure is made of: curves, bars, caps, notes
style        colours, markers, names and axes
saving       files
"""

from analysis.figures.comparisons import block_sizes, data_types, methods
from analysis.figures.one_shot import one_shot_scaling
from analysis.figures.registry import FIGURES, Results, write_figures
from analysis.figures.scaling import bit_scaling

__all__ = [
    "FIGURES",
    "Results",
    "bit_scaling",
    "block_sizes",
    "data_types",
    "methods",
    "one_shot_scaling",
    "write_figures",
]
