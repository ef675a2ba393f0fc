"""The paper's figures and tables of what is stored, for a publication: the same files from a report and a command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import pandas as pd

from analysis.figures.paper import PAPER
from analysis.figures.registry import save_figures
from analysis.figures.results import Results
from analysis.inputs import Inputs
from analysis.outliers import KIND, outliers_of
from analysis.tables.paper import write_paper_tables

WIDTHS: Final = {1: "one_column", 2: "two_columns"}
"""Directories of figures by the columns of a page that they are as wide as, where both widths are written."""


def write_paper(
    inputs: Inputs,
    directory: Path,
    *,
    results: Results,
    columns: Sequence[int] = tuple(WIDTHS),
    names: Sequence[str] | None = None,
    formats: Sequence[str] = ("pdf", "svg", "png"),
) -> list[Path]:
    """Write the paper's figures that the data allow, as wide as columns of a page, and its tables.

    Args:
        inputs: what is stored.
        directory: made if missing. Of several widths each has a directory of its own in it (``WIDTHS``).
        results: of the same table: the metrics that figures are drawn of, what they hold fixed, and per-sample outcomes
            for paired intervals. Its own width is passed over.
        columns: of a page, 1 or 2.
        names: of ``FIGURES``, those alone; None for the paper's, and its tables as CSV, Markdown and LaTeX.
        formats: of figures, among 'png' (300 dots an inch), 'svg' and 'pdf'.

    Returns:
        The figures' files of the first format, and the tables.

    Raises:
        SpecError: another format.
    """
    made: list[Path] = []
    for width in columns if results.metrics else ():
        at = directory / WIDTHS[width] if len(columns) > 1 else directory
        drawn = list(PAPER) if names is None else names
        made += save_figures(replace(results, columns=width), at, names=drawn, formats=formats)
    if names is not None:
        return made
    has_outliers = bool(inputs.long.get("eval_kind", pd.Series(dtype="string")).eq(KIND).any())
    correlations = outliers_of(inputs).correlations if has_outliers else None
    return [*made, *write_paper_tables(inputs.df, directory, correlations=correlations)]
