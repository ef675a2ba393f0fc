"""The figures: those that a study draws of its own questions, and those under the paper's numbers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pandas as pd

from analysis.cells import block_name
from analysis.figures.comparisons import block_sizes_chart, data_types_chart, methods_chart
from analysis.figures.correlation import scatter
from analysis.figures.entries import Entry
from analysis.figures.latency import speeds
from analysis.figures.laws import scaling_laws
from analysis.figures.one_shot import one_shot_chart
from analysis.figures.over_bits import block_sizes_by_bits, data_types_by_bits, formats
from analysis.figures.paper import PAPER, SCALING
from analysis.figures.questions import OPTIONS, exponents_chart, option_chart, outliers_chart
from analysis.figures.results import HELD, NotAskedError, Results, SamplesByCell, held
from analysis.figures.saving import save
from analysis.figures.scaling import bit_scaling_chart
from analysis.metrics import ZERO_SHOT_MEAN, Metric, metric_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis.figures.chart import Chart

log = logging.getLogger(__name__)

_BITS: Final = range(2, 9)
PAPER_LOSS: Final = "pile_cc_loss"
"""The loss of the paper's perplexity figures, on The Pile's Common Crawl."""


def write_figures(
    df: pd.DataFrame,
    directory: str | os.PathLike[str],
    *,
    sweep: str | None = None,
    samples: SamplesByCell | None = None,
    formats: Sequence[str] = ("png", "svg"),
    columns: int | None = None,
) -> list[Path]:
    """Write each figure of a study's own questions that the data allow; log why another can't be drawn.

    Args:
        df: a wide result table.
        directory: made if missing.
        sweep: the study's name, for the notes under the figures.
        samples: per-sample outcomes (``findings.wanted_samples``), for paired intervals of changes from 16-bit.
        formats: among 'png', 'svg' and 'pdf'; a file each.
        columns: of a page that figures are as wide as, 1 or 2; None for the screen, with title and notes.

    Returns:
        The first format's files, in the order of ``FIGURES``.
    """
    results = Results.of(df, sweep=sweep, samples=samples, columns=columns)
    return save_figures(results, directory, formats=formats)


def save_figures(
    results: Results,
    directory: str | os.PathLike[str],
    *,
    names: Sequence[str] | None = None,
    metrics: Sequence[Metric] | None = None,
    formats: Sequence[str] = ("png", "svg"),
) -> list[Path]:
    """Write figures by name; log why one can't be drawn.

    Args:
        results: the data, and what figures hold fixed.
        directory: made if missing.
        names: of ``FIGURES``; None for those of a study's own questions.
        metrics: that each of them is drawn of, where it can be; None for the headline metrics.
        formats: among 'png', 'svg' and 'pdf'; a file each.

    Returns:
        The first format's files.

    Raises:
        KeyError: no figure has such a name.
        SpecError: another format.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    drawn = drawn_figures(results, names=names, metrics=metrics)
    return [save(fig, directory / stem, formats=formats, columns=results.columns) for stem, fig in drawn]


def drawn_figures(
    results: Results, *, names: Sequence[str] | None = None, metrics: Sequence[Metric] | None = None
) -> Iterator[tuple[str, Figure]]:
    """Draw figures by name, one after the other, with the names of their files: ``file_stem``."""
    if not results.metrics and metrics is None:
        log.warning("no figures: the table has no metric with a value and a known direction")
        return
    for name in [n for n, e in FIGURES.items() if e.own] if names is None else names:
        entry = FIGURES[name]
        for each in _versions(entry, results, metrics):
            fig = entry.draw(each)
            if fig is not None:
                yield file_stem(name, entry, each), fig


def file_stem(name: str, entry: Entry, results: Results) -> str:
    """Return the name of a figure's file: the figure's, and behind it what differs from the paper or the study.

    'fig09_data_types' is of the zero-shot mean at 4 bits; 'fig09_data_types-piqa_acc-3bit' of one task at 3 bits.
    """
    if entry.paper is None:
        return name
    results = results.obeying(entry.obeys)
    papers = {"loss": PAPER_LOSS, "latency": results.metric.column}.get(entry.metrics, ZERO_SHOT_MEAN)
    parts = [
        name,
        *([results.metric.column] if results.metric.column != papers else []),
        *([f"{results.bits}bit"] if results.bits is not None else []),
        *([f"b{block_name(results.blocksize).split()[0]}"] if results.blocksize is not None else []),
        *([results.dtype] if results.dtype is not None else []),
    ]
    return "-".join(parts)


