"""Scaling laws drawn: parallel curves through the cells of each precision, and effective parameters by bits."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.figures import style
from analysis.figures.results import NoFigureError, Results, block_text
from analysis.figures.sheet import Sheet
from analysis.figures.showing import Drawable
from analysis.metrics import Metric
from analysis.scaling.effective import Effective, effective_parameters
from analysis.scaling.interpolation import budget_grid
from analysis.scaling.offsets import Parallel, hats, parallel_curves
from analysis.scaling.points import last_curves, law_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Laws(Drawable):
    """Parallel curves and effective parameters by family: ``families`` has each one's name, cells and curves."""

    results: Results
    families: list[tuple[str, pd.DataFrame, Parallel]]
    title: str

    def _drawn(self) -> Figure:
        return _draw(self)


def scaling_laws(results: Results) -> Laws:
    """Return the chart of a panel per family: above the metric against total bits, below effective parameters by bits.

    Raises:
        NoFigureError: no family has two precisions with two models each.
    """
    metric = results.metric
    points = law_points(results.df, metric, dtype=results.dtype, blocksize=results.blocksize)
    families = []
    for family, own in last_curves(points.cells).groupby("family", sort=False):
        try:
            families.append((str(family), own, parallel_curves(own)))
        except ValueError as reason:
            log.info("no scaling laws of %s: %s", family, reason)
    if not families or points.dtype is None:
        raise NoFigureError("no figure of scaling laws: no family has two precisions with two models each")
    title = f"Scaling laws of {metric.phrase} ({points.dtype}, {block_text(points.blocksize)})"
    return Laws(results=results, families=families, title=title)


def _draw(chart: Laws) -> Figure:
    metric = chart.results.metric
    sheet = Sheet(len(chart.families), parts=2, columns=chart.results.columns, alone=True)
    shown: dict[int, Any] = {}
    for i, (family, own, law) in enumerate(chart.families):
        above, below = sheet.values[i], sheet.changes[i]
        shown |= _curves(above, own, law)
        _effective(below, own, metric)
        above.set_title(style.family_name(family))
        above.set_xlabel(chart.results.size)
        below.set_xlabel("Bits per weight" if sheet.is_last(i) else "")
        if sheet.is_left(i):
            above.set_ylabel(sheet.wrapped(metric.label))
            below.set_ylabel(sheet.wrapped("Effective share of parameters"))
    sheet.legend_of({f"{bits}-bit": shown[bits] for bits in sorted(shown, reverse=True)}, "Precision")
    return sheet.finish(chart.title, _notes(chart.families, metric, chart.results.sweep))


def _curves(ax: Axes, own: pd.DataFrame, law: Parallel) -> dict[int, Any]:
    """Cells as markers, and each precision's base plus offset over the range of its models; handles by precision."""
    handles: dict[int, Any] = {}
    for bits in law.offsets.index:
        cells = own[(own["bits"] == bits) & ~own["diverged"] & np.isfinite(own["value"])]
        look = style.bits_style(int(bits))
        at = budget_grid(float(cells["total_bits"].min()), float(cells["total_bits"].max()), 101)
        line = hats(np.log2(at), law.knots) @ law.base + float(law.offsets.loc[bits, "offset"])
        ax.plot(at, line, color=look.colour, linewidth=1.1)
        plot: dict[str, Any] = {"color": look.colour, "marker": look.marker, "linestyle": "none", "markeredgewidth": 0}
        (handles[int(bits)],) = ax.plot(cells["total_bits"], cells["value"], **plot)
    style.bits_axis(ax, own["total_bits"].dropna().tolist())
    return handles


def _effective(ax: Axes, own: pd.DataFrame, metric: Metric) -> None:
    """The share of parameters that count, a curve per model; open markers are bounds; dashed the fitted law."""
    found = effective_parameters(own, metric)
    looks = style.ordinal_styles(max(1, found["model"].nunique()))
    for (_, cells), look in zip(found.groupby("model", sort=False), looks, strict=False):
        cells = cells.sort_values("bits_per_param")
        known = (cells["known"] == "yes").to_numpy()
        x, y = cells["bits_per_param"].to_numpy(dtype=float), cells["ratio"].to_numpy(dtype=float)
        name = str(cells["model"].iloc[0])
        ax.plot(np.where(known, x, np.nan), np.where(known, y, np.nan), color=look[0], marker=look[1], label=name)
        edge: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": look[0], "markeredgewidth": 1.2}
        ax.plot(x[~known], y[~known], linestyle="none", marker=look[1], **edge)
    if metric.metric == "loss":
        try:
            gamma = Effective().fit(own).parameters["gamma"]
        except ValueError as reason:
            log.info("no law of effective parameters: %s", reason)
        else:
            at = np.linspace(2, 9, 101)
            ax.plot(at, -np.expm1(-at / gamma), color=style.INK, linestyle=style.DASHED, linewidth=0.9)
    ax.set_ylim(0, 1.08)
    if len(found):
        ax.legend(loc="lower right", fontsize="small", handlelength=1.3, labelspacing=0.2, borderpad=0)


def _notes(rows: list[tuple[str, pd.DataFrame, Parallel]], metric: Metric, sweep: str | None) -> str:
    said = ["Lines, above: one piecewise linear function of total bits with an offset for each precision."]
    for family, _, law in rows:
        largest = law.largest_drift
        if not largest.empty and np.isfinite(law.p):
            said.append(
                f"{style.family_name(family)}: parallel, F test p = {law.p:.2g}; {largest.name}-bit moves by "
                f"{largest['drift']:+.3f} ({largest['drift_low']:+.3f} to {largest['drift_high']:+.3f}) over the sizes."
            )
        if law.censored:
            said.append(f"{style.family_name(family)}: {law.censored} diverged cells are not drawn.")
    said.append(
        "Below: the 16-bit model that is as good, read off the 16-bit curve, as a share of the model's parameters; "
        "open markers are bounds (worse than the smallest 16-bit model, or better than the largest)."
    )
    if metric.metric == "loss":
        said.append("Dashed: 1 - exp(-bits / γ), fitted.")  # noqa: RUF001 - the papers' letter
    if sweep:
        said.append(f"Study: {sweep}.")
    return " ".join(said)
