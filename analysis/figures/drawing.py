"""A figure being drawn: curves with error bars, compressed axes, open markers for divergence, notes that say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.cells import exponents_text
from analysis.figures.results import CUT, Results, SamplesByCell
from analysis.figures.style import Look
from analysis.metrics import Metric
from analysis.significance.pairs import Comparison, can_pair, compare
from kbit.specs.base import BASELINE_BITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS_CAP: Final = float(np.log(CUT))
"""Where an axis of losses (nats per token) is cut unless told otherwise: perplexity 100, as in the paper (Appendix
C.5). The data aren't cut."""
_MOST_NAMED: Final = 8


@dataclass(kw_only=True)
class Drawing:
    """The contents of a figure, and what its notes must say in the end.

    Attributes:
        metric: what is drawn.
        cap: beyond which the axis is compressed; None where it isn't.
        top: the largest finite value; beyond ``cap`` it is where the compressed part ends.
        edge: where diverged cells without a finite change stand in panels of changes; NaN without such panels.
        samples: outcomes by (cell key, eval), for paired intervals.
    """

    metric: Metric
    cap: float | None
    samples: SamplesByCell
    top: float = float("nan")
    edge: float = float("nan")
    capped: bool = False
    diverged: bool = False
    undrawn: bool = False
    errors: bool = False
    intervals: bool = False
    replicates: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, results: Results, cells: pd.DataFrame) -> Drawing:
        """A drawing of the first metric, whose axis is compressed where these cells need it."""
        base = results.base[results.base["family"].isin(cells["family"])]
        cap = loss_cap(pd.concat([c for c in (base, cells) if len(c)]), results.metric, results.cut)
        finite = cells["value"][np.isfinite(cells["value"])]
        top = float(finite.max()) if len(finite) else float("nan")
        return cls(metric=results.metric, cap=cap, samples=results.samples or {}, top=top)

    @property
    def beyond(self) -> bool:
        """Some finite value lies beyond the cap, so that a part of the axis is compressed."""
        return self.cap is not None and self.top > self.cap

    @property
    def infinity(self) -> float:
        """Where a diverged cell without a finite value stands on a cut axis: above all that have one."""
        assert self.cap is not None
        return self.top + 0.15 * (self.top - self.cap) if self.beyond else self.cap

    def heights(self, line: pd.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return where cells [n] are drawn (NaN: nowhere), and which of them diverged or are beyond the cap."""
        value, diverged = line["value"].to_numpy(dtype=float), line["diverged"].to_numpy(dtype=bool)
        cut = value > (np.inf if self.cap is None else self.cap)
        height = value if self.cap is None else np.where(np.isposinf(value), self.infinity, value)
        # Without a cap an infinity has no place on the axis: the curve stops there.
        self.undrawn |= bool(np.isinf(height).any())
        self.capped |= bool(cut.any())
        self.diverged |= bool(diverged.any())
        return np.where(np.isinf(height), np.nan, height), diverged | cut

    def line(self, ax: Axes, line: pd.DataFrame, look: Look, label: str) -> None:
        """A curve over total bits with bars of one standard error; diverged or cut points have open markers, no bar."""
        line = line.sort_values("x")
        height, special = self.heights(line)
        x, error = line["x"].to_numpy(dtype=float), line["stderr"].to_numpy(dtype=float)
        curve(ax, (x, height), special, look, label)
        shown = np.isfinite(error) & ~special
        count = _replicates(line)
        self.errors |= bool((shown & (count == 1)).any())
        if (shown & (count > 1)).any():
            self.replicates |= set(count[shown & (count > 1)].tolist())
        bars(ax, x[shown], height[shown], (error[shown], error[shown]), look)

    def change_line(self, ax: Axes, line: pd.DataFrame, look: Look) -> None:
        """Changes with paired intervals; diverged or cut points are apart from the curve, without a finite change on
        the edge.
        """
        line = line.sort_values("x")
        _, special = self.heights(line)
        x, change = line["x"].to_numpy(dtype=float), line["change"].to_numpy(dtype=float)
        curve(ax, (x, np.where(special, np.nan, change)), special, look, "")
        # Of two diverged cells one may be much better than the other: that is no effect to be seen here.
        better = special & np.isfinite(change) & (self.metric.sign * change < 0)
        off = np.where(np.isfinite(change) & ~better, change, self.edge)
        off[better] = np.nan
        open_markers(ax, x[special], off[special] if self.beyond else np.full(special.sum(), self.edge), look)
        count = _replicates(line)
        spread = line["stderr"].to_numpy(dtype=float)
        many = (count > 1) & ~special & np.isfinite(spread)
        bars(ax, x[many], change[many], (spread[many], spread[many]), look)
        one = (count == 1) & ~special
        for at, y, key, baseline in zip(x[one], change[one], *_keys(line[one]), strict=True):
            found = self.interval(key, baseline)
            if found is not None:
                below, above = max(0.0, y - found.low), max(0.0, found.high - y)
                bars(ax, [at], [y], ([below], [above]), look)

    def interval(self, key: str, baseline: str) -> Comparison | None:
        """Return the paired difference of two cells' values, None where their outcomes can't be paired."""
        a, b = (self.samples.get((k, self.metric.eval)) for k in (key, baseline))
        if a is None or b is None or not can_pair(a, b, self.metric.metric):
            return None
        found = compare(a, b, self.metric.metric)
        if not np.isfinite(found.low):
            return None
        self.intervals = True
        return found

    def notes(self, cells: pd.DataFrame, sweep: str | None) -> str:
        """Say what the legend doesn't: models, what bars and open markers mean, where an axis is compressed."""
        said = []
        models = list(dict.fromkeys(cells.sort_values("params")["model"]))
        if len(models) == 1:
            said.append(f"Model: {models[0]}.")
        elif cells["family"].nunique() == 1 and len(models) <= _MOST_NAMED:
            said.append("Each curve, left to right: " + ", ".join(models) + ".")
        if exponents := exponents_text(cells):
            said.append(f"Exponent bits of float: {exponents}.")
        if self.errors:
            said.append("Bars: ± 1 standard error.")
        if self.replicates:
            seeds = " or ".join(map(str, sorted(self.replicates)))
            said.append(f"Replicates: mean ± 1 standard deviation over {seeds} seeds of the calibration data.")
        if self.intervals:
            said.append("Bars of the change: 95 % confidence interval, paired on the same samples.")
        said += self._divergence()
        if sweep:
            said.append(f"Study: {sweep}.")
        return " ".join(said)

    def _divergence(self) -> list[str]:
        said = []
        if self.capped or self.diverged:
            kinds = " or ".join(["diverged"] * self.diverged + ["cut"] * self.capped)
            undrawn = " (not drawn without a finite value)" if self.undrawn else ""
            off = "; their change is off the scale" if np.isfinite(self.edge) and not self.beyond else ""
            said.append(f"Open markers: {kinds}{undrawn}{off}.")
        if self.capped and self.cap is not None:
            where = cap_text(self.cap, self.metric)
            if self.beyond:
                said.append(f"Dashed: {where}; beyond it the axis is compressed, and order is kept.")
            else:
                said.append(f"Dashed: losses are cut at {where}; the data are not.")
        return said


def cap_text(cap: float, metric: Metric) -> str:
    if metric.metric == "perplexity":
        return f"perplexity {cap:g}"
    return f"perplexity {np.exp(cap):g} (ln {np.exp(cap):g} = {cap:.2f} nats)"


def loss_cap(cells: pd.DataFrame, metric: Metric, cut: float | None = CUT) -> float | None:
    """Return where the axis of a loss or a perplexity is cut; None for other metrics, and where nothing is.

    Nor is it cut where a 16-bit model lies beyond (without any, half of the finite cells).
    """
    if cut is None or metric.metric not in ("loss", "perplexity"):
        return None
    cap = float(np.log(cut)) if metric.metric == "loss" else cut
    finite = cells[np.isfinite(cells["value"])]
    base = finite.loc[finite["bits"] == BASELINE_BITS, "value"]
    reference = base.max() if len(base) else finite["value"].median()
    # Where nothing is finite the reference is NaN, and the diverged cells stand at the cap.
    return cap if not reference >= cap else None


def change_edge(cells: pd.DataFrame, drawing: Drawing) -> tuple[float, float]:
    """Return the worst change of cells that neither diverged nor are cut, and a value a little beyond all changes.

    The second is where diverged cells without a finite change stand. It is no more than 1.15 times the
    first unless some diverged or cut cell has a finite change beyond it.
    """
    special = drawing.heights(cells)[1]
    sign = drawing.metric.sign
    worst = _worst(cells.loc[~special, "change"], sign)
    if drawing.beyond:
        far = _worst(cells["change"], sign)
        return worst, far + 0.15 * (far - worst) if far * sign > worst * sign else far * 1.15
    return worst, worst * 1.15 if worst else 0.1 * sign


def _worst(change: pd.Series[float], sign: float) -> float:
    """Return the worst finite change, 0 where none is for the worse."""
    finite = change[np.isfinite(change)]
    worst = float(finite.min() if sign < 0 else finite.max()) if len(finite) else 0.0
    return worst if worst * sign > 0 else 0.0


def compress(panels: list[Axes], at: float, top: float, share: float = 0.16) -> None:
    """Compress an axis beyond ``at`` so that what is there takes a share of its height; ticks stay those of the data.

    Panels share the axis. Order is kept, so that of two diverged cells the worse one stays the higher.
    """
    from matplotlib.ticker import FixedLocator, MaxNLocator

    low = min(float(ax.dataLim.y0) for ax in panels)
    low = low if np.isfinite(low) and low < at else at - 1.0
    slope = max(top - at, 1e-12) * (1 - share) / (share * (at - low))

    def forward(y: Any) -> Any:
        y = np.asarray(y, dtype=float)
        return np.where(y > at, at + (y - at) / slope, y)

    def back(y: Any) -> Any:
        y = np.asarray(y, dtype=float)
        return np.where(y > at, at + (y - at) * slope, y)

    ticks = [t for t in MaxNLocator(nbins=5).tick_values(low, at) if t <= at - 0.1 * (at - low)]
    for ax in panels:
        ax.set_yscale("function", functions=(forward, back))
        ax.set_ylim(low - 0.05 * (at - low), back(at + (forward(top) - at) * 1.15))
        ax.yaxis.set_major_locator(FixedLocator([*ticks, at, float(f"{top:.3g}")]))
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:.3g}")


