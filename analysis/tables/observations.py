"""One row per cell and metric: what a pivot is made of, from a wide or a long result table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import pandas as pd

from analysis.cells import MEASURED, numbers
from analysis.metrics import ZERO_SHOT_MEAN, ZERO_SHOT_TASKS, Metric, metric_columns, parse_metric, stderr
from analysis.mixtures import MIXED, mixed
from analysis.tables.choosing import unknown_name
from kbit.errors import SpecError
from kbit.evaluation.evaluators import declared_metrics

_OF_A_CELL: Final = (
    ("bits_per_param", "Stored bits per parameter", "", 3),
    ("bits_per_param_nominal", "Bits per parameter by the paper's count", "", 3),
    ("total_bits", "Total model bits", "", 0),
    ("total_bits_nominal", "Total model bits by the paper's count", "", 0),
    ("params", "Parameters", "", 0),
    ("seconds", "Seconds of evaluating", "s", 1),
    ("peak_memory_bytes", "Peak memory", "bytes", 0),
)
SIZES: Final = {
    name: Metric(column=name, eval="", metric=name, name=title, unit=unit, higher_is_better=False, decimals=decimals)
    for name, title, unit, decimals in _OF_A_CELL
}
"""Numbers of a cell that a table shows like metrics."""
_NEEDED: Final = ("key", "eval", "status", "metrics", "stderr", "mixed", *SIZES)
OBSERVED: Final = ("key", "eval", "metric", "value", "stderr", "status", "mixed")


def is_long(df: pd.DataFrame) -> bool:
    """Tell whether a result table has a row per measurement."""
    return "metrics" in df.columns and "eval" in df.columns


def available_metrics(df: pd.DataFrame) -> list[Metric]:
    """Return the metrics that a table has a value of, wide or long: in the order of its columns or evaluations."""
    if not is_long(df):
        return [m for m in metric_columns(df) if df[m.column].notna().any()]
    names: dict[tuple[str, str], None] = {}
    numbers_of, evals = pd.factorize(df["eval"])
    eval_names = [str(name) for name in evals]
    for number, metrics in zip(numbers_of.tolist(), df["metrics"].to_numpy(), strict=True):
        for metric in metrics or ():
            names[eval_names[number], metric] = None
    found = {f"{name}_{metric}": _metric_of(name, metric, df) for name, metric in names}
    if all(f"{task}_acc" in found for task in ZERO_SHOT_TASKS):
        found[ZERO_SHOT_MEAN] = parse_metric(ZERO_SHOT_MEAN)
    return list(found.values())


def shown_metrics(df: pd.DataFrame) -> list[Metric]:
    """Return what a table shows unless it is told: the loss of each text, and the zero-shot mean or each task's score.

    A table with neither shows whatever it has.
    """
    found = available_metrics(df)
    tasks = [m for m in found if m.column == ZERO_SHOT_MEAN] or [m for m in found if m.metric == "acc"]
    return [m for m in found if m.metric == "loss"] + tasks or found


def asked_metrics(df: pd.DataFrame, names: Sequence[str]) -> list[Metric]:
    """Return the metrics that names stand for.

    Args:
        df: a result table, wide or long.
        names: each a column ('jargon_loss'), a metric of every evaluation that has it ('acc'), an evaluation ('piqa':
            all that it measures), or a size of cells (``SIZES``). None are ``shown_metrics``.

    Raises:
        SpecError: a name stands for nothing that the table has; says what there is.
    """
    if not names:
        return shown_metrics(df)
    found = {m.column: m for m in available_metrics(df)}
    asked: dict[str, Metric] = {}
    for name in names:
        meant = [found[name]] if name in found else [m for m in found.values() if name in (m.metric, m.eval)]
        if name in SIZES and name in df.columns:
            meant = [SIZES[name]]
        if not meant:
            short = dict.fromkeys(m.metric for m in found.values())
            known = [*found, *short, *(s for s in SIZES if s in df.columns)]
            raise SpecError("metrics", name, unknown_name(name, known, "a metric of this table"))
        asked |= {m.column: m for m in meant}
    return list(asked.values())


def observe(df: pd.DataFrame, metrics: Sequence[Metric]) -> pd.DataFrame:
    """Return a row per cell and metric that was planned for it.

    Args:
        df: a result table, wide or long; a column ``mixed`` of it counts as it is.
        metrics: of it.

    Returns:
        Columns ``OBSERVED``: the cell's key; eval and metric (its column); value and stderr (float64; NaN where
        unknown, an infinity where it diverged without a number); status of the evaluation; mixed, how its provenance
        differs from most of the table's ('' where it doesn't).
    """
    marked = df[[c for c in df.columns if c in _NEEDED]] if is_long(df) else df
    marked = marked if MIXED in df else marked.assign(mixed=mixed(df))
    parts = [_of_cells(marked, m) if m.column in SIZES else _of_metric(marked, m) for m in metrics]
    if not parts:
        return pd.DataFrame(columns=list(OBSERVED))
    found = pd.concat(parts, ignore_index=True)
    return found[~found.duplicated(["key", "metric"])].reset_index(drop=True)


def _metric_of(eval_name: str, metric: str, df: pd.DataFrame) -> Metric:
    """Describe a metric of a long table."""
    column, directions = f"{eval_name}_{metric}", set()
    if metric not in declared_metrics() and "higher_is_better" in df:
        said_by = df.loc[df["eval"] == eval_name, "higher_is_better"]
        directions = {d[metric] for d in said_by if isinstance(d, dict) and metric in d}
    said = {} if len(directions) != 1 else {f"{column}_higher_is_better": [directions.pop()]}
    return parse_metric(column, pd.DataFrame({column: [0.0], f"{eval_name}_status": ["done"], **said}))


def _of_metric(df: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    if is_long(df):
        return _zero_shot(df) if metric.column == ZERO_SHOT_MEAN else _of_long(df, metric)
    status = df[metric.status_column] if metric.eval and metric.status_column in df.columns else df["status"]
    if metric.column == ZERO_SHOT_MEAN:
        # The mean has no status of its own: a cell's is that of all its evaluations.
        status = status.where(~status.isin(MEASURED) | df[metric.column].notna(), "missing")
    return _observed(df, metric, numbers(df, metric.column), stderr(df, metric), status)


def _of_long(df: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    rows = df[df["eval"] == metric.eval]
    values = pd.Series(
        [(m or {}).get(metric.metric) for m in rows["metrics"].to_numpy()], index=rows.index, dtype="float64"
    )
    errors = pd.Series(
        [(m or {}).get(metric.metric) for m in rows["stderr"].to_numpy()], index=rows.index, dtype="float64"
    )
    return _observed(rows, metric, values, errors, rows["status"])


def _observed(
    rows: pd.DataFrame, metric: Metric, value: pd.Series[float], error: pd.Series[float], status: pd.Series[str]
) -> pd.DataFrame:
    worst = -np.inf if metric.higher_is_better else np.inf
    finite = value.replace([np.inf, -np.inf], np.nan)
    planned = status.notna() | value.notna()
    found = pd.DataFrame(
        {
            "key": rows["key"],
            "eval": metric.eval or metric.column,
            "metric": metric.column,
            "value": finite.where(~((status == "diverged") & finite.isna()), worst),
            "stderr": error.where(finite.notna()),
            "status": status.astype("object"),
            "mixed": rows["mixed"],
        }
    )
    return found[planned]


def _zero_shot(df: pd.DataFrame) -> pd.DataFrame:
    """Mean of the paper's four tasks where all are there, with the error of a mean of independent ones."""
    tasks = [
        _of_long(df, parse_metric(f"{task}_acc")).drop_duplicates("key").set_index("key") for task in ZERO_SHOT_TASKS
    ]
    keys = tasks[0].index
    for task in tasks[1:]:
        keys = keys.intersection(task.index, sort=False)
    four = [task.loc[keys] for task in tasks]
    status = four[0]["status"]
    for task in four[1:]:
        unmeasured = ~task["status"].isin(MEASURED) & status.isin(MEASURED)
        status = status.where(~(unmeasured | ((task["status"] == "diverged") & (status == "done"))), task["status"])
    marks = four[0]["mixed"].astype("object")
    for task in four[1:]:
        more = (task["mixed"] != "") & (marks != task["mixed"])
        marks = marks.where(~more, (marks + "; ").where(marks != "", "") + task["mixed"])
    return pd.DataFrame(
        {
            "key": keys,
            "eval": ZERO_SHOT_MEAN,
            "metric": ZERO_SHOT_MEAN,
            "value": np.mean([t["value"].to_numpy() for t in four], axis=0) if len(keys) else np.array([]),
            "stderr": np.sqrt(np.sum([t["stderr"].to_numpy() ** 2 for t in four], axis=0)) / len(four)
            if len(keys)
            else np.array([]),
            "status": status.to_numpy(),
            "mixed": marks.to_numpy(),
        }
    )


def _of_cells(df: pd.DataFrame, size: Metric) -> pd.DataFrame:
    """Return a size by cell: of a long table the sum of its measurements' seconds, else the largest."""
    of_cell = pd.DataFrame({"key": df["key"], "value": numbers(df, size.column), "status": df["status"]})
    groups = of_cell.groupby("key", sort=False)["value"]
    value = groups.sum(min_count=1) if size.column == "seconds" else groups.max()
    first = of_cell.drop_duplicates("key").set_index("key")["status"]
    status = first.reindex(value.index).where(value.isna(), "done")
    return pd.DataFrame(
        {
            "key": value.index,
            "eval": size.column,
            "metric": size.column,
            "value": value.to_numpy(),
            "stderr": np.nan,
            "status": status.to_numpy(),
            "mixed": "",
        }
    )
