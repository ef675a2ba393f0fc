"""Metric columns of a result table: which there are, what they are called, their unit and direction."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Final

import pandas as pd

from kbit.evaluation.evaluators import MetricSpec, declared_metrics

STDERR_SUFFIX: Final = "_stderr"
STATUS_SUFFIX: Final = "_status"
DIRECTION_SUFFIX: Final = "_higher_is_better"
_NO_METRIC: Final = (STDERR_SUFFIX, STATUS_SUFFIX, DIRECTION_SUFFIX)
ZERO_SHOT_MEAN: Final = "zero_shot_mean"
ZERO_SHOT_TASKS: Final = ("lambada_openai", "winogrande", "hellaswag", "piqa")
"""The paper's four tasks (section 4); ``zero_shot_mean`` is the mean of their accuracies."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric of one eval.

    Attributes:
        column: its column in the wide table, ``{eval}_{metric}`` (or ``zero_shot_mean``).
        eval: the eval's name; empty for the mean of several.
        metric: the metric's name, e.g. 'loss'.
        name: for people, e.g. 'Loss on jargon'.
        unit: e.g. 'nats/token'; empty for a fraction or a ratio.
        higher_is_better: accuracies yes, losses no; None where nobody declares it.
        decimals: how many a table shows.
    """

    column: str
    eval: str
    metric: str
    name: str
    unit: str = ""
    higher_is_better: bool | None = None
    decimals: int = 3

    @property
    def label(self) -> str:
        """Name and unit, for an axis."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def phrase(self) -> str:
        """Name inside a sentence."""
        return self.name[0].lower() + self.name[1:]

    @property
    def sign(self) -> float:
        """-1 where higher is better, else 1: times a value, less is better.

        Raises:
            ValueError: nobody declares which is better, so nothing can be ranked.
        """
        if self.higher_is_better is None:
            raise ValueError(f"{self.column} can't be ranked: nobody declares whether higher is better")
        return -1.0 if self.higher_is_better else 1.0

    @property
    def direction_column(self) -> str:
        return self.column + DIRECTION_SUFFIX

    @property
    def stderr_column(self) -> str:
        return self.column + STDERR_SUFFIX

    @property
    def status_column(self) -> str:
        return self.eval + STATUS_SUFFIX


def parse_metric(column: str, df: pd.DataFrame | None = None) -> Metric:
    """Return the metric that a column ``{eval}_{metric}`` holds.

    Its direction is the one that the table has for it (a task's own), else the one that a kind of evaluation declares
    for the metric's name, else unknown: nothing is guessed.

    Args:
        column: its name.
        df: the wide table that has the column.

    Raises:
        ValueError: the name has no eval, or is a standard error, a status or a direction.
    """
    declared = declared_metrics()
    if column == ZERO_SHOT_MEAN:
        return _metric(column, "", replace(declared["acc"], title="Mean zero-shot accuracy"))
    columns = [] if df is None else list(df.columns)
    evals = {c.removesuffix(STATUS_SUFFIX) for c in columns if c.endswith(STATUS_SUFFIX)}
    eval_name, name = _split(column, declared, evals)
    if not eval_name or not name or column.endswith(_NO_METRIC):
        raise ValueError(f"column {column!r} is not a metric: metrics are named EVAL_METRIC, e.g. 'wikitext2_loss'")
    found = _metric(column, eval_name, declared.get(name, name))
    if evals and eval_name not in evals:
        # The end of another metric's name: 'f1' of 'macro_f1'.
        found = replace(found, higher_is_better=None)
    if df is not None and found.direction_column in columns:
        said = set(df[found.direction_column].dropna().astype(bool))
        found = replace(found, higher_is_better=said.pop() if len(said) == 1 else None)
    return found


def metric_columns(df: pd.DataFrame) -> list[Metric]:
    """Metrics of a wide table, in its order: columns of a declared metric's name, or those with a standard error or a
    direction.
    """
    names, declared = set(df.columns), declared_metrics()
    return [
        parse_metric(c, df)
        for c in df.columns
        if not c.endswith(_NO_METRIC)
        and (c == ZERO_SHOT_MEAN or _known(c, declared) or {c + STDERR_SUFFIX, c + DIRECTION_SUFFIX} & names)
    ]


