"""Figures of 16-bit models' outliers: correlations of weights with activations, emergence of outlier features."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from analysis.figures import style
from analysis.figures.drawing import canvas, legend
from analysis.figures.style import Look
from kbit.evaluation.evaluators import OUTLIER_LAYERS, OUTLIER_MAGNITUDE, OUTLIER_POSITIONS, SPREAD_PAIRS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a7d00")
_MARKERS: Final = "osv^DpX<"
_COLUMNS: Final = 3
_SHARES: Final = {"layers": ("Layers", OUTLIER_LAYERS), "positions": ("Sequence positions", OUTLIER_POSITIONS)}
_GREY: Final[dict[str, Any]] = {"color": style.INK, "linewidth": 0.8, "linestyle": (0, (4, 3)), "zorder": 1}

_BARS: Final[dict[str, Any]] = {"fmt": "none", "elinewidth": 0.8, "capsize": 1.8, "alpha": 0.6}
_CORRELATED: Final = (
    "Spread of the weights that make a dimension (first layer) beside its mean magnitude (second). Marks: mean over "
    "blocks with its 95 % interval over blocks; dots: the blocks."
)
_EMERGED: Final = (
    f"Outlier features: magnitude of at least {OUTLIER_MAGNITUDE:g} in at least {100 * OUTLIER_LAYERS:g} % of the "
    f"layers and at {100 * OUTLIER_POSITIONS:g} % of the positions (dashed grey). Filled: what they affect together, "
    "± 1 standard error over windows. Open: the dimension that is large at most positions, an outlier feature or not."
)


@style.styled
def draw_correlations(table: pd.DataFrame, *, study: str | None = None) -> Figure | None:
    """Draw the rank correlations of ``analysis.outliers`` against parameters, one panel per kind of layer.

    Marks are means over blocks with their 95 % intervals, dots the blocks. None, with the reason logged, without any.

    Args:
        table: ``analysis.outliers.Outliers.correlations`` of one text set.
        study: its name, for the notes.
    """
    if not len(table) or table["correlation"].isna().all():
        log.warning("no figure of correlations: none was measured")
        return None
    looks = _looks(table)
    names = layer_order(table)
    columns = min(_COLUMNS, len(names))
    lines = -(-len(names) // columns)
    fig, axes = canvas(lines, columns, (2.7 * columns + 1.4, 2.5 * lines + 0.2))
    for i, ax in enumerate(axes.flat):
        if i >= len(names):
            ax.remove()
            continue
        own = table[table["layers"] == names[i]].sort_values("params")
        for family, look in looks.items():
            _correlation_line(ax, own[own["family"] == family], look, family)
        ax.axhline(0, **_GREY)
        ax.set_ylim(-1.03, 1.03)
        style.bits_axis(ax, table["params"].tolist())
        ax.set_title(names[i])
        ax.set_xlabel("Parameters" if i + columns >= len(names) else "")
        ax.set_ylabel("Spearman's rank correlation" if i % columns == 0 else "")
    legend(fig, axes, [style.family_name(f) for f in looks], "Family")
    style.finish(fig, "Do weights foretell large activations?", _notes(_CORRELATED, table, study))
    return fig


@style.styled
def draw_emergence(table: pd.DataFrame, *, study: str | None = None) -> Figure | None:
    """Draw the shares of layers and positions that outlier features affect, against parameters and against the loss.

    Open markers on a dashed line are the dimension that is large at most positions, an outlier feature or not. None,
    with the reason logged, where nothing was measured.

    Args:
        table: ``analysis.outliers.Outliers.emergence`` of one text set.
        study: its name, for the notes.
    """
    if not len(table):
        log.warning("no figure of outlier features: none was measured")
        return None
    against = [("params", "Parameters"), ("loss", "Loss of the 16-bit model (nats/token)")]
    against = [(name, label) for name, label in against if table[name].notna().any()]
    if not against:
        log.warning("no figure of outlier features: neither parameters nor losses are known")
        return None
    looks = _looks(table)
    fig, axes = canvas(len(_SHARES), len(against), (3.3 * len(against) + 1.4, 5.0))
    for row, (share, (title, least)) in zip(axes, _SHARES.items(), strict=True):
        for ax, (name, label) in zip(row, against, strict=True):
            for family, look in looks.items():
                own = table[table["family"] == family].dropna(subset=[name]).sort_values(name)
                _share_line(ax, own, name, share, look)
            ax.axhline(100 * least, **_GREY)
            ax.set_ylim(-4, 104)
            if name == "params":
                style.bits_axis(ax, table[name].tolist())
            elif ax.get_xlim()[0] < ax.get_xlim()[1]:
                ax.invert_xaxis()  # better models to the right, as larger ones
            ax.set_xlabel(label if share == "positions" else "")
            ax.set_title(title)
        row[0].set_ylabel("Affected (%)")
    legend(fig, axes, [style.family_name(f) for f in looks], "Family")
    style.finish(fig, "Emergence of outlier features", _notes(_EMERGED, table, study))
    return fig


def _correlation_line(ax: Axes, own: pd.DataFrame, look: Look, family: str) -> None:
    own = own.dropna(subset=["params", "correlation"])
    if not len(own):
        return
    x, y = own["params"].to_numpy(float), own["correlation"].to_numpy(float)
    for at, of_blocks in zip(x, own["of_blocks"], strict=True):
        ax.plot([at] * len(of_blocks), of_blocks, ".", color=look.colour, markersize=3.5, alpha=0.45, zorder=2)
    ax.plot(x, y, color=look.colour, marker=look.marker, label=style.family_name(family), zorder=3)
    known = own["low"].notna().to_numpy()
    below, above = (y - own["low"].to_numpy(float))[known], (own["high"].to_numpy(float) - y)[known]
    ax.errorbar(x[known], y[known], yerr=[below, above], ecolor=look.colour, **_BARS)


def _share_line(ax: Axes, own: pd.DataFrame, against: str, share: str, look: Look) -> None:
    if not len(own):
        return
    x, y = own[against].to_numpy(float), 100 * own[share].to_numpy(float)
    widest = 100 * own[f"widest_{share}"].to_numpy(float)
    edge: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": look.colour, "linestyle": (0, (2, 2))}
    ax.plot(x, widest, color=look.colour, marker=look.marker, linewidth=0.9, **edge)
    ax.plot(x, y, color=look.colour, marker=look.marker, label=style.family_name(str(own["family"].iloc[0])), zorder=3)
    error = 100 * np.nan_to_num(own[f"{share}_stderr"].to_numpy(float))
    shown = error > 0
    ax.errorbar(x[shown], y[shown], yerr=error[shown], ecolor=look.colour, **_BARS)


def _looks(table: pd.DataFrame) -> dict[str, Look]:
    families = table["family"].astype(str).unique().tolist()
    return {f: Look(_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, f in enumerate(families)}


def layer_order(table: pd.DataFrame) -> list[str]:
    """Return the kinds of layers of ``analysis.outliers.Outliers.correlations`` in the order of Table 2."""
    order = list(SPREAD_PAIRS.values())
    first = table.drop_duplicates("layers")
    place = [order.index(pair) for pair in zip(first["weights"], first["reads"], strict=True)]
    # The control comes before other activations.
    ordered = first.assign(_place=place).sort_values(["_place", "is_control"], ascending=[True, False])
    return ordered["layers"].astype(str).tolist()


def _notes(said: str, table: pd.DataFrame, study: str | None) -> str:
    text = f"Text: {table['eval'].iloc[0].removesuffix('_outliers')}."
    return " ".join([said, text, *([f"Study: {study}."] if study else [])])
