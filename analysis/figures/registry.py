"""The figures of a study: each name of a file with the function that draws it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pandas as pd

from analysis.figures.comparisons import block_sizes, data_types, methods
from analysis.figures.drawing import SamplesByCell
from analysis.figures.one_shot import one_shot_scaling
from analysis.figures.saving import save
from analysis.figures.scaling import bit_scaling
from analysis.metrics import Metric, ranked_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Results:
    """The data that figures are drawn from.

    Attributes:
        df: a wide result table.
        metrics: those with a value and a known direction, the first headline metric first; at least one.
        sweep: the study's name, for the notes under the figures.
        samples: per-sample outcomes, for paired intervals of changes from 16-bit.
    """

    df: pd.DataFrame
    metrics: list[Metric]
    sweep: str | None
    samples: SamplesByCell | None


def write_figures(
    df: pd.DataFrame,
    directory: str | os.PathLike[str],
    *,
    sweep: str | None = None,
    samples: SamplesByCell | None = None,
) -> list[Path]:
    """Write each of ``FIGURES`` that the data allow, as PNG with an SVG next to it; log why another can't be drawn.

    Args:
        df: a wide result table.
        directory: made if missing.
        sweep: the study's name, for the notes under the figures.
        samples: per-sample outcomes (``findings.wanted_samples``), for paired intervals of changes from 16-bit.

    Returns:
        The PNGs, in the order of ``FIGURES``.
    """
    metrics = ranked_metrics(df)
    if not metrics:
        log.warning("no figures: the table has no metric with a value and a known direction")
        return []
    results = Results(df=df, metrics=metrics, sweep=sweep, samples=samples)
    drawn = {name: draw(results) for name, draw in FIGURES.items()}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    return [save(fig, directory / name) for name, fig in drawn.items() if fig is not None]


def _zero_shot_scaling(r: Results) -> Figure | None:
    """Draw ``bit_scaling`` of the zero-shot mean, where the table has it besides a loss."""
    return bit_scaling(r.df, r.metrics[1], sweep=r.sweep) if len(r.metrics) > 1 else None


FIGURES: Final[dict[str, Callable[[Results], Figure | None]]] = {
    "bit_scaling": lambda r: bit_scaling(r.df, r.metrics[0], sweep=r.sweep),
    "bit_scaling_zero_shot": _zero_shot_scaling,
    "data_types_4bit": lambda r: data_types(r.df, r.metrics[0], sweep=r.sweep, samples=r.samples),
    "block_sizes_4bit": lambda r: block_sizes(r.df, r.metrics[0], sweep=r.sweep, samples=r.samples),
    "methods_4bit": lambda r: methods(r.df, r.metrics[0], sweep=r.sweep, samples=r.samples),
    "one_shot": lambda r: one_shot_scaling(r.df, r.metrics[0], sweep=r.sweep),
}
"""The figures of a study: name of the file to what draws it, or returns None where the data don't allow it."""