def canvas(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """Return a figure (inches) and its panels [rows, columns], sharing the vertical axis along a row."""
    from matplotlib.figure import Figure as NewFigure

    fig = NewFigure(figsize=size, layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, sharey="row")


def legend(fig: Figure, axes: Any, order: Sequence[str], title: str) -> None:
    """One legend right of the panels, where it covers nothing."""
    handles = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    labels = [name for name in order if name in handles]
    fig.legend([handles[n] for n in labels], labels, title=title, loc="outside right center", alignment="left")


def curve(ax: Axes, at: tuple[Any, Any], special: NDArray[np.bool_], look: Look, label: str) -> None:
    """Draw a curve through (x, y) whose special points have open markers."""
    x, y = at
    filled = np.flatnonzero(~special).tolist()
    colour, marker, line = look
    own: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line, "label": label or None}
    if marker != "x":  # which is nothing but edge
        own["markeredgewidth"] = 0
    ax.plot(x, y, markevery=filled, **own)
    open_markers(ax, x[special], y[special], look)


def open_markers(ax: Axes, x: Any, y: Any, look: Look) -> None:
    from matplotlib import rcParams

    edge: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": look.colour, "markeredgewidth": 1.3}
    ax.plot(x, y, linestyle="none", marker=look.marker, markersize=1.2 * rcParams["lines.markersize"], zorder=4, **edge)


def bars(ax: Axes, x: Any, y: Any, lengths: tuple[Any, Any], look: Look) -> None:
    """Draw error bars of lengths (below, above)."""
    if len(x):
        ax.errorbar(x, y, yerr=list(lengths), fmt="none", ecolor=look.colour, elinewidth=0.8, capsize=1.8, alpha=0.6)


def _replicates(line: pd.DataFrame) -> NDArray[np.int64]:
    """Return how many replicates a point stands for (analysis.replicates)."""
    return line["replicates"].to_numpy() if "replicates" in line.columns else np.ones(len(line), dtype=np.int64)


def _keys(line: pd.DataFrame) -> tuple[list[str], list[str]]:
    return line["key"].tolist(), line["baseline_key"].tolist()
