"""A figure being drawn: curves with error bars, losses cut at a cap, open markers for divergence, notes that say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.cells import exponents_text
from analysis.figures import style
from analysis.metrics import Metric
from analysis.significance.pairs import Comparison, Samples, can_pair, compare
from kbit.specs.base import BASELINE_BITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS_CAP: Final = float(np.log(100))
"""Where a figure cuts losses (nats per token): perplexity 100, as in the paper (Appendix C.5). The data aren't cut."""
_MOST_NAMED: Final = 8

X_LABEL: Final = "Total model bits"

SamplesByCell = Mapping[tuple[str, str], Samples]
"""Per-sample outcomes by (cell key, eval)."""

Look = tuple[str, str]
"""(colour, marker)."""


@dataclass(kw_only=True)
class Drawing:
    """The contents of a figure, and what its notes must say in the end.

    Attributes:
        metric: what is drawn.
        cap: where losses are cut; None where they aren't.
        edge: where diverged and cut cells stand in panels of changes from 16-bit; NaN without such panels.
        samples: outcomes by (cell key, eval), for paired intervals.
    """

    metric: Metric
    cap: float | None
    samples: Mapping[tuple[str, str], Samples]
    edge: float = float("nan")
    capped: bool = False
    diverged: bool = False
    undrawn: bool = False
    errors: bool = False
    intervals: bool = False
    replicates: set[int] = field(default_factory=set)

    def heights(self, line: pd.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return where cells [n] are drawn (NaN: nowhere), and which of them diverged or are cut."""
        value, diverged = line["value"].to_numpy(), line["diverged"].to_numpy(dtype=bool)
        cut = value > (np.inf if self.cap is None else self.cap)
        height = value if self.cap is None else np.minimum(value, self.cap)
        # Without a cap an infinity has no place on the axis: the curve stops there.
        self.undrawn |= bool(np.isinf(height).any())
        self.capped |= bool(cut.any())
        self.diverged |= bool(diverged.any())
        return np.where(np.isinf(height), np.nan, height), diverged | cut

    def line(self, ax: Axes, line: pd.DataFrame, look: Look, label: str) -> None:
        """A curve over total bits with bars of one standard error; diverged or cut points have open markers, no bar."""
        line = line.sort_values("total_bits")
        height, special = self.heights(line)
        x, error = line["total_bits"].to_numpy(), line["stderr"].to_numpy()
        _curve(ax, x, height, special, look, label)
        shown = np.isfinite(error) & ~special
        count = _replicates(line)
        self.errors |= bool((shown & (count == 1)).any())
        if (shown & (count > 1)).any():
            self.replicates |= set(count[shown & (count > 1)].tolist())
        _bars(ax, x[shown], height[shown], error[shown], error[shown], look)

    def change_line(self, ax: Axes, line: pd.DataFrame, look: Look) -> None:
        """Changes from 16-bit with paired intervals; diverged or cut points stand on the edge, apart from the curve."""
        line = line.sort_values("total_bits")
        _, special = self.heights(line)
        x, change = line["total_bits"].to_numpy(), line["change"].to_numpy()
        _curve(ax, x, np.where(special, np.nan, change), special, look, "")
        _open_markers(ax, x[special], np.full(special.sum(), self.edge), look)
        count = _replicates(line)
        spread = line["stderr"].to_numpy()
        many = (count > 1) & ~special & np.isfinite(spread)
        _bars(ax, x[many], change[many], spread[many], spread[many], look)
        one = (count == 1) & ~special
        for at, y, key, baseline in zip(x[one], change[one], *_keys(line[one]), strict=True):
            interval = self._interval(key, baseline)
            if interval is not None and np.isfinite(interval.low):
                self.intervals = True
                below, above = max(0.0, y - interval.low), max(0.0, interval.high - y)
                _bars(ax, [at], [y], [below], [above], look)

    def _interval(self, key: str, baseline: str) -> Comparison | None:
        a, b = (self.samples.get((k, self.metric.eval)) for k in (key, baseline))
        if a is None or b is None or not can_pair(a, b, self.metric.metric):
            return None
        return compare(a, b, self.metric.metric)

    def notes(self, cells: pd.DataFrame, sweep: str | None) -> str:
        """Say what the legend doesn't: models, what bars and open markers mean, where losses are cut."""
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
        if self.capped or self.diverged:
            kinds = " or ".join(["diverged"] * self.diverged + ["cut"] * self.capped)
            undrawn = " (not drawn without a finite value)" if self.undrawn else ""
            off = "; their change is off the scale" if np.isfinite(self.edge) else ""
            said.append(f"Open markers: {kinds}{undrawn}{off}.")
        if self.capped:
            said.append("Dashed: losses are cut at perplexity 100 (ln 100 = 4.61 nats); the data are not.")
        if sweep:
            said.append(f"Study: {sweep}.")
        return " ".join(said)


def canvas(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """Return a figure (inches) and its panels [rows, columns], sharing the vertical axis along a row."""
    from matplotlib.figure import Figure as NewFigure

    fig = NewFigure(figsize=size, layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, sharey="row")


def loss_cap(cells: pd.DataFrame, metric: Metric) -> float | None:
    """``LOSS_CAP`` for losses, unless a 16-bit model lies beyond it (or, without any, half of the finite cells)."""
    finite = cells[np.isfinite(cells["value"])]
    base = finite.loc[finite["bits"] == BASELINE_BITS, "value"]
    reference = base.max() if len(base) else finite["value"].median()
    # Where nothing is finite the reference is NaN, and the diverged cells stand at the cap.
    return LOSS_CAP if metric.metric == "loss" and not reference >= LOSS_CAP else None


def change_edge(cells: pd.DataFrame, drawing: Drawing) -> float:
    """Return a value a little beyond the worst change of the cells that neither diverged nor are cut."""
    change = cells.loc[~drawing.heights(cells)[1], "change"].dropna()
    sign = drawing.metric.sign
    worst = change.min() if sign < 0 else change.max()
    return float(worst) * 1.15 if len(change) and worst * sign > 0 else 0.1 * sign


def cap_line(axes: Any, drawing: Drawing) -> None:
    if drawing.capped and drawing.cap is not None:
        for ax in axes.flat:
            ax.axhline(drawing.cap, color=style.INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)


def legend(fig: Figure, axes: Any, order: Sequence[str], title: str) -> None:
    """One legend right of the panels, where it covers nothing."""
    handles = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    labels = [name for name in order if name in handles]
    fig.legend([handles[n] for n in labels], labels, title=title, loc="outside right center", alignment="left")


def _curve(ax: Axes, x: Any, y: Any, special: NDArray[np.bool_], look: Look, label: str) -> None:
    filled = np.flatnonzero(~special).tolist()
    ax.plot(x, y, color=look[0], marker=look[1], markevery=filled, markeredgewidth=0, label=label or None)
    _open_markers(ax, x[special], y[special], look)


def _open_markers(ax: Axes, x: Any, y: Any, look: Look) -> None:
    edge: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": look[0], "markeredgewidth": 1.3}
    ax.plot(x, y, linestyle="none", marker=look[1], markersize=6, zorder=4, **edge)


def _bars(ax: Axes, x: Any, y: Any, below: Any, above: Any, look: Look) -> None:
    if len(x):
        ax.errorbar(x, y, yerr=[below, above], fmt="none", ecolor=look[0], elinewidth=0.8, capsize=1.8, alpha=0.6)


def _replicates(line: pd.DataFrame) -> NDArray[np.int64]:
    """Return how many replicates a point stands for (analysis.replicates)."""
    return line["replicates"].to_numpy() if "replicates" in line.columns else np.ones(len(line), dtype=np.int64)


def _keys(line: pd.DataFrame) -> tuple[list[str], list[str]]:
    return line["key"].tolist(), line["baseline_key"].tolist()
