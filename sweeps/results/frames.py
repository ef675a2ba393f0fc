"""Joined rows as DataFrames: a row per measurement, or one per cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from sweeps.status import State
from sweeps.store.schema import cell_columns

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

ZERO_SHOT: Final = ("lambada_openai", "winogrande", "hellaswag", "piqa")
"""The paper's four tasks; zero_shot_mean is the mean of their accuracies (section 4)."""
# What a cell's row in the wide table says of the run, besides its metrics: summed, or the latest measurement's.
_SUM: Final = "seconds"
_MOST: Final = "peak_memory_bytes"
_LAST: Final = (
    *("compute_dtype", "commit", "dirty", "versions", "device", "kernel", "seed", "launch", "pack", "job", "host"),
)


def long_frame(rows: pa.Table) -> pd.DataFrame:
    """Return one row per measurement."""
    maps: dict[str, list[Any]] = {name: _mappings(rows, name) for name in ("metrics", "stderr")}
    # Parquet can't hold a column of empty mappings.
    maps["higher_is_better"] = [found or None for found in _mappings(rows, "higher_is_better")]
    frame = _frame(rows.drop_columns(list(maps)))
    for name, values in maps.items():
        frame[name] = np.fromiter(values, dtype=object, count=len(values))
    return frame[list(rows.schema.names)]


def wide_frame(rows: pa.Table) -> pd.DataFrame:
    """Return one row per cell, in order of the cells' first rows, with columns for the metrics of each evaluation."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.compute as pc

    codes = rows.column("key").combine_chunks().dictionary_encode()
    cell: NDArray[np.int64] = codes.indices.to_numpy().astype(np.int64)
    count = len(codes.dictionary)
    is_finished = pc.is_valid(rows.column("finished")).to_numpy()
    finished = pc.fill_null(rows.column("finished").cast(pa.int64()), 0).to_numpy()
    # A measured row knows more of the cell (its counted bits) than a planned one.
    best = _first(cell, ~pc.is_valid(rows.column("total_bits")).to_numpy())
    last = _first(cell, ~is_finished, -finished)
    has_finished = is_finished[last]
    last = np.where(has_finished, last, best)
    of_best = _frame(rows.select([*cell_columns(), "sweep"]).take(pa.array(best)))
    of_last = _frame(rows.select([*_LAST, "finished"]).take(pa.array(last)))
    order = {state.value: rank for rank, state in enumerate(State)}
    ranks = np.full(count, len(order))
    statuses = rows.column("status").to_pylist()
    np.minimum.at(ranks, cell, np.array([order[s] for s in statuses], dtype=ranks.dtype))
    states = list(order)
    fixed = {
        cell_columns()[0]: of_best[cell_columns()[0]],
        "sweep": of_best["sweep"],
        "status": pd.Series([states[rank] for rank in ranks], dtype="str"),
        **{name: of_best[name] for name in cell_columns()[1:]},
    }
    ends = {
        _SUM: _sums(rows, cell, count, is_finished),
        _MOST: _most(rows, cell, count, is_finished),
        "finished": of_last["finished"],
        **{name: of_last[name] for name in _LAST},
        "error_type": _errors(rows, cell, count, statuses),
    }
    return pd.DataFrame({**fixed, **_metric_columns(rows, cell, count, statuses), **ends})


def _metric_columns(
    rows: pa.Table, cell: NDArray[np.int64], count: int, statuses: Sequence[str]
) -> dict[str, list[Any]]:
    """Return status, metrics, standard errors and directions by evaluation, and the mean of the paper's four tasks."""
    groups: list[list[int]] = [[] for _ in range(count)]
    for index, number in enumerate(cell.tolist()):
        groups[number].append(index)
    evals = rows.column("eval").to_pylist()
    metrics, stderr, directions = (_mappings(rows, name) for name in ("metrics", "stderr", "higher_is_better"))
    columns: dict[str, list[Any]] = {}

    def put(name: str, number: int, value: object) -> None:
        if name not in columns:
            columns[name] = [math.nan] * count
        columns[name][number] = value

    for number, group in enumerate(groups):
        for index in group:
            put(f"{evals[index]}_status", number, statuses[index])
        for index in group:
            name = evals[index]
            for metric, value in metrics[index].items():
                put(f"{name}_{metric}", number, value)
                if metric in stderr[index]:
                    put(f"{name}_{metric}_stderr", number, stderr[index][metric])
            for metric, higher in directions[index].items():
                put(f"{name}_{metric}_higher_is_better", number, higher)
        of_tasks = {evals[i]: i for i in group if evals[i] in ZERO_SHOT and metrics[i].get("acc") is not None}
        if len(of_tasks) == len(ZERO_SHOT):
            tasks = [of_tasks[task] for task in ZERO_SHOT]
            errors = [stderr[i].get("acc", math.nan) for i in tasks]
            put("zero_shot_mean", number, math.fsum(metrics[i]["acc"] for i in tasks) / len(tasks))
            put("zero_shot_mean_stderr", number, math.hypot(*errors) / len(tasks))
    return columns


def _first(cell: NDArray[np.int64], *ranks: NDArray[Any]) -> NDArray[np.int64]:
    """Return, for each cell, the row with the least ranks (the first of them counts most), then the first row."""
    order = np.lexsort((np.arange(len(cell)), *reversed(ranks), cell))
    return order[np.unique(cell[order], return_index=True)[1]]


def _sums(rows: pa.Table, cell: NDArray[np.int64], count: int, is_finished: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the seconds of each cell's finished rows; NaN where it has none."""
    seconds: list[list[float]] = [[] for _ in range(count)]
    values = rows.column(_SUM).to_pylist()
    for index in np.flatnonzero(is_finished).tolist():
        seconds[cell[index]].append(values[index] or 0.0)
    return np.array([math.fsum(each) if each else math.nan for each in seconds])


def _most(rows: pa.Table, cell: NDArray[np.int64], count: int, is_finished: NDArray[np.bool_]) -> pd.Series[int]:
    import pandas as pd
    import pyarrow.compute as pc

    values = pc.fill_null(rows.column(_MOST), -1).to_numpy()
    most = np.full(count, -1, dtype=np.int64)
    np.maximum.at(most, cell, np.where(is_finished, values, -1))
    return pd.Series(most, dtype="Int64").mask(most < 0)


def _errors(rows: pa.Table, cell: NDArray[np.int64], count: int, statuses: Sequence[str]) -> pd.Series[str]:
    """Return error_type of the first failed row of each cell."""
    import pandas as pd

    errors, found = rows.column("error_type").to_pylist(), [None] * count
    failed = [index for index, status in enumerate(statuses) if status == State.FAILED]
    for index in reversed(failed):
        found[cell[index]] = errors[index]
    return pd.Series(found, dtype="str")


def _mappings(rows: pa.Table, name: str) -> list[dict[str, Any]]:
    return [dict(pairs or ()) for pairs in rows.column(name).to_pylist()]


def _frame(rows: pa.Table) -> pd.DataFrame:
    import pandas as pd
    import pyarrow as pa

    nullable = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
    frame: pd.DataFrame = rows.to_pandas(types_mapper=nullable.get)
    return frame
