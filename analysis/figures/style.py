"""The style of every figure: colours, markers, names and axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, NamedTuple, ParamSpec, TypeVar

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RC: Final[Any] = {
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.title_fontsize": 8.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "savefig.dpi": 200,
    "svg.hashsalt": "kbit",  # the same data give the same SVG
}
INK: Final = "#444444"
PAGE_WIDTH: Final = {1: 3.25, 2: 6.75}
"""Inches of one and of two columns of a page of the paper's kind."""
PAGE_RC: Final[Any] = {
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "legend.fontsize": 6.5,
    "legend.title_fontsize": 6.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.6,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # text that can be searched and edited
    "grid.linewidth": 0.5,
}
"""What differs in print."""


class Look(NamedTuple):
    """How a curve is drawn: colour and marker, and the line's style."""

    colour: str
    marker: str
    line: Any = "-"


DASHED: Final = (0, (3.5, 1.6))
DOTTED: Final = (0, (1, 1.5))
REFERENCE: Final = Look("#8c8c8c", "x", DASHED)
"""Of a curve that is drawn for comparison."""

P = ParamSpec("P")
R = TypeVar("R")

# Okabe and Ito's palette, made to be told apart with any colour vision; markers differ too, for print in grey.
BITS_STYLE: Final = {
    2: Look("#8a7d00", "P"),
    3: Look("#d55e00", "v"),
    4: Look("#0072b2", "o"),
    5: Look("#009e73", "s"),
    6: Look("#e69f00", "^"),
    7: Look("#cc79a7", "D"),
    8: Look("#56b4e9", "p"),
    16: Look("#000000", "X"),
}
DTYPE_STYLE: Final = {
    "int": Look("#d55e00", "s"),
    "float": Look("#0072b2", "o"),
    "dynamic": Look("#cc79a7", "D"),
    "quantile": Look("#009e73", "^"),
    "normal": Look("#e69f00", "v"),
    "lloyd": Look("#56b4e9", "p"),
}
_MARKERS: Final = "os^Dvp<>hP"
_FAMILIES: Final = {
    "bloom": "BLOOM",
    "bloomz": "BLOOMZ",
    "gpt2": "GPT-2",
    "neox": "NeoX",
    "opt": "OPT",
    "pythia": "Pythia",
    "pythia-deduped": "Pythia (deduped)",
}


def rc(columns: int | None) -> Any:  # noqa: ANN401 - matplotlib types each of its keys
    """Return matplotlib's settings for a figure of so many columns (None: for the screen)."""
    return RC if columns is None else {**RC, **PAGE_RC}


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Make a function that draws or saves run under this module's settings; the caller's stay as they are."""

    @wraps(draw)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        from matplotlib import rc_context

        with rc_context(RC):
            return draw(*args, **kwargs)

    return run


def family_name(family: str) -> str:
    """'OPT' of 'opt', and of a part of a family, or of a checkpoint, likewise."""
    parts = family.split(": ")
    return ": ".join(_FAMILIES.get(part, part) for part in parts)


def bits_style(bits: int) -> Look:
    return BITS_STYLE.get(bits, Look(INK, "P"))


def dtype_style(dtype: str) -> Look:
    return DTYPE_STYLE.get(dtype, Look(INK, "P"))


def ordinal_styles(n: int) -> list[Look]:
    """Colours from dark to light along viridis (safe for colour vision, readable in grey) with markers [n]."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    # The light end is left out: yellow lines vanish on white.
    return [Look(to_hex(colormaps["viridis"](0.82 * i / max(1, n - 1))), _MARKERS[i % len(_MARKERS)]) for i in range(n)]


def bits_axis(ax: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis over total bits, with as many round ticks such as '20M' as its length has room for.

    Unknown (NaN) sizes are passed over; without a known one the axis stays as it is.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    known = [v for v in values if np.isfinite(v)]
    if not known:
        return
    ax.set_xscale("log")
    low, high = min(known), max(known)
    pad = max(high / low, 1.5) ** 0.09
    ax.set_xlim(low / pad, high * pad)
    figure = ax.get_figure(root=True)
    inches = ax.get_position().width * (figure.get_size_inches()[0] if figure else 6.0)
    ticks = _log_ticks(low / pad, high * pad, most=max(2, int(inches * 2)))
    if len(ticks) < 2:
        ticks = sorted({float(f"{x:.3g}") for x in (low, high)})
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _si(x)))


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between low and high: the finest of the series below with at most ``most``, but two at least."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks: list[float] = []
    fewest: list[float] = []
    for steps, every in (((1, 1.5, 2, 3, 5, 7), 1), ((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 3)):
        ticks = [s * 10.0**d for d in decades if d % every == 0 for s in steps if low <= s * 10.0**d <= high]
        if len(ticks) <= most:
            break
        fewest = ticks
    return ticks if len(ticks) > 1 else fewest


def _si(x: float) -> str:
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size * 0.999:
            return f"{x / size:g}{prefix}"
    return f"{x:g}"


def finish(fig: Figure, title: str, notes: str) -> None:
    """Title above and notes below the panels, wrapped, in strips of their own by which the figure grows."""
    from textwrap import wrap

    width, panels = (float(x) for x in fig.get_size_inches())
    heads, lines = wrap(title, int(width * 12)), wrap(notes, int(width * 17))
    top, bottom = 0.12 + 0.19 * len(heads), 0.1 + 0.145 * len(lines)
    height = panels + top + bottom
    fig.set_size_inches(width, height)
    engine: Any = fig.get_layout_engine()
    engine.set(rect=(0, bottom / height, 1, panels / height), w_pad=0.06, h_pad=0.05)
    fig.text(0.012, 1 - 0.08 / height, "\n".join(heads), va="top", fontsize=10.5, fontweight="bold")
    fig.text(0.012, 0.06 / height, "\n".join(lines), va="bottom", fontsize=7.5, color=INK)
