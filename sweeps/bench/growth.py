"""Draw how a study's steps grow with its measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sweeps.bench.measuring import Took

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES: Final = (".svg", ".png", ".pdf")
_MARKERS: Final = "os^vDP*Xd<>hp"


def draw(found: Mapping[int, Mapping[str, Took]], path: Path) -> None:
    """Write a figure of CPU seconds and peak memory by measurements, both on logarithmic scales.

    Args:
        found: what each step took, by measurements.
        path: a file whose suffix is one of ``SUFFIXES``.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis.figures.style import RC

    with mpl.rc_context(RC):
        figure = Figure(figsize=(9.0, 4.2), layout="constrained")
        seconds, memory = figure.subplots(1, 2)
        _curves(seconds, found, lambda took: took.cpu)
        _curves(memory, found, lambda took: took.peak / 1e6)
        seconds.set(ylabel="CPU seconds of the process", title="Time")
        memory.set(ylabel="peak memory, MB", title="Memory")
        sizes = sorted(found)
        least = min(took.cpu for took in found[sizes[0]].values())
        proportional = [least * size / sizes[0] for size in sizes]
        seconds.plot(sizes, proportional, color="#999999", linestyle=":", label="in proportion")
        handles, labels = seconds.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _curves(axes: Axes, found: Mapping[int, Mapping[str, Took]], value: Callable[[Took], float]) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    sizes = sorted(found)
    for marker, name in zip(_MARKERS, found[sizes[0]], strict=False):
        axes.plot(sizes, [value(found[size][name]) for size in sizes], marker=marker, label=name)
    axes.set(xscale="log", yscale="log", xlabel="measurements")
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        # Matplotlib's own powers of ten take fonts of mathematics, and warn of each that an installation lacks.
        axis.set_major_formatter(lambda number, _: f"{number:,.6g}")
