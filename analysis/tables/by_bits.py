"""A metric by model, bits and data type: for terminal and Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from analysis.cells import (
    WHOLE_TENSOR,
    baselines,
    block_name,
    measured,
    numbers,
    one_exponent,
    ordered_dtypes,
    plain,
    points,
)
from analysis.metrics import Metric, parse_metric
from analysis.tables.text import pipe_table, print_whole, value_text
from kbit.specs.base import BASELINE_BITS, ROW

if TYPE_CHECKING:
    from rich.console import Console

FIELDS: Final = ("value", "stderr", "diverged")
USUAL_BLOCK: Final = 64


def bits_by_dtype(df: pd.DataFrame, *, metric: Metric | str, blocksize: int | None = 64) -> pd.DataFrame:
    """Tabulate a metric by model, bits and data type, of plain cells at one block size and the 16-bit baseline.

    Floats have one number of exponent bits per family and precision (``cells.one_exponent``).

    Args:
        df: a wide result table.
        metric: a metric or its column.
        blocksize: values a block; None for the whole tensor, ``ROW`` for whole rows.

    Returns:
        Index (model, bits): models by family and size, 16 bits first, then 8 down to 3. Columns (data type, field) with
        fields 'value' and 'stderr' (float64) and 'diverged' (bool). The baseline has no data type, so its value stands
        under each. Missing cells are NaN, diverged ones without a finite value infinite. Without rows where nothing was
        measured; a table of baselines has the one data type '16-bit'.

    Raises:
        ValueError: ``metric`` isn't a metric's name.
    """
    metric = parse_metric(metric, df) if isinstance(metric, str) else metric
    rows = measured(df)
    cells = tabled(rows, metric, blocksize)
    base = points(baselines(rows), metric)
    dtypes = ordered_dtypes(cells) or ["16-bit"]
    spread = pd.concat([base.assign(dtype=d) for d in dtypes])
    both = pd.concat([c for c in (spread, cells) if len(c)]) if len(spread) + len(cells) else cells
    both = both.sort_values(["family", "params", "model", "bits"], ascending=[True, True, True, False], kind="stable")
    values = {(r.model, r.bits, r.dtype): (r.value, r.stderr, r.diverged) for r in both.itertuples()}
    index = pd.MultiIndex.from_tuples(
        list(dict.fromkeys(zip(both["model"], both["bits"], strict=True))), names=["model", "bits"]
    )
    blank = (np.nan, np.nan, False)
    data = [[x for d in dtypes for x in values.get((*row, d), blank)] for row in index]
    columns = pd.MultiIndex.from_product([dtypes, FIELDS], names=["dtype", "field"])
    kinds = {(d, f): "bool" if f == "diverged" else "float64" for d in dtypes for f in FIELDS}
    table = pd.DataFrame(data, index=index, columns=columns).astype(kinds)
    floats = cells.dropna(subset=["exponent_bits"]).sort_values("family", kind="stable")
    table.attrs["exponent_bits"] = {(r.dtype, (r.model, r.bits)): r.exponent_bits for r in floats.itertuples()}
    return table


def block_sizes_held(df: pd.DataFrame, *, metric: Metric | str) -> list[int | None]:
    """Return the block sizes of plain cells with a value of a metric, those of the most cells first; None is the whole
    tensor.

    Of equals 64 comes first, then the smaller. A table without any has [64].
    """
    metric = parse_metric(metric, df) if isinstance(metric, str) else metric
    rows = measured(df)
    cells = points(pd.concat([plain(rows), plain(_of_rows(rows))]), metric)
    counts = cells.drop_duplicates(["model", "dtype", "bits", "blocksize"])["blocksize"].value_counts()
    order = sorted(counts.index, key=lambda b: (-counts[b], b != USUAL_BLOCK, b <= WHOLE_TENSOR, b))
    return [None if b == WHOLE_TENSOR else int(b) for b in order] or [USUAL_BLOCK]


def to_markdown(table: pd.DataFrame, *, metric: Metric | str, blocksize: int | str | None = "") -> str:
    """``bits_by_dtype`` as a Markdown table: value ± standard error, the best of each row in bold.

    Args:
        table: of ``bits_by_dtype``.
        metric: its metric.
        blocksize: of the table, to be said above it; '' says none.
    """
    metric = parse_metric(metric) if isinstance(metric, str) else metric
    rows = [
        [model, str(bits), *(f"**{text}**" if best else text for text, best in cells)]
        for (model, bits), cells in _formatted(table, metric)
    ]
    block = "" if isinstance(blocksize, str) else f"Block size {block_name(blocksize or WHOLE_TENSOR)}. "
    return f"{block}{_caption(metric)}\n\n" + pipe_table(["model", "bits", *_heads(table)], rows, numeric_from=1)


def render(table: pd.DataFrame, console: Console, *, metric: Metric | str, blocksize: int | None = 64) -> None:
    """Prints ``bits_by_dtype``: value ± standard error, the best of each row in bold, a section a model."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    metric = parse_metric(metric) if isinstance(metric, str) else metric
    title = f"{metric.label}, block size {block_name(blocksize or WHOLE_TENSOR)}"
    grid = Table(title=title, caption=_caption(metric), box=box.SIMPLE_HEAD)
    grid.add_column("model", no_wrap=True)
    for name in ("bits", *_heads(table)):
        grid.add_column(name, justify="right", no_wrap=True)
    last = None
    for (model, bits), cells in _formatted(table, metric):
        if last is not None and model != last:
            grid.add_section()
        texts = [Text(text, style="bold" if best else "") for text, best in cells]
        grid.add_row("" if model == last else model, str(bits), *texts)
        last = model
    print_whole(grid, console)


