"""The study's figures: bit-level scaling by precision, data types and block sizes at 4 bits (Figures 2, 3, 13-15)."""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from analysis import style
from analysis.cells import (
    WHOLE_TENSOR,
    baselines,
    block_name,
    fullest_dtype,
    measured,
    numbers,
    one_exponent,
    ordered_dtypes,
    plain,
    points,
    with_baseline,
)
from analysis.drawing import Drawing, Look, canvas, cap_line, change_edge, legend, loss_cap
from analysis.metrics import Metric, ranked_metrics
from analysis.one_shot import one_shot_scaling
from analysis.replicates import pool, replicate_groups
from analysis.scaling import scaling_points
from analysis.significance import Samples
from kbit.specs.base import BASELINE_BITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

SamplesByCell = Mapping[tuple[str, str], Samples]
"""Per-sample outcomes by (cell key, eval)."""
Styles = Mapping[Hashable, tuple[str, Look]]
"""Value of an axis -> (label, look), in the legend's order."""

_X_LABEL: Final = "Total model bits"
_COLUMNS: Final = 3
_MOST_PANELS: Final = 4
_AXES: Final = {"dtype": "Data type", "blocksize": "Block size", "method": "Method"}


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
    return [_save(fig, directory / name) for name, fig in drawn.items() if fig is not None]


