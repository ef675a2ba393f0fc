"""Say where a table mixes what can't be compared: datasets, revisions, limits, weights, kernels, package versions.

Of each evaluation, each model, and of the whole table, what decides its numbers should be one. Where it isn't, the most
frequent value counts as the table's own, and ``mixed`` marks the measurements that differ from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import pandas as pd

from analysis.cells import MEASURED

MIXED: Final = "mixed"
"""Column that ``with_mixed`` adds, and the name by which tables choose: ``where={mixed: false}``."""

_OF_AN_EVAL: Final = {
    "dataset": "datasets",
    "eval_version": "versions",
    "num_fewshot": "numbers of few-shot examples",
    "window": "windows",
    "limit": "limits",
    "compute_dtype": "compute dtypes",
    "eval_device": "measured devices",
    "eval_definition": "definitions of the task",
    "eval_bos": "places of the beginning-of-sequence token",
    "eval_attention": "implementations of attention",
    "eval_execution": "ways of running a step",
}
_OF_A_MODEL: Final = {"revision": "revisions", "weights_hash": "weights"}
_OF_A_TABLE: Final = {"kernel": "kernels", "versions": "package versions"}
"""Kernels give equal codes, and versions should: what was not recorded (baselines, earlier rows) is no difference."""
_GROUPS: Final = (("eval", _OF_AN_EVAL), ("model", _OF_A_MODEL), ("", _OF_A_TABLE))
_SHOWN: Final = 3
_HASH_SHOWN: Final = 19
"""Characters of 'sha256:' and the first 12 digits."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What differs within one evaluation, one model or the table.

    Attributes:
        of: 'eval jargon', 'model neox-s' or 'the table'.
        column: that differs.
        what: it, in words: 'limits'.
        own: the most frequent value as text.
        others: the rows that have another, with its text (a Series).
        counts: measurements by text, the most frequent first.
    """

    of: str
    column: str
    what: str
    own: str
    others: pd.Series[str]
    counts: Mapping[str, int]

    def __str__(self) -> str:
        parts = [f"{text} ({n} measurement{'s' if n > 1 else ''})" for text, n in self.counts.items()]
        more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
        said = ", ".join(parts[:_SHOWN]) + more
        return f"{self.of} mixes {self.what}: {said}; compare its numbers only within one"


def mixtures(df: pd.DataFrame) -> list[Mixture]:
    """Return what a table's measurements (done or diverged) mix.

    Args:
        df: the long result table, one row per measurement; of a wide one, what a cell's row tells (weights, revision,
            kernel, versions). Columns it lacks are ignored; a missing value ('no limit') is a value.
    """
    return list(_found(df))


def mixture_warnings(long_df: pd.DataFrame) -> list[str]:
    """Return one sentence per eval, model or table whose measurements (done or diverged) differ in what decides them.

    Args:
        long_df: as ``mixtures`` takes it.
    """
    return [str(m) for m in mixtures(long_df)]


def mixed(df: pd.DataFrame) -> pd.Series[str]:
    """Say of each row how it differs from most of its evaluation, its model and its table; '' where it doesn't.

    Args:
        df: as ``mixtures`` takes it.

    Returns:
        By row: 'limit=400; kernel=triton'.
    """
    marks = pd.Series("", index=df.index, dtype="object")
    for mixture in _found(df):
        said = mixture.column + "=" + mixture.others.astype("object")
        before = marks.loc[said.index]
        marks.loc[said.index] = (before + "; ").where(before != "", "") + said
    return marks


def with_mixed(df: pd.DataFrame) -> pd.DataFrame:
    """Return the table with ``mixed`` as a column, where any row has one; else as it is."""
    marks = mixed(df)
    return df.assign(**{MIXED: marks}) if (marks != "").any() else df


def _found(df: pd.DataFrame) -> Iterator[Mixture]:
    rows = df[df["status"].isin(MEASURED)] if "status" in df else df
    for axis, columns in _GROUPS:
        if axis and axis not in rows:
            continue
        for column, what in columns.items():
            if column not in rows or rows[column].nunique(dropna=False) < 2:
                continue
            if not axis:
                recorded = rows.loc[rows[column].notna(), column]
                if recorded.nunique() > 1:
                    yield _mixture("the table", column, what, recorded)
                continue
            several = rows[column].groupby(rows[axis]).nunique(dropna=False) > 1
            for name in several.index[several]:
                yield _mixture(f"{axis} {name}", column, what, rows.loc[rows[axis] == name, column])


def _mixture(of: str, column: str, what: str, values: pd.Series[str]) -> Mixture:
    texts = _version_texts(values) if column == "versions" else values.astype("string").fillna("none")
    if values.nunique(dropna=False) == texts.nunique():
        shorter = texts.where(~texts.str.startswith("sha256:"), texts.str[:_HASH_SHOWN])
        texts = shorter if shorter.nunique() == texts.nunique() else texts
    counts = texts.value_counts()
    own = str(counts.index[0])
    return Mixture(
        of=of,
        column=column,
        what=what,
        own=own,
        others=texts[texts != own],
        counts={str(text): int(n) for text, n in counts.items()},
    )


def _version_texts(values: pd.Series[str]) -> pd.Series[str]:
    """Return the versions of the packages that differ: 'torch 2.13.0, triton 3.9.0'."""
    packages = {text: versions_of(text) for text in values.unique()}
    names = sorted({name for found in packages.values() for name in found})
    differ = [n for n in names if len({found.get(n) for found in packages.values()}) > 1]
    said = {t: ", ".join(f"{n} {found.get(n, 'none')}" for n in differ) for t, found in packages.items()}
    return values.map(said).astype("string")


def versions_of(text: object) -> dict[str, str]:
    """Return package versions by name, of the JSON that the column ``versions`` has; none of a missing value."""
    found = json.loads(text) if isinstance(text, str) and text.startswith("{") else {}
    return {str(name): str(version) for name, version in found.items()}
