"""What quantizing costs against bits per parameter: data types, block sizes, and every format that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from analysis.cells import block_name, numbers, one_exponent, ordered_dtypes, points, with_baseline
from analysis.figures import style
from analysis.figures.comparisons import block_looks
from analysis.figures.drawing import Drawing, bars, curve, open_markers
from analysis.figures.results import NotAskedError, Results, block_text, held
from analysis.figures.sheet import Sheet
from analysis.figures.showing import Drawable
from analysis.replicates import pooled
from kbit.specs.base import BASELINE_BITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

X_LABEL: Final = "Bits per parameter"
_LINEAR: Final = {"loss": 0.01, "perplexity": 0.1, "kl": 1e-4}
"""Changes up to which an axis of losses is linear; beyond, it is logarithmic."""
_LEAST_SPREAD: Final = 6.0
"""Largest change by the median one from which the axis is logarithmic."""


@dataclass(frozen=True, kw_only=True)
class OverBits(Drawable):
    """Changes from 16-bit over bits per parameter: of each family the mean over its models, with its standard error.

    Attributes:
        results: where it is from, and how it is to be drawn.
        cells: ``with_baseline`` of the cells, with the column curve, of models with a 16-bit cell.
        looks: of each curve, in the legend's order.
        title: of the figure.
        legend: title of the legend.
        joined: whether the points of a curve are.
        notes: what is said of this figure before what is said of all.
    """

    results: Results
    cells: pd.DataFrame
    looks: Mapping[str, style.Look]
    title: str
    legend: str
    joined: bool = True
    notes: str = ""

    def _drawn(self) -> Figure:
        return _draw(self)


def formats(results: Results) -> OverBits:
    """Return the chart of every format, a marker each by its method: also those without a data type.

    Raises:
        NotAskedError: one method alone was measured.
    """
    rows = results.rows
    quantized = rows[numbers(rows, "bits") < BASELINE_BITS]
    cells = points(quantized, results.metric)
    found = sorted(cells["method"].dropna().unique(), key=lambda m: (m != "blockwise", m))
    if len(found) < 2:
        named = " and ".join(found) or "no method"
        raise NotAskedError(f"no figure of formats: {named} has {results.metric.column}, and no other method")
    cells = pooled(cells, rows)
    stored = quantized.set_index("key")["bits_per_param"]
    cells["bits_per_param"] = pd.to_numeric(cells["key"].map(stored)).fillna(cells["bits_per_param"])
    labels = quantized.set_index("key")["label"].astype("string").str.split(", ").str[0]
    return _checked(
        OverBits(
            results=results,
            cells=with_baseline(cells.assign(curve=cells["method"], format=cells["key"].map(labels)), results.base),
            looks=dict(zip(found, style.ordinal_styles(len(found)), strict=True)),
            title=f"What each format costs against its bits: {results.metric.phrase}",
            legend="Method",
            joined=False,
        )
    )


def data_types_by_bits(results: Results) -> OverBits:
    """Return the chart of data types at each precision, at one block size (Figure 10 beside Figures 3 and 9).

    Raises:
        NotAskedError: there are not two data types at two precisions.
    """
    cells = results.at(results.plain(), "blocksize")
    cells = _several(held(cells, ["blocksize"], over="dtype"), "dtype")
    if cells["bits"].nunique() < 2 or cells["dtype"].nunique() < 2:
        raise NotAskedError(
            f"no figure of data types by bits: {results.metric.column} has no two of them at two precisions"
        )
    cells = one_exponent(cells, ["family", "dtype", "bits"])
    block = block_text(int(cells["blocksize"].iloc[0]))
    return _checked(
        OverBits(
            results=results,
            cells=with_baseline(cells.assign(curve=cells["dtype"], format=cells["dtype"]), results.base),
            looks={d: style.dtype_style(d) for d in ordered_dtypes(cells)},
            title=f"Data types by precision: {results.metric.phrase} ({block})",
            legend="Data type",
        )
    )


def block_sizes_by_bits(results: Results) -> OverBits:
    """Return the chart of block sizes at each precision, of one data type (Figure 11 beside Figures 3 and 8).

    Raises:
        NotAskedError: there are not two block sizes at two precisions.
    """
    cells = results.at(results.plain(), "dtype")
    cells = _several(held(cells, ["dtype"], over="blocksize"), "blocksize")
    if cells["bits"].nunique() < 2 or cells["blocksize"].nunique() < 2:
        raise NotAskedError(f"no figure of block sizes by bits: {results.metric.column} has no two at two precisions")
    cells = one_exponent(cells, ["family", "dtype", "bits"], axis="blocksize")
    names = cells["blocksize"].map(block_name)
    return _checked(
        OverBits(
            results=results,
            cells=with_baseline(cells.assign(curve=names, format=names), results.base),
            looks=block_looks(cells["blocksize"]),
            title=f"Block sizes by precision: {results.metric.phrase} ({cells['dtype'].iloc[0]})",
            legend="Block size",
        )
    )


def _several(cells: pd.DataFrame, axis: str) -> pd.DataFrame:
    """Return the cells of precisions at which a family has two values of an axis."""
    return cells[cells.groupby(["family", "bits"])[axis].transform("nunique") > 1] if len(cells) else cells


def _checked(chart: OverBits) -> OverBits:
    known = chart.cells["baseline"].notna() & chart.cells["bits_per_param"].notna()
    if not np.isfinite(chart.cells["change"][known]).any():
        title = chart.title.split(":")[0].lower()
        raise NotAskedError(f"no figure of {title}: no {chart.results.metric.column} can be compared with 16 bits")
    return replace(chart, cells=chart.cells[known])


def _draw(chart: OverBits) -> Figure:
    metric, cells = chart.results.metric, chart.cells
    families = list(dict.fromkeys(cells["family"]))
    sheet = Sheet(len(families), parts=1, columns=chart.results.columns)
    drawing = Drawing.of(chart.results, cells)
    models: set[int] = set()
    means = _means(cells, drawing)
    finite = means["change"][np.isfinite(means["change"])]
    edge = _edge(finite, metric.sign)
    for i, family in enumerate(families):
        ax = sheet.values[i]
        models |= _panel(chart, ax, means[means["family"] == family], edge)
        ax.set_title(style.family_name(str(family)))
        ax.axhline(0, color=style.INK, linewidth=0.9, zorder=1)
        ax.set_xlabel(X_LABEL if sheet.is_last(i) else "")
        unit = f"\n({metric.unit})" if metric.unit else ""
        ax.set_ylabel(f"Change from 16-bit{unit}" if sheet.is_left(i) else "")
    notes = [chart.notes, _said_of_models(models), *_vertical(sheet, finite, drawing)]
    sheet.legend([*chart.looks, _FRONT], chart.legend)
    if means["special"].any():
        notes.append("Open markers: a model diverged or is beyond the cut; without a finite change, on the edge.")
    if chart.results.sweep:
        notes.append(f"Study: {chart.results.sweep}.")
    return sheet.finish(chart.title, " ".join(filter(None, notes)))


_FRONT: Final = "best for its bits"


def _panel(chart: OverBits, ax: Axes, own: pd.DataFrame, edge: float) -> set[int]:
    """Draw one family; return over how many models means are."""
    sign = chart.results.metric.sign
    for name, look in chart.looks.items():
        line = own[own["curve"] == name].sort_values("bits_per_param")
        if line.empty:
            continue
        x, y = line["bits_per_param"].to_numpy(), line["change"].to_numpy()
        special = line["special"].to_numpy(dtype=bool)
        height = np.where(np.isfinite(y), y, edge)
        if chart.joined:
            curve(ax, (x, height), special, look, name)
        else:
            ax.plot(x[~special], y[~special], linestyle="none", marker=look[1], color=look[0], alpha=0.8, label=name)
            open_markers(ax, x[special], height[special], look)
        error = line["stderr"].to_numpy()
        shown = np.isfinite(error) & ~special
        bars(ax, x[shown], y[shown], (error[shown], error[shown]), look)
    if not chart.joined:
        best = own[np.isfinite(own["change"]) & ~own["special"]].sort_values(["bits_per_param"])
        cost = sign * best["change"].to_numpy()
        front = best[cost <= np.minimum.accumulate(cost)] if len(best) else best
        style_of: dict[str, Any] = {"color": style.INK, "linewidth": 0.9, "zorder": 1, "drawstyle": "steps-post"}
        ax.plot(front["bits_per_param"], front["change"], label=_FRONT, **style_of)
    return set(own["models"])


def _means(cells: pd.DataFrame, drawing: Drawing) -> pd.DataFrame:
    """One row a family, curve and format: mean change over its models, its standard error, and whether one is special.

    Formats that not all models of a family have are means over those that do.
    """
    special = drawing.heights(cells)[1]
    rows = cells.assign(special=special)
    groups = rows.groupby(["family", "curve", "format", "bits", "blocksize"], sort=False, dropna=False)
    found = groups.agg(
        bits_per_param=("bits_per_param", "mean"),
        change=("change", "mean"),
        spread=("change", "std"),
        models=("model", "nunique"),
        special=("special", "any"),
    ).reset_index()
    return found.assign(stderr=found["spread"] / np.sqrt(found["models"]))


def _edge(finite: pd.Series[float], sign: float) -> float:
    worst = float((sign * finite).max()) if len(finite) else 0.0
    return sign * (worst * 1.6 if worst > 0 else 0.1)


def _said_of_models(models: set[int]) -> str:
    counts = sorted(models)
    if counts == [1]:
        return "Of one model a family."
    span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Means over the {span} models of a family; bars: ± 1 standard error over models."


def _vertical(sheet: Sheet, finite: pd.Series[float], drawing: Drawing) -> list[str]:
    """Make the axis logarithmic where changes differ by orders of magnitude; return the note that says so."""
    linear = _LINEAR.get(drawing.metric.metric)
    size = finite.abs()
    if linear is None or finite.empty or not size.max() > _LEAST_SPREAD * max(linear, float(size.median())):
        return []
    # Panels share the axis: the limits are those of all of them.
    lowest, highest = min(0.0, float(finite.min())), max(float(ax.dataLim.y1) for ax in sheet.values)
    for ax in sheet.values:
        ax.set_yscale("symlog", linthresh=linear, linscale=0.5)
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")  # a power of ten would take a font of mathematics
        ax.set_ylim(1.5 * lowest - 0.3 * linear, highest * 1.4)
    return [f"The vertical axis is linear up to {linear:g} and logarithmic beyond."]
