"""Metric columns of a result table: which there are, what they are called, their unit and direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import pandas as pd

STDERR_SUFFIX: Final = "_stderr"
STATUS_SUFFIX: Final = "_status"
_NO_METRIC: Final = (STDERR_SUFFIX, STATUS_SUFFIX)
ZERO_SHOT_MEAN: Final = "zero_shot_mean"
ZERO_SHOT_TASKS: Final = ("lambada_openai", "winogrande", "hellaswag", "piqa")
"""The paper's four tasks (section 4); ``zero_shot_mean`` is the mean of their accuracies."""


@dataclass(frozen=True, kw_only=True)
class _Kind:
    name: str
    unit: str
    higher_is_better: bool
    decimals: int


_KINDS: Final[Mapping[str, _Kind]] = MappingProxyType(
    {
        "loss": _Kind(name="Loss", unit="nats/token", higher_is_better=False, decimals=3),
        "perplexity": _Kind(name="Perplexity", unit="", higher_is_better=False, decimals=2),
        "word_perplexity": _Kind(name="Word perplexity", unit="", higher_is_better=False, decimals=2),
        "byte_perplexity": _Kind(name="Byte perplexity", unit="", higher_is_better=False, decimals=3),
        "bits_per_byte": _Kind(name="Compression", unit="bits/byte", higher_is_better=False, decimals=3),
        "acc": _Kind(name="Accuracy", unit="", higher_is_better=True, decimals=3),
        "acc_norm": _Kind(name="Length-normalised accuracy", unit="", higher_is_better=True, decimals=3),
        "exact_match": _Kind(name="Exact match", unit="", higher_is_better=True, decimals=3),
        "f1": _Kind(name="F1", unit="", higher_is_better=True, decimals=3),
        "mcc": _Kind(name="Matthews correlation", unit="", higher_is_better=True, decimals=3),
        "brier_score": _Kind(name="Brier score", unit="", higher_is_better=False, decimals=3),
    }
)
_LONGEST_FIRST: Final = sorted(_KINDS, key=len, reverse=True)  # 'word_perplexity' before 'perplexity'


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric of one eval.

    Attributes:
        column: its column in the wide table, ``{eval}_{metric}`` (or ``zero_shot_mean``).
        eval: the eval's name; empty for the mean of several.
        metric: the metric's name, e.g. 'loss'.
        name: for people, e.g. 'Loss on jargon'.
        unit: e.g. 'nats/token'; empty for a fraction or a ratio.
        higher_is_better: accuracies yes, losses no.
        decimals: how many a table shows.
    """

    column: str
    eval: str
    metric: str
    name: str
    unit: str
    higher_is_better: bool
    decimals: int

    @property
    def label(self) -> str:
        """Name and unit, for an axis."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def phrase(self) -> str:
        """Name inside a sentence."""
        return self.name[0].lower() + self.name[1:]

    @property
    def stderr_column(self) -> str:
        return self.column + STDERR_SUFFIX

    @property
    def status_column(self) -> str:
        return self.eval + STATUS_SUFFIX


def parse_metric(column: str) -> Metric:
    """The metric that a column ``{eval}_{metric}`` holds.

    A metric unknown here is taken to be the last word, better when higher, as lm-eval's tasks mostly are.

    Raises:
        ValueError: the name has no eval, or is a standard error or a status.
    """
    if column == ZERO_SHOT_MEAN:
        kind = _Kind(name="Mean zero-shot accuracy", unit="", higher_is_better=True, decimals=3)
        return _metric(column, "", "acc", kind, kind.name)
    eval_name, metric = _split(column)
    if not eval_name or not metric or column.endswith(_NO_METRIC):
        raise ValueError(f"column {column!r} is not a metric: metrics are named EVAL_METRIC, e.g. 'wikitext2_loss'")
    kind = _KINDS.get(metric, _Kind(name=metric, unit="", higher_is_better=True, decimals=3))
    return _metric(column, eval_name, metric, kind, f"{kind.name} on {eval_name}")


def metric_columns(df: pd.DataFrame) -> list[Metric]:
    """Metrics of a wide table, in its order: columns of a known metric's name, or with a standard error beside."""
    names = set(df.columns)
    return [
        parse_metric(c)
        for c in df.columns
        if not c.endswith(_NO_METRIC) and (c == ZERO_SHOT_MEAN or _known(c) or c + STDERR_SUFFIX in names)
    ]


def primary_loss(df: pd.DataFrame) -> Metric | None:
    """The perplexity eval's loss with the most values (the first of equals), or None.

    Perplexity is the more reliable measure (section 4; Appendix C.5), and its logarithm, the loss, is what is compared.
    """
    return _fullest(df, [m for m in metric_columns(df) if m.metric == "loss"])


def zero_shot(df: pd.DataFrame) -> Metric | None:
    """The mean of the paper's four tasks, if any cell has it."""
    return _fullest(df, [m for m in metric_columns(df) if m.column == ZERO_SHOT_MEAN])


def headline_metrics(df: pd.DataFrame) -> list[Metric]:
    """What to conclude from: the primary loss, then the zero-shot mean; without both, the metric with most values."""
    found = [m for m in (primary_loss(df), zero_shot(df)) if m is not None]
    if found:
        return found
    other = _fullest(df, metric_columns(df))
    return [other] if other is not None else []


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


def _known(column: str) -> bool:
    return any(column.endswith(f"_{metric}") and len(column) > len(metric) + 1 for metric in _LONGEST_FIRST)


def _split(column: str) -> tuple[str, str]:
    for metric in _LONGEST_FIRST:
        if column.endswith(f"_{metric}"):
            return column.removesuffix(f"_{metric}"), metric
    eval_name, _, metric = column.rpartition("_")
    return eval_name, metric


def _metric(column: str, eval_name: str, metric: str, kind: _Kind, name: str) -> Metric:
    return Metric(
        column=column,
        eval=eval_name,
        metric=metric,
        name=name,
        unit=kind.unit,
        higher_is_better=kind.higher_is_better,
        decimals=kind.decimals,
    )


def _fullest(df: pd.DataFrame, metrics: list[Metric]) -> Metric | None:
    counts = [int(pd.to_numeric(df[m.column], errors="coerce").notna().sum()) for m in metrics]
    if not counts or max(counts) == 0:
        return None
    return metrics[counts.index(max(counts))]
