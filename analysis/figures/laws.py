"""Scaling laws drawn: parallel curves through the cells of each precision, and effective parameters by bits."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from analysis.cells import block_name
from analysis.figures import style
from analysis.figures.results import NoFigureError
from analysis.metrics import Metric
from analysis.scaling.effective import Effective, effective_parameters
from analysis.scaling.interpolation import budget_grid
from analysis.scaling.offsets import Parallel, hats, parallel_curves
from analysis.scaling.points import last_curves, law_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

_DASHED: Final = (0, (3.5, 1.6))


@style.styled
def scaling_laws(df: pd.DataFrame, metric: Metric, *, sweep: str | None = None) -> Figure:
    """Draw a row per family: the metric against total bits with parallel curves, and effective parameters by bits.

    Args:
        df: a wide result table.
        metric: its direction must be known.
        sweep: the study's name, for the note under the figure.

    Raises:
        NoFigureError: no family has two precisions with two models each.
    """
    points = law_points(df, metric)
    rows = []
    for family, own in last_curves(points.cells).groupby("family", sort=False):
        try:
            rows.append((str(family), own, parallel_curves(own)))
        except ValueError as reason:
            log.info("no scaling laws of %s: %s", family, reason)
    if not rows or points.dtype is None:
        raise NoFigureError("no figure of scaling laws: no family has two precisions with two models each")
    from matplotlib.figure import Figure as NewFigure

    fig = NewFigure(figsize=(7.6, 2.8 * len(rows) + 0.2), layout="constrained")
    axes = fig.subplots(len(rows), 2, squeeze=False)
    shown: dict[int, Any] = {}
    for (left, right), (family, own, law) in zip(axes, rows, strict=True):
        shown |= _curves(left, own, law)
        left.set_title(style.family_name(family))
        left.set_ylabel(metric.label)
        _effective(right, own, metric)
    axes[-1][0].set_xlabel("Total model bits")
    axes[-1][1].set_xlabel("Bits per weight")
    labels = sorted(shown, reverse=True)
    handles = [shown[b] for b in labels]
    fig.legend(handles, [f"{b}-bit" for b in labels], title="Precision", loc="outside right center", alignment="left")
    size = "whole tensor" if points.blocksize == 0 else f"block size {block_name(points.blocksize)}"
    title = f"Scaling laws of {metric.phrase} ({points.dtype}, {size})"
    style.finish(fig, title, _notes(rows, metric, sweep))
    return fig


def _curves(ax: Axes, own: pd.DataFrame, law: Parallel) -> dict[int, Any]:
    """Cells as markers, and each precision's base plus offset over the range of its models; handles by precision."""
    handles: dict[int, Any] = {}
    for bits in law.offsets.index:
        cells = own[(own["bits"] == bits) & ~own["diverged"] & np.isfinite(own["value"])]
        look = style.BITS_STYLE.get(int(bits), (style.INK, "P"))
        at = budget_grid(float(cells["total_bits"].min()), float(cells["total_bits"].max()), 101)
        line = hats(np.log2(at), law.knots) @ law.base + float(law.offsets.loc[bits, "offset"])
        ax.plot(at, line, color=look[0], linewidth=1.1)
        (marks,) = ax.plot(
            cells["total_bits"], cells["value"], color=look[0], marker=look[1], linestyle="none", markeredgewidth=0
        )
        handles[int(bits)] = marks
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
            ax.plot(at, -np.expm1(-at / gamma), color=style.INK, linestyle=_DASHED, linewidth=0.9)
    ax.set_ylim(0, 1.08)
    ax.set_ylabel("Effective share of parameters")
    if len(found):
        ax.legend(loc="lower right", fontsize=7)


def _notes(rows: list[tuple[str, pd.DataFrame, Parallel]], metric: Metric, sweep: str | None) -> str:
    said = ["Lines, left: one piecewise linear function of total bits with an offset for each precision."]
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
        "Right: the 16-bit model that is as good, read off the 16-bit curve, as a share of the model's parameters; "
        "open markers are bounds (worse than the smallest 16-bit model, or better than the largest)."
    )
    if metric.metric == "loss":
        said.append("Dashed: 1 - exp(-bits / γ), fitted.")  # noqa: RUF001 - the papers' letter
    if sweep:
        said.append(f"Study: {sweep}.")
    return " ".join(said)