@style.styled
def bit_scaling(
    df: pd.DataFrame, metric: Metric, *, dtype: str | None = None, sweep: str | None = None
) -> Figure | None:
    """Draw a metric against total model bits by precision at block size 64, one panel per family (Figures 2 and 13).

    None, with the reason logged, where there are no quantized cells. ``dtype`` None takes the one most cells have.
    """
    curves, dtype = scaling_points(df, metric, dtype=dtype)
    if dtype is None or (curves["bits"] == BASELINE_BITS).all():
        log.warning(
            "no figure of scaling: no plain %s cell at block size 64 has %s", dtype or "block-wise", metric.column
        )
        return None
    families = list(dict.fromkeys(curves["family"]))
    drawing = Drawing(metric=metric, cap=loss_cap(curves, metric), samples={})
    columns = min(len(families), _COLUMNS)
    rows = -(-len(families) // columns)
    size = (6.4, 3.8) if len(families) == 1 else (3.0 * columns + 0.9, 2.7 * rows + 0.2)
    fig, axes = canvas(rows, columns, size)
    for i, ax in enumerate(axes.flat):
        if i >= len(families):
            ax.remove()
            continue
        own = curves[curves["family"] == families[i]]
        for bits, look in style.BITS_STYLE.items():
            if (own["bits"] == bits).any():
                drawing.line(ax, own[own["bits"] == bits], look, f"{bits}-bit")
        style.bits_axis(ax, own["total_bits"].tolist())
        ax.set_title(style.family_name(families[i]))
        # The last panel of each column, whichever row it is in.
        ax.set_xlabel(_X_LABEL if i + columns >= len(families) else "")
        ax.set_ylabel(metric.label if i % columns == 0 else "")
    cap_line(axes, drawing)
    legend(fig, axes, [f"{b}-bit" for b in sorted(style.BITS_STYLE, reverse=True)], "Precision")
    title = f"{metric.name} against total model bits, by precision ({dtype}, block size 64)"
    style.finish(fig, title, drawing.notes(curves, sweep))
    return fig


@style.styled
def data_types(
    df: pd.DataFrame,
    metric: Metric,
    *,
    bits: int = 4,
    sweep: str | None = None,
    samples: SamplesByCell | None = None,
) -> Figure | None:
    """Draw data types at one precision over model sizes, and their change from 16-bit, per family (Figures 3, 14).

    None, with the reason logged, where there are fewer than two data types at block size 64.
    """
    rows = measured(df)
    cells = plain(rows)
    cells = points(cells[(cells["blocksize"] == 64) & (cells["bits"] == bits)], metric)
    cells = one_exponent(cells, ["family", "dtype", "bits"])
    dtypes = ordered_dtypes(cells)
    if len(dtypes) < 2:
        found = " and ".join(dtypes) or "no data type"
        log.warning("no figure of data types: at %d bits and block size 64, %s has %s", bits, found, metric.column)
        return None
    panels = {style.family_name(str(f)): own for f, own in cells.groupby("family")}
    styles: Styles = {d: (d, style.dtype_style(d)) for d in dtypes}
    drawing = Drawing(metric=metric, cap=None, samples=samples or {})
    fig = _comparison(drawing, points(baselines(rows), metric), panels, "dtype", styles)
    title = f"Data types at {bits} bits: {metric.phrase} (block size 64)"
    style.finish(fig, title, drawing.notes(cells, sweep))
    return fig


@style.styled
def block_sizes(
    df: pd.DataFrame,
    metric: Metric,
    *,
    bits: int = 4,
    sweep: str | None = None,
    samples: SamplesByCell | None = None,
) -> Figure | None:
    """Draw block sizes at one precision over model sizes, and their change from 16-bit (Figures 3 and 15).

    A column a family and data type; with more than four, those of the data type with the most block sizes. None, with
    the reason logged, where no data type has two block sizes.
    """
    rows = measured(df)
    cells = plain(rows)
    cells = one_exponent(points(cells[cells["bits"] == bits], metric), ["family", "dtype", "bits"], axis="blocksize")
    cells = cells[cells.groupby(["family", "dtype"])["blocksize"].transform("nunique") > 1]
    if cells.empty:
        log.warning("no figure of block sizes: no data type at %d bits has %s at two of them", bits, metric.column)
        return None
    if len(cells.drop_duplicates(["family", "dtype"])) > _MOST_PANELS:
        cells = cells[cells["dtype"] == fullest_dtype(cells, "blocksize")]
    sizes = sorted(cells["blocksize"].unique(), key=lambda b: b if b != WHOLE_TENSOR else np.inf)
    looks = style.ordinal_styles(len(sizes))
    styles: Styles = {b: (block_name(b), look) for b, look in zip(sizes, looks, strict=True)}
    groups = [(f, d) for f in dict.fromkeys(cells["family"]) for d in ordered_dtypes(cells[cells["family"] == f])]
    panels = {f"{style.family_name(f)}, {d}": cells[(cells["family"] == f) & (cells["dtype"] == d)] for f, d in groups}
    drawing = Drawing(metric=metric, cap=None, samples=samples or {})
    fig = _comparison(drawing, points(baselines(rows), metric), panels, "blocksize", styles)
    style.finish(fig, f"Block sizes at {bits} bits: {metric.phrase}", drawing.notes(cells, sweep))
    return fig


@style.styled
def methods(
    df: pd.DataFrame,
    metric: Metric,
    *,
    bits: int = 4,
    sweep: str | None = None,
    samples: SamplesByCell | None = None,
) -> Figure | None:
    """Draw methods at one precision over model sizes, and their change from 16-bit, per family.

    All with block size 64 and one data type: the one with the most methods. Methods without such a cell (formats with
    scales of their own have no data type) are named below it. Replicates, which differ in the seed of their calibration
    data, are one point with their spread. None, with the reason logged, for fewer than two methods.
    """
    rows = measured(df)
    cells = plain(rows, every_method=True)
    cells = points(cells[(cells["blocksize"] == 64) & (cells["bits"] == bits)], metric)
    cells = cells[cells["dtype"] == fullest_dtype(cells, "method")]
    others = sorted({*points(rows[numbers(rows, "bits") == bits], metric)["method"]} - {*cells["method"]})
    apart = f"Not drawn, without such a cell: {', '.join(others)}." if others else ""
    cells = one_exponent(cells, ["family", "dtype", "bits"], axis="method")
    found = list(dict.fromkeys(sorted(cells["method"], key=lambda m: (m != "blockwise", m))))
    if len(found) < 2:
        named = " and ".join(found) or "no method"
        text = "no figure of methods: at %d bits and block size 64, %s has %s"
        log.warning(text + (f". {apart}" if apart else ""), bits, named, metric.column)
        return None
    cells = pool(cells, replicate_groups(rows).set_axis(rows["key"]))
    panels = {style.family_name(str(f)): own for f, own in cells.groupby("family")}
    styles: Styles = {m: (m, look) for m, look in zip(found, style.ordinal_styles(len(found)), strict=True)}
    drawing = Drawing(metric=metric, cap=None, samples=samples or {})
    fig = _comparison(drawing, points(baselines(rows), metric), panels, "method", styles)
    title = f"Methods at {bits} bits: {metric.phrase} ({cells['dtype'].iloc[0]}, block size 64)"
    style.finish(fig, title, " ".join(filter(None, (apart, drawing.notes(cells, sweep)))))
    return fig


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


def _comparison(
    drawing: Drawing, base: pd.DataFrame, panels: Mapping[str, pd.DataFrame], axis: str, styles: Styles
) -> Figure:
    """Draw the metric over total bits, one line per value of ``axis``; below, the change from 16-bit if known."""
    panels = {name: with_baseline(own, base) for name, own in panels.items()}
    everything = pd.concat(panels.values())
    deltas = bool(everything["baseline"].notna().any())
    drawing.cap = loss_cap(pd.concat([c for c in (base, everything) if len(c)]), drawing.metric)
    if deltas:
        drawing.edge = change_edge(everything, drawing)
    width = {1: 4.3, 2: 2.9, 3: 2.5}.get(len(panels), 2.1) * len(panels) + 1.5
    height = (4.8 if deltas else 2.8) + (0.4 if len(panels) == 1 else 0)
    fig, axes = canvas(2 if deltas else 1, len(panels), (width, height))
    for column, (name, own) in enumerate(panels.items()):
        single = own["model"].nunique() == 1
        # Cells of a single model have (nearly) the same size: they stand side by side instead.
        shown = own.assign(total_bits=own[axis].map(list(styles).index)) if single else own
        for value, (label, look) in styles.items():
            line = shown[shown[axis] == value]
            if len(line):
                drawing.line(axes[0, column], line, look, label)
            if deltas and line["baseline"].notna().any():
                drawing.change_line(axes[1, column], line[line["baseline"].notna()], look)
        axes[0, column].set_title(name)
        for ax in axes[:, column]:
            if single:
                ax.set_xticks(range(len(styles)), [label for label, _ in styles.values()])
                ax.set_xlim(-0.6, len(styles) - 0.4)
            else:
                style.bits_axis(ax, own["total_bits"].tolist())
            ax.tick_params(labelbottom=ax is axes[-1, column])
        axes[-1, column].set_xlabel(f"{_AXES[axis]} ({own['model'].iloc[0]})" if single else _X_LABEL)
    axes[0, 0].set_ylabel(drawing.metric.label)
    if deltas:
        unit = drawing.metric.unit
        axes[1, 0].set_ylabel("Change from 16-bit" + (f"\n({unit})" if unit else ""))
        for ax in axes[1]:
            ax.axhline(0, color=style.INK, linewidth=0.9, zorder=1)
    cap_line(axes[:1], drawing)
    legend(fig, axes[:1], [label for label, _ in styles.values()], _AXES[axis])
    fig.align_ylabels(list(axes[:, 0]))
    return fig


@style.styled
def _save(fig: Figure, stem: Path) -> Path:
    fig.savefig(stem.with_suffix(".png"))
    fig.set_layout_engine("none")  # laid out already, and laying out costs most of saving
    _save_svg(fig, stem.with_suffix(".svg"))
    return stem.with_suffix(".png")


def _save_svg(fig: Figure, path: Path) -> None:
    """Write the same bytes for the same data, as SVG: matplotlib numbers clip paths by where objects lie in memory."""
    text = io.StringIO()
    fig.savefig(text, format="svg", metadata={"Date": None})
    names: dict[str, str] = {}
    path.write_text(
        re.sub(r"\bp[0-9a-f]{10}\b", lambda m: names.setdefault(m[0], f"clip{len(names)}"), text.getvalue())
    )