def figure_metrics(df: pd.DataFrame) -> list[Metric]:
    """Return all metrics that figures are drawn of: each text set's loss, the zero-shot mean, each task's accuracy."""
    found = [m for m in metric_columns(df) if m.metric in ("loss", "acc") and df[m.column].notna().any()]
    return sorted(found, key=lambda m: (m.metric != "loss", m.column != ZERO_SHOT_MEAN))


def _versions(entry: Entry, results: Results, metrics: Sequence[Metric] | None) -> list[Results]:
    """Return the results once for each metric that a figure is drawn of."""
    if entry.metrics == "latency" or (entry.paper is None and metrics is None):
        return [results]
    chosen = results.metrics if metrics is None else list(metrics)
    allowed = [m for m in chosen if entry.takes(m)]
    if not allowed:
        log.info("no %s: none of its metrics is measured (%s)", entry.title, entry.needs)
    return [results.with_metric(m) for m in allowed]


def _zero_shot_scaling(results: Results) -> Chart:
    """``bit_scaling`` of the zero-shot mean, where the table has it besides a loss."""
    mean = [m for m in results.metrics[1:] if m.column == ZERO_SHOT_MEAN]
    if not mean:
        raise NotAskedError("no figure of zero-shot scaling: the table has no zero-shot mean besides a loss")
    return bit_scaling_chart(results.with_metric(mean[0]))


def _at_bits(results: Results, *, axis: str, bits: int) -> Chart:
    """Return the comparison over an axis at these bits, where those are 4, most compared at, or asked for."""
    every = axis == "method"
    chosen = results.bits
    if chosen is None:
        cells = held(results.plain(every_method=every), ["bits"], over=axis)
        several = len(cells) and cells.groupby(["family", "model"])[axis].nunique().max() > 1
        chosen = int(cells["bits"].iloc[0]) if several else 4
        at_four = results.plain(every_method=every)
        at_four = at_four[at_four["bits"] == 4]
        if len(at_four) and at_four.groupby(["family", "model"])[axis].nunique().max() > 1:
            chosen = 4
    if chosen != bits:
        raise NotAskedError(f"no figure of {axis} at {bits} bits: the study compares more at {chosen}")
    chart = {"dtype": data_types_chart, "blocksize": block_sizes_chart, "method": methods_chart}[axis]
    return chart(replace(results, bits=bits))


_OVER: Final = {"dtype": "data_types", "blocksize": "block_sizes", "method": "methods"}

FIGURES: Final[dict[str, Entry]] = {
    "bit_scaling": Entry(title="Bit-level scaling", chart=bit_scaling_chart, obeys=SCALING, own=True),
    "bit_scaling_zero_shot": Entry(
        title="Bit-level scaling, zero-shot", chart=_zero_shot_scaling, obeys=SCALING, own=True
    ),
    **{
        f"{name}_{bits}bit": Entry(
            title=f"{name.replace('_', ' ').capitalize()} at {bits} bits",
            chart=partial(_at_bits, axis=axis, bits=bits),
            obeys=tuple(n for n in HELD if n != axis),
            own=True,
        )
        for axis, name in _OVER.items()
        for bits in _BITS
    },
    "data_types_by_bits": Entry(
        title="Data types at each precision", chart=data_types_by_bits, obeys=("blocksize",), own=True
    ),
    "block_sizes_by_bits": Entry(
        title="Block sizes at each precision", chart=block_sizes_by_bits, obeys=("dtype",), own=True
    ),
    "formats": Entry(title="Every format by bits per parameter", chart=formats, own=True),
    "one_shot": Entry(title="One-shot methods", chart=one_shot_chart, own=True),
    "outlier_dimensions": Entry(title="Outlier dimensions in 16 bits", chart=outliers_chart, obeys=HELD, own=True),
    "exponent_bits": Entry(
        title="Exponent bits of floats", chart=exponents_chart, obeys=("bits", "blocksize"), own=True
    ),
    **{
        name: Entry(title=f"{words}: on against off", chart=partial(option_chart, axis=axis), own=True)
        for axis, (name, words) in OPTIONS.items()
    },
    "perplexity_and_accuracy": Entry(title="Perplexity against zero-shot accuracy", chart=scatter, own=True),
    "latency": Entry(title="Decoding speed by bits", chart=speeds, obeys=("dtype",), own=True),
    "scaling_laws": Entry(
        title="Parallel curves and effective parameters",
        chart=scaling_laws,
        obeys=SCALING,
        needs="two precisions of one data type and block size, with two models each",
    ),
    **PAPER,
}
"""All figures by name. A file of a figure is named after it (``file_stem``)."""
