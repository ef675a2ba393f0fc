"""Compression as a figure: where the bits are, and what each block's layers lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kbit.bench.figure import RC
from kbit.compression.measure import Compression, TensorReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#8a7d00", "#000000")
MARKERS: Final = ("o", "v", "s", "^", "D", "p", "P", "X")
_MOST_KINDS: Final = 8


def write_figure(found: Sequence[Compression], name: str, directory: Path) -> list[Path]:
    """Write compression.png and .svg; make the directory. Returns both paths."""
    from matplotlib import rc_context

    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"compression.{kind}" for kind in ("png", "svg")]
    with rc_context(RC):
        fig = draw(found, name)
        fig.savefig(paths[0])
        fig.savefig(paths[1], metadata={"Date": None})
    return paths


def draw(found: Sequence[Compression], name: str) -> Figure:
    """Draw a row per spec: the bits by kind of tensor, and the errors by block."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9.5, 2.9 * len(found) + 0.4), layout="constrained")
    fig.suptitle(name, x=0.01, ha="left", fontsize=10)
    axes = fig.subplots(len(found), 2, squeeze=False, width_ratios=(1, 1.25))
    for (bits, errors), compression in zip(axes, found, strict=True):
        _draw_bits(bits, compression)
        _draw_errors(errors, compression)
    return fig


def _draw_bits(ax: Axes, found: Compression) -> None:
    kinds = list(found.by_kind().items())
    shown, rest = kinds[:_MOST_KINDS], [t for _, tensors in kinds[_MOST_KINDS:] for t in tensors]
    rows = [*shown, *([("others", rest)] if rest else [])]
    megabytes = [sum(t.bits for t in tensors) / 8e6 for _, tensors in rows]
    colours = ["#0072b2" if tensors[0].quantized else "#b0b0b0" for _, tensors in rows]
    ax.barh(range(len(rows)), megabytes, color=colours)
    ax.set_yticks(range(len(rows)), [_short(kind) for kind, _ in rows])
    ax.invert_yaxis()
    for place, ((_, tensors), size) in enumerate(zip(rows, megabytes, strict=True)):
        per_weight = sum(t.bits for t in tensors) / sum(t.numel for t in tensors)
        ax.annotate(f" {per_weight:.2f} bits", (size, place), va="center", fontsize=7)
    ax.set_xlim(0, 1.25 * max(megabytes))
    ax.set_xlabel("MB (grey: kept at 16 bits)")
    ax.set_title(f"{found.label}: {found.bits_per_param:.2f} bits a quantized weight")


def _draw_errors(ax: Axes, found: Compression) -> None:
    from matplotlib.ticker import MaxNLocator

    kinds = [kind for kind in found.by_kind().items() if kind[1][0].quantized and kind[1][0].block is not None]
    for number, (kind, tensors) in enumerate(sorted(kinds)):  # in every row the same colours
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        values = [_error(t) for t in tensors]
        ax.plot([int(t.block or 0) for t in tensors], values, color=colour, marker=marker, label=_short(kind))
    ax.set_xlabel("block")
    of_outputs = any(t.output_error is not None for t in found.tensors)
    ax.set_ylabel("relative error of " + ("outputs" if of_outputs else "weights"))
    ax.set_ylim(0, 1.08 * ax.get_ylim()[1])  # room for the markers of values that are much alike
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if kinds:
        ax.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    else:
        ax.set_axis_off()


def _error(tensor: TensorReport) -> float:
    error = tensor.weight_error if tensor.output_error is None else tensor.output_error
    assert error is not None
    return error


def _short(kind: str) -> str:
    """The last two parts of a kind: those before are the same for all."""
    return ".".join(kind.split(".")[-2:]).removeprefix("*.")
