"""Comparisons at one precision: data types, block sizes and methods over model sizes (Figures 3, 14 and 15)."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

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
from analysis.figures import style
from analysis.figures.drawing import (
    X_LABEL,
    Drawing,
    Look,
    SamplesByCell,
    canvas,
    cap_line,
    change_edge,
    legend,
    loss_cap,
)
from analysis.metrics import Metric
from analysis.replicates import pool, replicate_groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

Styles = Mapping[Hashable, tuple[str, Look]]
"""Value of an axis -> (label, look), in the legend's order."""

_MOST_PANELS: Final = 4
_AXES: Final = {"dtype": "Data type", "blocksize": "Block size", "method": "Method"}


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
        axes[-1, column].set_xlabel(f"{_AXES[axis]} ({own['model'].iloc[0]})" if single else X_LABEL)
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
