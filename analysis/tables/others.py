"""The cells that have no place in a table by bits and data type: a line each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pandas as pd

from analysis.cells import WHOLE_TENSOR, block_name, measured, numbers, points
from analysis.metrics import Metric, parse_metric
from analysis.tables.by_bits import FIELDS, tabled
from analysis.tables.text import pipe_table, print_whole, value_text
from kbit.specs.base import BASELINE_BITS

if TYPE_CHECKING:
    from rich.console import Console

_OTHER: Final = ("model", "method", "label", "bits_per_param", *FIELDS)


def other_cells(df: pd.DataFrame, *, metric: Metric | str, blocksize: int | None = 64) -> pd.DataFrame:
    """Return the quantized cells with a value of a metric that ``bits_by_dtype`` has no place for.

    They are of other methods, block sizes or options, or floats with another number of exponent bits.

    Args:
        df: a wide result table.
        metric: a metric or its column.
        blocksize: of the table: values a block; None for the whole tensor.

    Returns:
        A row each, models by family and size, of each the most bits first: model, method, label, bits_per_param (as
        stored; the nominal count where that is unknown), value and stderr (float64), diverged (bool).

    Raises:
        ValueError: ``metric`` isn't a metric's name.
    """
    metric = parse_metric(metric, df) if isinstance(metric, str) else metric
    rows = measured(df)
    bits = numbers(rows, "bits")
    cells = points(rows[bits.notna() & (bits != BASELINE_BITS)], metric)
    cells = cells[~cells["key"].isin(tabled(rows, metric, blocksize)["key"])]
    about = rows.reindex(columns=["key", "label", "bits_per_param"]).rename(columns={"bits_per_param": "stored"})
    cells = cells.merge(about, on="key", how="left")
    cells["bits_per_param"] = numbers(cells, "stored").fillna(cells["bits_per_param"])
    order = ["family", "params", "model", "bits_per_param"]
    cells = cells.sort_values(order, ascending=[True, True, True, False], kind="stable")
    return cells[list(_OTHER)].reset_index(drop=True)


def others_text(others: pd.DataFrame, *, blocksize: int | None = 64) -> str:
    """Say of ``other_cells`` how many of which methods they are, and why a table by bits lacks them; '' for none."""
    if others.empty:
        return ""
    counts = ", ".join(f"{n} of {method}" for method, n in others["method"].value_counts(sort=False).items())
    what = "1 cell is" if len(others) == 1 else f"{len(others)} cells are"
    block = block_name(blocksize or WHOLE_TENSOR)
    return f"{what} not in this table of plain block-wise cells at block size {block}: {counts}."


def others_markdown(others: pd.DataFrame, *, metric: Metric | str, blocksize: int | None = 64) -> str:
    """``other_cells`` as a Markdown table by label, with stored bits per parameter."""
    metric = parse_metric(metric) if isinstance(metric, str) else metric
    return f"{others_text(others, blocksize=blocksize)}\n\n" + pipe_table(
        _by_label(metric), _lines(others, metric), numeric_from=2
    )


def render_others(others: pd.DataFrame, console: Console, *, metric: Metric | str) -> None:
    """Prints ``other_cells``, a line a cell."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    metric = parse_metric(metric) if isinstance(metric, str) else metric
    grid = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(_by_label(metric)):
        grid.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
    for line in _lines(others, metric):
        grid.add_row(*map(Text, line))
    print_whole(grid, console)


def _by_label(metric: Metric) -> list[str]:
    return ["model", "cell", "bits per parameter", metric.label]


def _lines(others: pd.DataFrame, metric: Metric) -> list[list[str]]:
    """Text of ``other_cells``, row by row."""
    return [
        [
            *(str(r[name]) for name in ("model", "label")),
            f"{r['bits_per_param']:.3f}",
            value_text(r["value"], r["stderr"], r["diverged"], decimals=metric.decimals),
        ]
        for r in others.to_dict("records")
    ]
