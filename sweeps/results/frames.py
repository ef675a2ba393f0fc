"""Joined rows as DataFrames: a row per measurement, or one per cell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
_KNOWN: Final = "total_bits"
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


def wide_columns() -> tuple[str, ...]:
    """Return the columns of rows that ``wide_frame`` needs."""
    of_rows = ("measurement", "sweep", "eval", "status", "error_type", "finished", _SUM, _MOST)
    return tuple(dict.fromkeys((*cell_columns(), *of_rows, "metrics", "stderr", "higher_is_better", *_LAST)))


def metric_frame(rows: pa.Table) -> pd.DataFrame:
    """Return the columns of ``wide_frame`` for the metrics of each evaluation, alone.

    Args:
        rows: with key, eval, status, metrics, stderr and higher_is_better at least.
    """
    import pandas as pd

    cells = _Cells.of(rows)
    return pd.DataFrame(_metric_columns(rows, cells.number, cells.count, rows.column("status").to_pylist()))


def state_columns(asked: Iterable[str]) -> tuple[str, ...]:
    """Return the columns of rows that ``state_frame`` needs.

    Args:
        asked: columns of cells that its table has.
    """
    return tuple(dict.fromkeys(("key", "measurement", "sweep", "status", "error_type", _KNOWN, *asked)))


def state_frame(rows: pa.Table, asked: Iterable[str]) -> pd.DataFrame:
    """Return the state of each cell: a row with key, sweep, status, error_type and the columns that are asked for.

    Args:
        rows: with ``state_columns(asked)`` at least.
        asked: columns of cells.
    """
    import pyarrow as pa

    cells = _Cells.of(rows)
    statuses = rows.column("status").to_pylist()
    of_best = _frame(rows.select(list(dict.fromkeys(("key", "sweep", *asked)))).take(pa.array(cells.best(rows))))
    found = {"status": cells.states(statuses), "error_type": _errors(rows, cells.number, cells.count, statuses)}
    return of_best.assign(**found)


def wide_frame(rows: pa.Table) -> pd.DataFrame:
    """Return one row per cell, in order of the cells' first rows, with columns for the metrics of each evaluation.

    Args:
        rows: with ``wide_columns()`` at least.
    """
    import pandas as pd
    import pyarrow as pa
    import pyarrow.compute as pc

    cells = _Cells.of(rows)
    cell, count = cells.number, cells.count
    is_finished = pc.is_valid(rows.column("finished")).to_numpy()
    finished = pc.fill_null(rows.column("finished").cast(pa.int64()), 0).to_numpy()
    best = cells.best(rows)
    last = _first(cell, ~is_finished, -finished)
    has_finished = is_finished[last]
    last = np.where(has_finished, last, best)
    of_best = _frame(rows.select([*cell_columns(), "sweep"]).take(pa.array(best)))
    of_last = _frame(rows.select([*_LAST, "finished"]).take(pa.array(last)))
    statuses = rows.column("status").to_pylist()
    fixed = {
        cell_columns()[0]: of_best[cell_columns()[0]],
        "sweep": of_best["sweep"],
        "status": cells.states(statuses),
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


@dataclass(frozen=True, kw_only=True)
class _Cells:
    """The cells of some rows.

    Attributes:
        number: of each row's, in order of the cells' first rows.
        count: of cells.
    """

    number: NDArray[np.int64]
    count: int

    @classmethod
    def of(cls, rows: pa.Table) -> _Cells:
        codes = rows.column("key").combine_chunks().dictionary_encode()
        return cls(number=codes.indices.to_numpy().astype(np.int64), count=len(codes.dictionary))

    def best(self, rows: pa.Table) -> NDArray[np.int64]:
        """Return the row that knows most of each: a measured one knows its counted bits, a planned one doesn't."""
        import pyarrow.compute as pc

        return _first(self.number, ~pc.is_valid(rows.column(_KNOWN)).to_numpy())

    def states(self, statuses: Sequence[str]) -> pd.Series[str]:
        """Return the state of each: of its rows' the first in the order of ``State``."""
        import pandas as pd

        order = {state.value: rank for rank, state in enumerate(State)}
        ranks = np.full(self.count, len(order))
        np.minimum.at(ranks, self.number, np.array([order[s] for s in statuses], dtype=ranks.dtype))
        states = list(order)
        return pd.Series([states[rank] for rank in ranks], dtype="str")


