"""Comparisons in the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from rich.console import Console


def render_comparison(found: pd.DataFrame, console: Console) -> None:
    """Print a table of ``compare_cells``: a row a metric.

    Args:
        found: the table.
        console: of rich.
    """
    from rich.table import Table

    from analysis.tables.text import print_whole

    if not len(found):
        console.print("nothing to compare: no metric that can be ranked is measured of both")
        return
    table = Table(box=None)
    for name in ("metric", "a", "b", "a - b (95 % CI)", "p", "n", "could show", "verdict"):
        table.add_column(name, no_wrap=True)
    for row in found.to_dict("records"):
        table.add_row(*_cells(row))
    print_whole(table, console)
    for row in found.to_dict("records"):
        console.print(_notes(row), style="dim", markup=False, highlight=False, soft_wrap=True)
    console.print(
        "p is adjusted for the number of rows (Benjamini and Hochberg). 'could show': the smallest true difference "
        "that would be found four times in five. 'alike': within the margin.",
        style="dim",
        highlight=False,
    )


def _cells(row: Mapping[Any, Any]) -> list[str]:
    interval = "" if math.isnan(row["low"]) else f" ({_number(row['low'])} to {_number(row['high'])})"
    return [
        f"{row['eval'] or 'zero-shot mean'} {row['metric']}",
        f"{row['a']:.4f}",
        f"{row['b']:.4f}",
        f"{_number(row['difference'])}{interval}",
        "-" if math.isnan(row["p_adjusted"]) else f"{row['p_adjusted']:.2g}",
        f"{row['n']:,} {row['over']}" if not math.isnan(row["low"]) else "-",
        "-" if math.isnan(row["detectable"]) else f"{row['detectable']:.4f}",
        str(row["verdict"]),
    ]


def _notes(row: Mapping[Any, Any]) -> str:
    """How it was tested, and of accuracies their own intervals: they tell what few documents are worth."""
    own = [
        f"{side} {row[side]:.3f} ({row[f'{side}_low']:.3f} to {row[f'{side}_high']:.3f})"
        for side in ("a", "b")
        if not math.isnan(row[f"{side}_low"])
    ]
    return "; ".join([f"{row['eval'] or 'mean'} {row['metric']}: {row['test']}", *own])


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.4f}"
