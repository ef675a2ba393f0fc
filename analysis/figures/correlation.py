"""Perplexity against zero-shot accuracy, cell by cell, with their Pearson correlation (section 4: -0.94)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from analysis.cells import numbers, points
from analysis.chance import chance_level
from analysis.figures import style
from analysis.figures.results import CUT, NotAskedError, Results
from analysis.figures.sheet import Sheet
from analysis.figures.showing import Drawable
from analysis.metrics import Metric, metric_columns, primary_loss, zero_shot
from kbit.specs.base import BASELINE_BITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER: Final = -0.94
_FEWEST: Final = 3


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """A Pearson correlation over cells.

    Attributes:
        r: of perplexity and accuracy, perplexity cut as the paper cuts it; NaN where one of them is constant.
        r_loss: of the loss, its logarithm, uncut, over the finite cells.
        n: cells with both, of which ``cut`` were beyond the cut or diverged without a value.
    """

    r: float
    r_loss: float
    n: int
    cut: int


def accuracy_of(df: pd.DataFrame) -> tuple[str, pd.Series[float], Metric | None]:
    """Return what stands for zero-shot accuracy: its name, its value by row, and its metric.

    It is the mean of the paper's four tasks; where no cell has it, the mean of those tasks with an accuracy that are
    there, without a metric of its own.

    Raises:
        NotAskedError: no task has an accuracy.
    """
    metric = zero_shot(df)
    if metric is not None:
        return metric.name, numbers(df, metric.column), metric
    tasks = [m for m in metric_columns(df) if m.metric == "acc" and df[m.column].notna().any()]
    if not tasks:
        raise NotAskedError("no figure of perplexity and accuracy: no task has an accuracy")
    values = pd.DataFrame({m.eval: numbers(df, m.column) for m in tasks})
    only = tasks[0] if len(tasks) == 1 else None
    return f"Mean accuracy on {', '.join(values.columns)}", values.mean(axis=1, skipna=False), only


def correlation(losses: pd.Series[float], accuracy: pd.Series[float], cut: float | None = CUT) -> Correlation:
    """Return the correlation of perplexity, exp(loss), and accuracy over the cells that have both.

    Args:
        losses: nats per token [n]; infinite where a cell diverged without a value.
        accuracy: fractions [n].
        cut: perplexity that larger ones count as; None leaves cells without a finite one out.
    """
    both = losses.notna() & accuracy.notna()
    loss, right = losses[both].to_numpy(dtype=float), accuracy[both].to_numpy(dtype=float)
    with np.errstate(over="ignore"):
        perplexity = np.exp(loss)
    beyond = perplexity > (np.inf if cut is None else cut)
    shown = perplexity if cut is None else np.minimum(perplexity, cut)
    finite = np.isfinite(shown)
    return Correlation(
        r=_pearson(shown[finite], right[finite]),
        r_loss=_pearson(loss[np.isfinite(loss)], right[np.isfinite(loss)]),
        n=int(both.sum()),
        cut=int(beyond.sum()),
    )


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < _FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


@dataclass(frozen=True, kw_only=True)
class Scatter(Drawable):
    """Cells with both measures: columns family, bits, loss, accuracy."""

    results: Results
    cells: pd.DataFrame
    loss: Metric
    accuracy: str
    metric: Metric | None

    def _drawn(self) -> Figure:
        return _draw(self)


def scatter(results: Results) -> Scatter:
    """Return the chart of accuracy against the loss, a panel per family, a colour per precision.

    Raises:
        NotAskedError: fewer than three cells have both.
    """
    loss = primary_loss(results.df)
    if loss is None:
        raise NotAskedError("no figure of perplexity and accuracy: no text set has a loss")
    rows = results.rows[numbers(results.rows, "bits").notna()]
    name, values, metric = accuracy_of(rows)
    cells = points(rows, loss).rename(columns={"value": "loss"})
    cells = cells.assign(accuracy=cells["key"].map(values.set_axis(rows["key"]))).dropna(subset=["accuracy"])
    finite = cells[np.isfinite(cells["loss"])]
    if len(finite) < _FEWEST or not (finite["bits"] < BASELINE_BITS).any():
        raise NotAskedError(
            f"no figure of perplexity and accuracy: {len(finite)} cells, some quantized, have {loss.column} and "
            f"{name[0].lower()}{name[1:]}"
        )
    return Scatter(results=results, cells=cells, loss=loss, accuracy=name, metric=metric)


def _draw(chart: Scatter) -> Figure:
    from textwrap import fill

    families = list(dict.fromkeys(chart.cells["family"]))
    sheet = Sheet(len(families), parts=1, columns=chart.results.columns)
    cut = chart.results.cut
    cap = np.inf if cut is None else float(np.log(cut))
    names = {b: f"{b}-bit" for b in sorted(chart.cells["bits"].astype(int).unique(), reverse=True)}
    for i, family in enumerate(families):
        ax, own = sheet.values[i], chart.cells[chart.cells["family"] == family]
        for bits, name in names.items():
            line = own[own["bits"] == bits]
            look, beyond = style.bits_style(bits), line["loss"] > cap
            at = line["loss"].clip(upper=cap)
            plot: dict[str, Any] = {
                "linestyle": "none",
                "marker": look.marker,
                "alpha": 0.7,
                "rasterized": len(chart.cells) > 4000,
            }
            ax.plot(at[~beyond], line["accuracy"][~beyond], color=look.colour, markeredgewidth=0, label=name, **plot)
            edge: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": look.colour, "markeredgewidth": 1.0}
            ax.plot(at[beyond & np.isfinite(at)], line["accuracy"][beyond & np.isfinite(at)], **{**plot, **edge})
        ax.set_title(f"{style.family_name(str(family))}: r = {_r(own, cut)}")
        ax.set_xlabel(chart.loss.label if sheet.is_last(i) else "")
        ax.set_ylabel(fill(chart.accuracy, 24) if sheet.is_left(i) else "")
        level = chance_level(chart.metric) if chart.metric else None
        if level is not None:
            ax.axhline(level, color=style.INK, linewidth=0.9, linestyle=style.DOTTED, zorder=1)
    sheet.legend(list(names.values()), "Precision")
    return sheet.finish(f"{chart.accuracy} against {chart.loss.phrase}", _notes(chart, cut))


def _r(own: pd.DataFrame, cut: float | None) -> str:
    found = correlation(own["loss"], own["accuracy"], cut)
    return f"{found.r:.2f}" if np.isfinite(found.r) else "undefined"


def _notes(chart: Scatter, cut: float | None) -> str:
    found = correlation(chart.cells["loss"], chart.cells["accuracy"], cut)
    r, r_loss = (f"{x:.2f}" if np.isfinite(x) else "undefined" for x in (found.r, found.r_loss))
    said = [
        f"Pearson correlation of perplexity and accuracy over {found.n:,} cells: {r} (the paper's: {PAPER}); "
        f"of the loss: {r_loss}."
    ]
    if found.cut:
        many = f"{found.cut} of them {'is' if found.cut == 1 else 'are'}"
        said.append(f"{many} beyond perplexity {cut:g} and count as that (open markers)." if cut else "")
    level = chance_level(chart.metric) if chart.metric else None
    if level is not None:
        said.append(f"Dotted: chance ({level:.4g}).")
    if chart.results.sweep:
        said.append(f"Study: {chart.results.sweep}.")
    return " ".join(filter(None, said))
