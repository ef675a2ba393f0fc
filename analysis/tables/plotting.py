"""A pivot as lines, on matplotlib axes of one's own or new ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from analysis.figures.style import RC, dtype_style, ordinal_styles
from analysis.tables.choosing import unknown_name
from analysis.tables.pivoting import PIVOT_FIELDS, metric_of, value_columns
from kbit.errors import SpecError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_ONE_COLUMN: Final = 8


def plot(table: pd.DataFrame, *, metric: str | None = None, x: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw a metric of a pivot: an axis of its rows along the horizontal axis, a line for each of the rest.

    Bars are ± 1 standard error. A value that diverged without a number is left out, and the legend says how many.

    Args:
        table: of ``pivot``.
        metric: its name in the columns; the first by default.
        x: the axis of the rows; by default the last that ``pivot`` was asked for.
        ax: where to draw; by default a new figure's.

    Returns:
        The axes, to change and to save (``ax.figure.savefig``).

    Raises:
        SpecError: no such metric or axis in the table.
    """
    import matplotlib.pyplot as plt
    from matplotlib import rc_context

    known = list(dict.fromkeys(table.columns.get_level_values("metric")))
    if not known or (metric is not None and metric not in known):
        raise SpecError("metric", metric, unknown_name(str(metric), known, "a metric of this table"))
    about = metric_of(table, metric or known[0])
    axes = [str(name) for name in table.index.names]
    along = x or ([name for name in table.attrs.get("by", []) if name in axes] or axes)[-1]
    if along not in axes:
        raise SpecError("x", x, unknown_name(along, axes, "an axis of the table's rows"))
    lines = _lines(table, metric or known[0], axes.index(along))
    points = list(dict.fromkeys(p for line in lines.values() for p in line["x"]))
    numeric = all(isinstance(p, int | float | np.number) for p in points)
    places = {p: float(p) if numeric else float(i) for i, p in enumerate(points)}
    by_dtype = list(table.columns.names[1:-1]) == ["dtype"] and len(table.index.names) == 1
    with rc_context(RC):
        ax = ax if ax is not None else plt.subplots(figsize=(5.2, 3.6), layout="constrained")[1]
        for (name, line), style in zip(lines.items(), ordinal_styles(len(lines)), strict=True):
            colour, marker, _ = dtype_style(name.split(" ")[0]) if by_dtype else style
            shown, lost = line[np.isfinite(line["value"])], int(np.isinf(line["value"]).sum())
            ax.errorbar(
                [places[p] for p in shown["x"]],
                shown["value"],
                yerr=shown["stderr"].fillna(0.0),
                color=colour,
                marker=marker,
                label=f"{name} ({lost} diverged)" if lost else name,
                capsize=2,
            )
        if numeric and len(points) > 2 and min(places.values()) > 0 and max(places.values()) / min(places.values()) > 8:
            ax.set_xscale("log", base=2)
            ax.minorticks_off()
        ax.set_xticks(list(places.values()), [str(p) for p in places])
        ax.set_xlabel(along)
        ax.set_ylabel(about.label)
        if any(lines):
            ax.legend(fontsize=7, ncols=1 if len(lines) <= _ONE_COLUMN else 2)
    return ax


def _lines(table: pd.DataFrame, metric: str, along: int) -> dict[str, pd.DataFrame]:
    """Return x, value and stderr by line: of the other axes' values."""
    found: dict[str, list[tuple[object, float, float]]] = {}
    rows = [row if isinstance(row, tuple) else (row,) for row in table.index]
    for group in [g for g in value_columns(table) if g[0] == metric]:
        values, errors = (table[(*group, field)].tolist() for field in PIVOT_FIELDS[:2])
        for row, value, error in zip(rows, values, errors, strict=True):
            others = [(n, v) for i, (n, v) in enumerate(zip(table.index.names, row, strict=True)) if i != along]
            parts = [*others, *zip(table.columns.names[1:-1], group[1:], strict=True)]
            name = " ".join(_said(str(n), v) for n, v in parts if str(v))
            if not np.isnan(value):
                found.setdefault(name, []).append((row[along], value, error))
    return {name: pd.DataFrame(points, columns=["x", "value", "stderr"]) for name, points in found.items()}


def _said(axis: str, value: object) -> str:
    """Return a value, with the name of its axis where it is a number."""
    return f"{axis} {value}" if isinstance(value, int | float | np.number) else str(value)
