"""Warnings about a table that mixes what can't be compared: datasets, revisions, limits, compute dtypes."""

from __future__ import annotations

from typing import Final

import pandas as pd

from analysis.cells import MEASURED

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
_SHOWN: Final = 3


def mixture_warnings(long_df: pd.DataFrame) -> list[str]:
    """Return one sentence per eval or model whose measurements (done or diverged) differ in what decides them.

    Args:
        long_df: the long result table, one row per measurement. Columns it lacks are ignored; a missing value ('no
            limit') is a value.
    """
    if "status" in long_df:
        long_df = long_df[long_df["status"].isin(MEASURED)]
    warnings = []
    for axis, columns in (("eval", _OF_AN_EVAL), ("model", _OF_A_MODEL)):
        if axis not in long_df:
            continue
        for name, rows in long_df.groupby(axis, sort=True):
            warnings += [
                f"{axis} {name} mixes {what}: {_counts(rows[column])}; compare its numbers only within one"
                for column, what in columns.items()
                if column in rows and rows[column].nunique(dropna=False) > 1
            ]
    return warnings


def _counts(values: pd.Series[str]) -> str:
    counts = values.astype("string").fillna("none").value_counts()
    parts = [f"{value} ({n} measurement{'s' if n > 1 else ''})" for value, n in counts.items()]
    more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return ", ".join(parts[:_SHOWN]) + more
