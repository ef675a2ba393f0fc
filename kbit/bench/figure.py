"""The roofline as a figure: what is reached below the measured roofs, and how many times as fast as 16 bits it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kbit.bench.matmul import limit
from kbit.bench.roofline import Roofline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The look of the study's figures, which kbit may not import; a test holds the two together.
BITS_STYLE: Final = {
    2: ("#8a7d00", "P"),
    3: ("#d55e00", "v"),
    4: ("#0072b2", "o"),
    5: ("#009e73", "s"),
    6: ("#e69f00", "^"),
    7: ("#cc79a7", "D"),
    8: ("#56b4e9", "p"),
    16: ("#000000", "X"),
}
INK: Final = "#444444"
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
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "savefig.dpi": 200,
    "svg.hashsalt": "kbit",
}
_LINE_HEIGHT: Final = 0.055
"""Of a label, as a share of the panel's height."""


def write_figure(roofline: Roofline, directory: Path) -> list[Path]:
    """Write roofline-NxK.png and .svg; make the directory. Returns both paths."""
    from matplotlib import rc_context

    directory.mkdir(parents=True, exist_ok=True)
    n, k = roofline.shape
    paths = [directory / f"roofline-{n}x{k}.{kind}" for kind in ("png", "svg")]
    with rc_context(RC):
        fig = draw(roofline)
        fig.savefig(paths[0])
        fig.savefig(paths[1], metadata={"Date": None})
    return paths


def draw(roofline: Roofline) -> Figure:
    """Left the roofline over arithmetic intensity, right the speedup over 16 bits by rows of x."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(8.6, 4.3))
    left, right = fig.subplots(1, 2, gridspec_kw={"width_ratios": (1, 0.85)})
    fig.subplots_adjust(left=0.075, right=0.93, top=0.85, bottom=0.205, wspace=0.2)
    _roofs(left, roofline)
    _speedups(right, roofline)
    n, k = roofline.shape
    fig.text(
        0.012,
        0.975,
        f"k-bit products below the measured roofs, W {n:,} x {k:,}",
        va="top",
        fontsize=10.5,
        fontweight="bold",
    )
    notes = (
        f"{roofline.device}. Float16 x; blocks of "
        f"{roofline.blocksize} with float16 absmax; 16-bit is cuBLAS. Bytes: W as it is stored, x and the product.\n"
        f"Medians of CUDA-graph replays, another copy of W each launch. Limits: 16 / (k + 16/{roofline.blocksize})."
    )
    fig.text(0.012, 0.02, notes, va="bottom", fontsize=7.5, color=INK, linespacing=1.35)
    return fig


def _roofs(ax: Axes, roofline: Roofline) -> None:
    c = roofline.ceilings
    ridge = c.flops / c.bandwidth
    points = [p.intensity for p in roofline.products]
    low, high = min(points) / 1.6, max(*points, ridge) * 2.2
    ax.plot([low, ridge, high], [low * c.bandwidth / 1e12, c.flops / 1e12, c.flops / 1e12], color=INK, linewidth=1.1)
    for bits in sorted(roofline.bits, reverse=True):
        colour, marker = BITS_STYLE[bits]
        line = [roofline.product(bits, rows) for rows in roofline.rows]
        ax.plot(
            [p.intensity for p in line],
            [p.flops / 1e12 for p in line],
            color=colour,
            marker=marker,
            linewidth=0.9,
            label="16-bit" if bits == 16 else f"{bits}-bit",
        )
    bottom = min(p.flops for p in roofline.products) / 1e12 / 1.7
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, c.flops / 1e12 * 2.0))
    _plain_ticks(ax)
    ax.annotate(
        f"{c.flops / 1e12:,.0f} TFLOP/s",
        (high, c.flops / 1e12),
        (-2, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=INK,
    )
    where = math.sqrt(low * ridge)
    ax.annotate(
        f"{c.bandwidth / 1e12:.2f} TB/s",
        (where, where * c.bandwidth / 1e12),
        (-7, 7),
        textcoords="offset points",
        ha="center",
        va="bottom",
        rotation=_slope(ax),
        rotation_mode="anchor",
        color=INK,
    )
    ends = {roofline.rows[-1]: ((-8, 3), "right"), roofline.rows[0]: ((7, -8), "left")}
    for rows, (offset, side) in ends.items():
        end = roofline.product(max(roofline.bits), rows)
        text = f"16-bit, {rows} row{'s' if rows > 1 else ''}"
        ax.annotate(text, (end.intensity, end.flops / 1e12), offset, textcoords="offset points", ha=side, color=INK)
    ax.legend(loc="lower right", frameon=False, fontsize=8.5, handlelength=1.6, labelspacing=0.35)
    ax.set_title("Reached, below the roofs")
    ax.set_xlabel("Arithmetic intensity (FLOP a byte moved)")
    ax.set_ylabel("TFLOP/s")


def _speedups(ax: Axes, roofline: Roofline) -> None:
    rows = roofline.rows
    kbits = [b for b in roofline.bits if b != 16]
    top = max(limit(b, roofline.blocksize) for b in kbits) * 1.06
    ax.set(xlim=(-0.6, len(rows) - 0.75), ylim=(0, top))
    beside = ax.get_yaxis_transform()  # x as a share of the panel's width
    ax.axhline(1, color=INK, linewidth=0.9)
    ax.text(0.09, 0.96, "16-bit (cuBLAS)", va="top", color=INK, transform=beside)
    ends = []
    for bits in kbits:
        colour, marker = BITS_STYLE[bits]
        line = [roofline.speedup(roofline.product(bits, m)) for m in rows]
        ax.plot(line, color=colour, marker=marker)
        bar = [limit(bits, roofline.blocksize)] * 2
        ax.plot([0, 0.045], bar, color=colour, linewidth=2.6, solid_capstyle="butt", transform=beside)
        ends.append(line[-1])
    for bits, end, y in zip(kbits, ends, spread(ends, _LINE_HEIGHT * top), strict=True):
        ax.annotate(
            f"{bits}-bit",
            (len(rows) - 1, end),
            (1.04, y),
            textcoords=beside,
            color=BITS_STYLE[bits][0],
            va="center",
            fontweight="bold",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": BITS_STYLE[bits][0], "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4},
        )
    ax.set_xticks(range(len(rows)), [str(m) for m in rows])
    ax.set_title("Times as fast as 16-bit (bars on the axis: limits)")
    ax.set_xlabel("Batch (rows of x)")


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Return the heights of labels for lines that end at ``values``: in order, ``gap`` apart, as near as possible."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups: list[tuple[float, int]] = []  # (middle, labels) of neighbours that had to move together
    for i in order:
        middle, count = values[i], 1
        while groups and middle - groups[-1][0] < gap * (count + groups[-1][1]) / 2:
            before, more = groups.pop()
            middle, count = (middle * count + before * more) / (count + more), count + more
        groups.append((middle, count))
    heights = [middle + (j - (count - 1) / 2) * gap for middle, count in groups for j in range(count)]
    return [heights[order.index(i)] for i in range(len(values))]


def _slope(ax: Axes) -> float:
    """Degrees of a line of slope 1 on two logarithmic axes."""
    (x0, y0), (x1, y1) = ax.transData.transform([(1.0, 1.0), (10.0, 10.0)])
    return math.degrees(math.atan2(y1 - y0, x1 - x0))


def _plain_ticks(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(10))
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.minorticks_off()
