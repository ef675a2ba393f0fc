"""A pivot of results over any axes and metrics, with standard errors, states and marks of mixed provenance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

import numpy as np
import pandas as pd

from analysis.cells import tell_models_apart
from analysis.metrics import Metric, parse_metric
from analysis.mixtures import MIXED, mixed
from analysis.tables.axes import PLACES, in_order
from analysis.tables.choosing import CELL_AXES, unknown_name
from analysis.tables.observations import asked_metrics
from analysis.tables.placing import Placed, place
from kbit.errors import SpecError

PIVOT_FIELDS: Final = ("value", "stderr", "status", "mixed")
DEFAULT_BY: Final = ("model", "bits")
DEFAULT_COLUMNS: Final = ("dtype",)


def pivot(
    df: pd.DataFrame,
    *,
    by: Sequence[str] = DEFAULT_BY,
    columns: Sequence[str] = DEFAULT_COLUMNS,
    metrics: Sequence[str] = (),
    sort: Sequence[str] = (),
    top: int | None = None,
) -> pd.DataFrame:
    """Lay out results by any axes and metrics.

    Cells that would share a place although they differ are told apart by the axes in which they differ, which are added
    to ``by``; nothing is averaged, but for replicates (cells that differ in their calibration's seed alone), whose mean
    and standard deviation stand for them. The 16-bit model, which has no data type, stands in every column of its row
    where ``by`` has the bits, else in a column of its own.

    Args:
        df: a result table, wide or long (``sweeps.load_results``); ``select`` chooses of it. A long one tells how each
            measurement was made, so that ``mixed`` marks all that differs.
        by: axes of the rows (``PLACES``).
        columns: axes of the columns; may be empty. ``eval`` makes tasks and texts an axis.
        metrics: as ``asked_metrics`` takes them; none are each text's loss and the zero-shot mean, or each task's.
        sort: axes of the rows, or metrics (best first), in this order; '-' before a name turns its order round. Rows
            without a value come last.
        top: rows to keep, the first; without ``sort`` those best by the first metric.

    Returns:
        Index: ``by`` and the axes that were added. Columns: (metric, *columns, field) with the fields value and stderr
        (float64; infinite where diverged without a number, NaN where there is none), status ('done', 'diverged',
        'missing', 'failed', …; '' where no such cell is planned) and mixed (how its provenance differs from most of the
        table's, '' where it doesn't). ``attrs["notes"]`` says in sentences what was added and what the marks mean.

    Raises:
        SpecError: an axis or metric that there is not, an order by something that the table has not, or a ``top`` below
            1. Says what is allowed.
    """
    _check(df, by, columns, top)
    wanted = asked_metrics(df, metrics)
    # Marked before models of several weights get a name for each.
    marked = tell_models_apart(df.assign(**{MIXED: mixed(df)}))
    placed = place(marked, tuple(by), tuple(columns), wanted)
    table = _laid_out(placed, [m.column for m in wanted])
    keys = _sort_keys(table, [*sort] or ([wanted[0].column] if top and wanted else []), wanted)
    if keys and len(table):
        table = table.iloc[np.lexsort(list(reversed(keys)))]
    notes = list(placed.notes)
    if top is not None and len(table) > top:
        notes.append(f"The first {top} of {len(table)} rows.")
        table = table.iloc[:top]
    table.attrs = {"by": list(by), "notes": notes, "metrics": {m.column: asdict(m) for m in wanted}}
    return table


def metric_of(table: pd.DataFrame, column: str) -> Metric:
    """Return a metric of a pivot, by its name in the columns; 'acc' where evaluations are an axis."""
    known = {name: Metric(**about) for name, about in table.attrs.get("metrics", {}).items()}
    if column in known:
        return known[column]
    alike = [m for m in known.values() if m.metric == column]
    if alike:
        named = alike[0].name.rsplit(" on ", 1)[0]
        return Metric(**{**asdict(alike[0]), "column": column, "eval": "", "name": named})
    return parse_metric(column)


def value_columns(table: pd.DataFrame) -> list[tuple[str, ...]]:
    """Return (metric, *columns) of each value of a pivot, in its order."""
    return [tuple(c)[:-1] for c in table.columns if c[-1] == PIVOT_FIELDS[0]]


def _check(df: pd.DataFrame, by: Sequence[str], columns: Sequence[str], top: int | None) -> None:
    allowed = [p for p in PLACES if p in df.columns or p in CELL_AXES]
    for key, names in (("by", by), ("columns", columns)):
        for name in names:
            if name not in allowed:
                raise SpecError(key, name, unknown_name(name, allowed, "an axis of this table"))
    if not by:
        raise SpecError("by", list(by), "one axis at least, e.g. by=[model,bits]")
    twice = [name for i, name in enumerate([*by, *columns]) if name in [*by, *columns][:i]]
    if twice:
        raise SpecError("columns", twice[0], f"each axis once: {twice[0]!r} is named twice in by= and columns=")
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise SpecError("top", top, "a whole number of rows from 1")


def _laid_out(placed: Placed, metrics: Sequence[str]) -> pd.DataFrame:
    observed = placed.observed
    there = list(observed["metric"].unique())
    shown = [m for m in metrics if m in there] or there
    metric = pd.Categorical(observed["metric"], shown)
    row_codes, rows = _sorted_codes([observed[n].array for n in placed.by])
    col_codes, cols = _sorted_codes([metric, *(observed[n].array for n in placed.columns)])
    fields = []
    for field in PIVOT_FIELDS:
        is_number = field in ("value", "stderr")
        grid = np.full((len(rows), len(cols)), np.nan if is_number else "", dtype="float64" if is_number else "object")
        grid[row_codes, col_codes] = observed[field].to_numpy()
        fields.append(grid)
    index: pd.Index[str] = pd.MultiIndex.from_tuples(rows, names=placed.by) if rows else _no_rows(placed.by)
    if len(placed.by) == 1:
        index = index.get_level_values(0)
    names = ["metric", *placed.columns, "field"]
    data = {(*col, f): grid[:, i] for i, col in enumerate(cols) for f, grid in zip(PIVOT_FIELDS, fields, strict=True)}
    return pd.DataFrame(
        data, index=index, columns=pd.MultiIndex.from_tuples(list(data), names=names) if data else _no_rows(names)
    )


def _no_rows(names: Sequence[str]) -> pd.MultiIndex:
    return pd.MultiIndex.from_arrays([[] for _ in names], names=list(names))


def _sorted_codes(categories: Sequence[pd.Categorical]) -> tuple[np.ndarray, list[tuple[object, ...]]]:
    """Number combinations of categories in their order; and the combinations."""
    codes = np.zeros(len(categories[0].codes), dtype=np.int64)
    for category in categories:
        codes = codes * len(category.categories) + np.asarray(category.codes)
    found, first, place = np.unique(codes, return_index=True, return_inverse=True)
    values = [np.asarray(c.categories, dtype="object")[np.asarray(c.codes)[first]] for c in categories]
    return place, [tuple(v[i] for v in values) for i in range(len(found))]


def _sort_keys(table: pd.DataFrame, names: Sequence[str], metrics: Sequence[Metric]) -> list[np.ndarray]:
    """Return numbers to sort rows by, for each name; the missing are last whichever way it goes."""
    keys: list[np.ndarray] = []
    known = {m.column: m for m in metrics}
    in_columns = list(dict.fromkeys(table.columns.get_level_values("metric")))
    for name in names:
        plain, turned = name.removeprefix("-"), name.startswith("-")
        if plain in table.index.names:
            found = list(table.index.get_level_values(plain))
            ranks = {value: i for i, value in enumerate(in_order(found, plain, found))}
            position = np.array([ranks[v] for v in found], dtype="float64")
            keys.append(-position if turned else position)
            continue
        if plain not in in_columns:
            allowed = [*table.index.names, *in_columns]
            raise SpecError("sort", name, unknown_name(plain, allowed, "an axis of the rows or a metric shown"))
        metric = known.get(plain) or metric_of(table, plain)
        sign = -1.0 if metric.higher_is_better else 1.0
        values = _field(table, plain, "value").to_numpy(dtype="float64") * sign
        best = np.full(len(values), np.nan)
        some = ~np.isnan(values).all(axis=1)
        best[some] = np.nanmin(values[some], axis=1)
        lost = np.where(np.isnan(best), 2.0, np.where(np.isinf(best), 1.0, 0.0))
        keys += [lost, np.where(lost > 0, 0.0, -best if turned else best)]
    return keys


def _field(table: pd.DataFrame, metric: str, field: str) -> pd.DataFrame:
    """Return a metric's values, standard errors, ..., by the other axes of the columns."""
    of = table.columns.get_level_values
    return table.loc[:, (of("metric") == metric) & (of("field") == field)]