def tabled(rows: pd.DataFrame, metric: Metric, blocksize: int | None) -> pd.DataFrame:
    """Return the points among ``measured`` rows that a table by bits and data type holds."""
    cells = plain(_of_rows(rows) if blocksize == ROW else rows)
    cells = points(cells[cells["blocksize"] == (blocksize or WHOLE_TENSOR)], metric)
    return one_exponent(cells, ["family", "dtype", "bits"])


def _of_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the cells whose blocks are whole rows, as if they were of the flattened tensor, to be compared alike."""
    return rows[numbers(rows, "blocksize") == ROW].assign(scheme="block")


def _heads(table: pd.DataFrame) -> list[str]:
    """Return names of data types; floats with their exponent bits, where all of a column have as many."""
    exponents = table.attrs.get("exponent_bits", {})
    found = {d: {e for (of, _), e in exponents.items() if of == d} for d in _dtypes(table)}
    return [f"{d} e{next(iter(e)):.0f}" if len(e) == 1 else d for d, e in found.items()]


def _dtypes(table: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(table.columns.get_level_values("dtype")))


def _formatted(table: pd.DataFrame, metric: Metric) -> Iterator[tuple[tuple[str, int], list[tuple[str, bool]]]]:
    """Row by row: (model, bits), then text and whether it is the best, by data type. Baselines have no best."""
    dtypes, exponents = _dtypes(table), table.attrs.get("exponent_bits", {})
    for row in table.itertuples():
        model, bits = row[0]
        fields: list[tuple[float, float, bool]] = [row[1 + 3 * i : 4 + 3 * i] for i in range(len(dtypes))]
        finite = [v for v, _, diverged in fields if np.isfinite(v) and not diverged]
        several = {d for d, head in zip(dtypes, _heads(table), strict=True) if d == head}
        marks = [f" e{e:.0f}" if d in several and (e := exponents.get((d, (model, bits)))) else "" for d in dtypes]
        ranked = metric.higher_is_better is not None and len(finite) > 1 and bits != BASELINE_BITS
        best = min(finite, key=lambda value: metric.sign * value) if ranked else None
        texts = [value_text(*f, decimals=metric.decimals) for f in fields]
        yield (model, bits), [(t + m, f[0] == best) for t, m, f in zip(texts, marks, fields, strict=True)]


def _caption(metric: Metric) -> str:
    better, bold = "not ranked", ""
    if metric.higher_is_better is not None:
        better, bold = f"{'higher' if metric.higher_is_better else 'lower'} is better", " bold: best of its row;"
    return f"{metric.label}, {better}; ± standard error;{bold} e2: exponent bits; †: diverged; -: not measured."
