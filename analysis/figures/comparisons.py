"""Comparisons at one precision: data types, block sizes and methods over model sizes (Figures 3, 8 to 11, 14, 15)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from analysis.cells import (
    WHOLE_TENSOR,
    block_name,
    fullest_dtype,
    numbers,
    one_exponent,
    ordered_dtypes,
    points,
    with_baseline,
)
from analysis.figures import style
from analysis.figures.chart import Chart
from analysis.figures.results import HELD, NoFigureError, Results, SamplesByCell, block_text, held
from analysis.figures.showing import shown
from analysis.metrics import Metric
from analysis.replicates import pooled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FROM_16_BIT: Final = "Change from 16-bit"
_MOST_PANELS: Final = 4


def data_types(
    df: pd.DataFrame,
    metric: Metric,
    *,
    bits: int = 4,
    blocksize: int | None = None,
    sweep: str | None = None,
    samples: SamplesByCell | None = None,
) -> Figure | None:
    """Draw data types at one precision over model sizes, and their change from 16-bit, per family (Figures 3, 14).

    None, with the reason logged, where there are fewer than two data types at one block size. ``blocksize`` (0: the
    whole tensor) None takes the one at which most can be compared.
    """
    results = Results(df=df, metrics=[metric], sweep=sweep, samples=samples, bits=bits, blocksize=blocksize)
    return shown(data_types_chart, results)


def data_types_chart(results: Results) -> Chart:
    """Return the chart of data types at the bits and block size given, or at those with the most to compare.

    Raises:
        NoFigureError: fewer than two data types there.
    """
    names = ["bits", "blocksize"]
    cells = held(results.at(results.plain(), *names), names, over="dtype")
    cells = one_exponent(cells, ["family", "dtype", "bits"])
    dtypes = ordered_dtypes(cells)
    if len(dtypes) < 2:
        found = " and ".join(dtypes) or "no data type"
        raise NoFigureError(f"no figure of data types: {_where(results, cells)}, {found} has {results.metric.column}")
    bits, blocksize = int(cells["bits"].iloc[0]), int(cells["blocksize"].iloc[0])
    cells = with_baseline(cells, results.base)
    return Chart(
        results=results,
        cells=cells.assign(panel=cells["family"].map(style.family_name), curve=cells["dtype"]),
        looks={d: style.dtype_style(d) for d in dtypes},
        title=f"Data types at {bits} bits: {results.metric.phrase} ({block_text(blocksize)})",
        legend="Data type",
        changes=FROM_16_BIT,
        side="Data type",
    )


def block_sizes(
    df: pd.DataFrame,
    metric: Metric,
    *,
    bits: int = 4,
    dtype: str | None = None,
    sweep: str | None = None,
    samples: SamplesByCell | None = None,
) -> Figure | None:
    """Draw block sizes at one precision over model sizes, and their change from 16-bit (Figures 3 and 15).

    A column a family and data type; with more than four, those of the data type with the most block sizes. None, with
    the reason logged, where no data type has two block sizes.
    """
    results = Results(df=df, metrics=[metric], sweep=sweep, samples=samples, bits=bits, dtype=dtype)
    return shown(block_sizes_chart, results)


def block_sizes_chart(results: Results) -> Chart:
    """Return the chart of block sizes at the bits given, or at those with the most to compare.

    Raises:
        NoFigureError: no data type has two block sizes there.
    """
    cells = held(results.at(results.plain(), "bits", "dtype"), ["bits"], over="blocksize")
    cells = one_exponent(cells, ["family", "dtype", "bits"], axis="blocksize")
    cells = cells[cells.groupby(["family", "dtype"])["blocksize"].transform("nunique") > 1]
    if cells.empty:
        where = "" if results.bits is None else f" at {results.bits} bits"
        raise NoFigureError(f"no figure of block sizes: no data type{where} has {results.metric.column} at two of them")
    if len(cells.drop_duplicates(["family", "dtype"])) > _MOST_PANELS:
        cells = cells[cells["dtype"] == fullest_dtype(cells, "blocksize")]
    groups = [(f, d) for f in dict.fromkeys(cells["family"]) for d in ordered_dtypes(cells[cells["family"] == f])]
    cells = pd.concat(
        [
            cells[(cells["family"] == f) & (cells["dtype"] == d)].assign(panel=f"{style.family_name(f)}, {d}")
            for f, d in groups
        ]
    )
    looks = block_looks(cells["blocksize"])
    return Chart(
        results=results,
        cells=with_baseline(cells.assign(curve=cells["blocksize"].map(block_name)), results.base),
        looks=looks,
        title=f"Block sizes at {int(cells['bits'].iloc[0])} bits: {results.metric.phrase}",
        legend="Block size",
        changes=FROM_16_BIT,
        side="Block size",
    )


def block_looks(blocksizes: pd.Series[int]) -> Mapping[str, style.Look]:
    """Looks by name of block sizes, from small to the whole tensor."""
    sizes = sorted(blocksizes.unique(), key=lambda b: b if b != WHOLE_TENSOR else np.inf)
    return dict(zip(map(block_name, sizes), style.ordinal_styles(len(sizes)), strict=True))


def methods(
    df: pd.DataFrame,
    metric: Metric,
    *,
    bits: int = 4,
    blocksize: int | None = None,
    sweep: str | None = None,
    samples: SamplesByCell | None = None,
) -> Figure | None:
    """Draw methods at one precision over model sizes, and their change from 16-bit, per family.

    All with one block size and one data type: those with the most methods. Methods without such a cell (formats with
    scales of their own have no data type) are named below it; ``formats`` draws them all. Replicates, which differ in
    the seed of their calibration data, are one point with their spread. None, with the reason logged, for fewer than
    two methods.
    """
    results = Results(df=df, metrics=[metric], sweep=sweep, samples=samples, bits=bits, blocksize=blocksize)
    return shown(methods_chart, results)


def methods_chart(results: Results) -> Chart:
    """Return the chart of methods at the bits and block size given, or at those with the most to compare.

    Raises:
        NoFigureError: fewer than two methods there.
    """
    metric, rows = results.metric, results.rows
    all_cells = results.plain(every_method=True).dropna(subset=["dtype"])
    cells = held(results.at(all_cells, *HELD), HELD, over="method")
    bits = int(cells["bits"].iloc[0]) if len(cells) else results.bits
    at_bits = rows[numbers(rows, "bits") == bits] if bits else rows[numbers(rows, "bits").notna()]
    others = sorted({*points(at_bits, metric)["method"]} - {*cells["method"], "baseline"})
    apart = f"Not drawn, without such a cell: {', '.join(others)}." if others else ""
    cells = one_exponent(cells, ["family", "dtype", "bits"], axis="method")
    found = list(dict.fromkeys(sorted(cells["method"], key=lambda m: (m != "blockwise", m))))
    if len(found) < 2:
        named = " and ".join(found) or "no method"
        text = f"no figure of methods: {_where(results, cells)}, {named} has {metric.column}"
        raise NoFigureError(text + (f". {apart}" if apart else ""))
    cells = pooled(cells, rows)
    cells = with_baseline(cells, results.base)
    block = block_text(int(cells["blocksize"].iloc[0]))
    return Chart(
        results=results,
        cells=cells.assign(panel=cells["family"].map(style.family_name), curve=cells["method"]),
        looks=dict(zip(found, style.ordinal_styles(len(found)), strict=True)),
        title=f"Methods at {bits} bits: {metric.phrase} ({cells['dtype'].iloc[0]}, {block})",
        legend="Method",
        changes=FROM_16_BIT,
        side="Method",
        notes=apart,
    )


def _where(results: Results, cells: pd.DataFrame) -> str:
    """'at 4 bits and block size 64': of the cells there are, else what was asked for."""
    bits, blocksize = results.bits, results.blocksize
    if len(cells):
        bits, blocksize = int(cells["bits"].iloc[0]), int(cells["blocksize"].iloc[0])
    parts = [f"{bits} bits"] * (bits is not None) + ([block_text(blocksize)] if blocksize is not None else [])
    return "at " + " and ".join(parts) if parts else "anywhere"