def direction_warnings(df: pd.DataFrame) -> list[str]:
    """Return one sentence that names the metrics whose direction nobody declares, where there are any."""
    neutral = {name for name, spec in declared_metrics().items() if spec.higher_is_better is None}
    unranked = [m for m in metric_columns(df) if m.higher_is_better is None and m.metric not in neutral]
    unknown = [m.column for m in unranked if df[m.column].notna().any()]
    if not unknown:
        return []
    return [
        f"{', '.join(unknown)}: shown, but not ranked or compared: nobody declares whether higher is better. A task "
        "declares it in its metric_list (higher_is_better), a kind of evaluation in its metrics"
    ]


def primary_loss(df: pd.DataFrame) -> Metric | None:
    """Return the perplexity eval's loss with the most values (the first of equals), or None.

    Perplexity is the more reliable measure (section 4; Appendix C.5), and its logarithm, the loss, is what is compared.
    """
    return _fullest(df, [m for m in metric_columns(df) if m.metric == "loss"])


def zero_shot(df: pd.DataFrame) -> Metric | None:
    """Return the mean of the paper's four tasks, if any cell has it."""
    return _fullest(df, [m for m in metric_columns(df) if m.column == ZERO_SHOT_MEAN])


def headline_metrics(df: pd.DataFrame) -> list[Metric]:
    """Return what to show first: the primary loss, then the zero-shot mean.

    Without both, it is the metric with most values, if possible one that can be ranked.
    """
    found = [m for m in (primary_loss(df), zero_shot(df)) if m is not None]
    if found:
        return found
    columns = metric_columns(df)
    other = _fullest(df, [m for m in columns if m.higher_is_better is not None]) or _fullest(df, columns)
    return [other] if other is not None else []


def ranked_metrics(df: pd.DataFrame) -> list[Metric]:
    """Return what to conclude from: the headline metrics whose direction is known."""
    return [m for m in headline_metrics(df) if m.higher_is_better is not None]


def stderr(df: pd.DataFrame, metric: Metric) -> pd.Series[float]:
    """Standard error of a metric by row, float64; NaN where unknown.

    The zero-shot mean's, where the table has no column for it, is of independent tasks: sqrt(sum of squares) / 4.
    """
    if metric.stderr_column in df.columns:
        return pd.to_numeric(df[metric.stderr_column], errors="coerce").astype("float64")
    parts = [f"{task}_acc{STDERR_SUFFIX}" for task in ZERO_SHOT_TASKS]
    if metric.column == ZERO_SHOT_MEAN and set(parts) <= set(df.columns):
        squares = [pd.to_numeric(df[part], errors="coerce").astype("float64") ** 2 for part in parts]
        return pd.Series(sum(squares), dtype="float64") ** 0.5 / len(parts)
    return pd.Series(float("nan"), index=df.index, dtype="float64")


def _known(column: str, declared: Iterable[str]) -> bool:
    return any(column.endswith(f"_{metric}") and len(column) > len(metric) + 1 for metric in declared)


def _split(column: str, declared: Iterable[str], evals: Collection[str]) -> tuple[str, str]:
    """(eval, metric): a declared metric ends the column's name; else one of ``evals`` begins it; else the last word is
    the metric.
    """
    for metric in sorted(declared, key=len, reverse=True):  # 'word_perplexity' before 'perplexity'
        if column.endswith(f"_{metric}"):
            return column.removesuffix(f"_{metric}"), metric
    for name in sorted(evals, key=len, reverse=True):
        if column.startswith(f"{name}_"):
            return name, column.removeprefix(f"{name}_")
    eval_name, _, metric = column.rpartition("_")
    return eval_name, metric


def _metric(column: str, eval_name: str, spec: MetricSpec | str) -> Metric:
    """Of a declared metric, or of one known by its name only."""
    on = f" on {eval_name}" if eval_name else ""
    if isinstance(spec, str):
        return Metric(column=column, eval=eval_name, metric=spec, name=spec + on)
    return Metric(
        column=column,
        eval=eval_name,
        metric=spec.name,
        name=spec.title + on,
        unit=spec.unit,
        higher_is_better=spec.higher_is_better,
        decimals=spec.decimals,
    )


def _fullest(df: pd.DataFrame, metrics: list[Metric]) -> Metric | None:
    counts = [int(pd.to_numeric(df[m.column], errors="coerce").notna().sum()) for m in metrics]
    if not counts or max(counts) == 0:
        return None
    return metrics[counts.index(max(counts))]