def _metric_columns(
    rows: pa.Table, cell: NDArray[np.int64], count: int, statuses: Sequence[str]
) -> dict[str, list[Any] | NDArray[np.float64]]:
    """Return status, metrics, standard errors and directions by evaluation, and the mean of the paper's four tasks.

    Columns stand where a reader of the rows, cell by cell, meets them first: of a cell the statuses, then each
    evaluation's metrics with their errors and its directions, then the mean.
    """
    rank = np.empty(len(cell), dtype=np.int64)
    rank[np.argsort(cell, kind="stable")] = np.arange(len(cell))
    evals = _evaluations(rows)
    found: dict[str, tuple[tuple[int, ...], list[Any] | NDArray[np.float64]]] = {}

    def put(name: str, at: NDArray[np.int64], values: NDArray[Any], *place: int) -> None:
        # Cells without a value have NaN, which booleans can't hold.
        filled = np.full(count, math.nan, dtype=float if values.dtype == float else object)
        filled[cell[at]] = values
        first = at[np.argmin(rank[at])]
        found[name] = ((int(cell[first]), *place), filled if values.dtype == float else filled.tolist())

    def turn(at: NDArray[np.int64]) -> tuple[int, int]:
        """Return where the first of some rows is among them, and its turn among all."""
        first = int(np.argmin(rank[at]))
        return first, int(rank[at[first]])

    of_rows = np.array(statuses, dtype=object)
    for name, at in evals.items():
        put(f"{name}_status", at, of_rows[at], 0, turn(at)[1])
    metrics, errors, directions = (_entries(rows, n, evals) for n in ("metrics", "stderr", "higher_is_better"))
    for (name, metric), own in metrics.items():
        first, when = turn(own.at)
        put(f"{name}_{metric}", own.at, own.values, 1, when, int(own.position[first]), 0)
    for (name, metric), own in errors.items():
        of_metric = metrics.get((name, metric))
        known = own.only(np.isin(own.at, of_metric.at)) if of_metric is not None else None
        if of_metric is not None and known is not None and len(known.at):
            first, when = turn(known.at)
            position = int(of_metric.position[np.searchsorted(of_metric.at, known.at[first])])
            put(f"{name}_{metric}_stderr", known.at, known.values, 1, when, position, 1)
    for (name, metric), own in directions.items():
        first, when = turn(own.at)
        # Behind all metrics of the row.
        put(f"{name}_{metric}_higher_is_better", own.at, own.values, 1, when, len(cell), int(own.position[first]))
    means = _zero_shot(metrics, errors, cell)
    for number, name in enumerate(("zero_shot_mean", "zero_shot_mean_stderr")):
        if means:
            filled = np.full(count, math.nan)
            filled[list(means)] = [both[number] for both in means.values()]
            found[name] = ((min(means), 2, number), filled)
    return {name: values for name, (_, values) in sorted(found.items(), key=lambda item: item[1][0])}


@dataclass(frozen=True, kw_only=True)
class _Entries:
    """What rows of an evaluation say of a metric.

    Attributes:
        at: the rows, ascending.
        values: of each.
        position: where in its row's mapping the metric is.
    """

    at: NDArray[np.int64]
    values: NDArray[Any]
    position: NDArray[np.int64]

    def only(self, chosen: NDArray[np.bool_]) -> _Entries:
        return _Entries(at=self.at[chosen], values=self.values[chosen], position=self.position[chosen])


def _evaluations(rows: pa.Table) -> dict[str, NDArray[np.int64]]:
    """Return the rows of each evaluation, ascending."""
    codes = rows.column("eval").cast("string").combine_chunks().dictionary_encode()
    of_row = codes.indices.to_numpy()
    return {name: np.flatnonzero(of_row == code) for code, name in enumerate(codes.dictionary.to_pylist())}


def _entries(rows: pa.Table, name: str, evals: Mapping[str, NDArray[np.int64]]) -> dict[tuple[str, str], _Entries]:
    """Return what a column of mappings holds, by evaluation and metric."""
    column = rows.column(name).combine_chunks()
    if column.null_count == len(column):
        return {}
    begins, ends = (part.to_numpy() for part in (column.offsets[:-1], column.offsets[1:]))
    lengths = np.where(column.is_valid().to_numpy(zero_copy_only=False), ends - begins, 0)
    parent = np.repeat(np.arange(len(column)), lengths)
    position = np.arange(len(parent)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    pairs = np.repeat(begins, lengths) + position
    codes = column.keys.dictionary_encode()
    of_pair = codes.indices.to_numpy()[pairs]
    values = column.items.to_numpy(zero_copy_only=False)[pairs]
    of_row = np.zeros(len(column), dtype=np.int64)
    for number, at in enumerate(evals.values()):
        of_row[at] = number
    found = {}
    for number, of_eval in enumerate(evals):
        mine = np.flatnonzero(of_row[parent] == number)
        for code, metric in enumerate(codes.dictionary.to_pylist()):
            own = mine[of_pair[mine] == code]
            if len(own):
                found[of_eval, metric] = _Entries(at=parent[own], values=values[own], position=position[own])
    return found


def _zero_shot(
    metrics: Mapping[tuple[str, str], _Entries], errors: Mapping[tuple[str, str], _Entries], cell: NDArray[np.int64]
) -> dict[int, tuple[float, float]]:
    """Return the mean accuracy of the paper's four tasks, with its standard error, of each cell that has all."""

    def by_cell(known: Mapping[tuple[str, str], _Entries], task: str) -> dict[int, float]:
        own = known.get((task, "acc"))
        return {} if own is None else dict(zip(cell[own.at].tolist(), own.values.tolist(), strict=True))

    if any((task, "acc") not in metrics for task in ZERO_SHOT):
        return {}
    accuracies = [by_cell(metrics, task) for task in ZERO_SHOT]
    deviations = [by_cell(errors, task) for task in ZERO_SHOT]
    found = {}
    for number in sorted(set.intersection(*(set(own) for own in accuracies))):
        mean = math.fsum(own[number] for own in accuracies) / len(ZERO_SHOT)
        found[number] = mean, math.hypot(*(own.get(number, math.nan) for own in deviations)) / len(ZERO_SHOT)
    return found


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

    errors, found = rows.column("error_type").cast("string").to_pylist(), [None] * count
    failed = [index for index, status in enumerate(statuses) if status == State.FAILED]
    for index in reversed(failed):
        found[cell[index]] = errors[index]
    return pd.Series(found, dtype="str")


def _mappings(rows: pa.Table, name: str) -> list[dict[str, Any]]:
    """Return a column of mappings; empty ones where it is null."""
    column = rows.column(name).combine_chunks()
    keys, values = column.keys.to_pylist(), column.items.to_pylist()
    found = [dict(zip(keys[a:b], values[a:b], strict=True)) for a, b in pairwise(column.offsets.to_pylist())]
    for index in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist():
        found[index] = {}
    return found


def _frame(rows: pa.Table) -> pd.DataFrame:
    import pandas as pd
    import pyarrow as pa

    nullable = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
    plain = [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in rows.schema]
    frame: pd.DataFrame = rows.cast(pa.schema(plain)).to_pandas(types_mapper=nullable.get)
    return frame
