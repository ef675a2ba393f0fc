"""Which rows of a result table count, and the plain block-wise cells that every comparison starts from."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd

from analysis.metrics import Metric, metric_columns, stderr
from kbit.spec import BASELINE_BITS, DTYPES, EXPONENT_RULES

MEASURED: Final = ("done", "diverged")
WHOLE_TENSOR: Final = 0
"""Stands for a missing block size (the whole tensor) where a number is needed."""

_NEEDED: Final = (
    *("key", "status", "family", "model", "model_id", "revision", "weights_hash", "params"),
    *("method", "bits", "dtype", "blocksize", "scheme", "exponent_bits", "subnormals", "dynamic_interval"),
    *("absmax_dtype", "center", "outlier_fraction", "bits_per_param_nominal", "total_bits", "total_bits_nominal"),
)
_IDENTITY: Final = ["model_id", "revision", "weights_hash"]
_PLAIN: Final = {
    "scheme": "block",
    "subnormals": "ieee",
    "dynamic_interval": "bnb",
    "absmax_dtype": "float16",
    "center": False,
    "outlier_fraction": 0.0,
}
"""What the paper holds fixed while it varies bits, data type and block size."""


def measured(df: pd.DataFrame) -> pd.DataFrame:
    """Rows whose numbers count, each cell once: done, diverged, or with a value of some metric although another of the
    cell's evaluations failed or is not there yet. Columns a table lacks are added as missing.

    A model name that stands for several checkpoints (hub id, revision or weights differ) is told apart by its revision
    or its weights' hash.
    """
    df = df.reindex(columns=[*df.columns, *(c for c in _NEEDED if c not in df.columns)])
    some_value = df[[m.column for m in metric_columns(df)]].notna().any(axis=1)
    df = df[df["status"].isin(MEASURED) | some_value]
    df = df[df["key"].isna() | ~df["key"].duplicated()].reset_index(drop=True)
    checkpoint = df[_IDENTITY].astype("string").fillna("")
    several = (
        checkpoint.agg("|".join, axis=1).groupby(df["model"]).transform("nunique") > 1
        if len(df)
        else pd.Series(dtype=bool)
    )
    if several.any():
        mark = checkpoint["revision"].where(
            checkpoint["revision"] != "", checkpoint["weights_hash"].str.removeprefix("sha256:")
        )
        df["model"] = df["model"].astype("string").where(~several, df["model"].astype("string") + "@" + mark.str[:7])
    return df


def baselines(df: pd.DataFrame) -> pd.DataFrame:
    """The 16-bit cells among ``measured`` rows."""
    return df[numbers(df, "bits") == BASELINE_BITS]


def plain(df: pd.DataFrame, *, outlier_fraction: float = 0.0) -> pd.DataFrame:
    """Block-wise cells of ``measured`` that are as the paper's main results but for bits, data type and block size.

    Left out: groups, centering, other absmax types, outlier dimensions (unless ``outlier_fraction`` asks for them),
    methods that are more than a codebook. Of float cells that differ in exponent bits only, Appendix C.4's heuristic is
    taken, else Appendix A's number, else the fewest. Block sizes become numbers (``WHOLE_TENSOR`` where there is one).
    """
    wanted = {**_PLAIN, "outlier_fraction": outlier_fraction}
    keep = df["method"] == "blockwise"
    for column, value in wanted.items():
        keep &= (df[column].isna() & (value == _PLAIN[column])) | (df[column] == value).fillna(False).astype(bool)
    df = df[keep.fillna(False).astype(bool)].copy()
    df["blocksize"] = numbers(df, "blocksize").fillna(WHOLE_TENSOR).astype(int)
    df["bits"] = numbers(df, "bits").astype(int)
    rank = [_exponent_rank(b, e) for b, e in zip(df["bits"], numbers(df, "exponent_bits"), strict=True)]
    df = df.assign(_rank=rank).sort_values("_rank", kind="stable")
    return df.drop_duplicates(["family", "model", "dtype", "bits", "blocksize"]).sort_index().drop(columns="_rank")


def points(df: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Cells with a value of ``metric``, one row each, ordered by family, params and bits.

    Columns: key, family, model, params, dtype, bits, blocksize, bits_per_param, total_bits (bits; both the paper's
    nominal count where it is known), value (float64), stderr (float64, NaN where unknown), diverged (bool). A diverged
    cell without a finite value has the worst one, an infinity; a cell not evaluated on the metric is left out.
    """
    worst = -np.inf if metric.higher_is_better else np.inf
    value = numbers(df, metric.column).replace([np.inf, -np.inf], np.nan)
    diverged = df["status"] == "diverged"
    total = numbers(df, "total_bits_nominal").fillna(numbers(df, "total_bits"))
    found = pd.DataFrame(
        {
            **{c: df[c] for c in ("key", "family", "model")},
            "params": numbers(df, "params"),
            "dtype": df["dtype"],
            "bits": numbers(df, "bits").astype(int),
            "blocksize": df["blocksize"],
            "bits_per_param": numbers(df, "bits_per_param_nominal"),
            "total_bits": total,
            "value": value.where(~(diverged & value.isna()), worst),
            "stderr": stderr(df, metric).where(value.notna()),
            "diverged": diverged,
        }
    )
    return (
        found[found["value"].notna()]
        .sort_values(["family", "params", "model", "bits"], kind="stable")
        .reset_index(drop=True)
    )


def with_baseline(cells: pd.DataFrame, baseline: pd.DataFrame) -> pd.DataFrame:
    """``points`` beside their model's 16-bit cell: adds baseline, baseline_key, change (value - baseline), or NaN."""
    found = baseline[["family", "model", "key", "value"]].rename(columns={"key": "baseline_key", "value": "baseline"})
    merged = cells.merge(found.drop_duplicates(["family", "model"]), on=["family", "model"], how="left")
    return merged.assign(change=merged["value"] - merged["baseline"])


def numbers(df: pd.DataFrame, column: str) -> pd.Series[float]:
    """A column as float64; missing values, and a missing column, are NaN."""
    if column not in df.columns:
        return pd.Series(np.nan, index=df.index, dtype="float64")
    return pd.to_numeric(df[column], errors="coerce").astype("float64")


def ordered_dtypes(cells: pd.DataFrame) -> list[str]:
    """Data types present, in one order everywhere: that of ``kbit.spec.DTYPES``, then others by name."""
    present = set(cells["dtype"].dropna())
    return [d for d in DTYPES if d in present] + sorted(present - set(DTYPES))


def fullest_dtype(cells: pd.DataFrame, axis: str) -> str | None:
    """The data type with the most (model, ``axis``) combinations; of equals float, the paper's, then the first."""
    order = sorted(ordered_dtypes(cells), key=lambda d: d != "float")
    counts = {d: len(cells[cells["dtype"] == d].drop_duplicates(["family", "model", axis])) for d in order}
    return max(order, key=lambda d: counts[d]) if order else None


def block_name(blocksize: int) -> str:
    return "whole tensor" if blocksize == WHOLE_TENSOR else str(blocksize)


def _exponent_rank(bits: int, exponent_bits: float) -> float:
    if np.isnan(exponent_bits) or EXPONENT_RULES["heuristic"].get(bits) == exponent_bits:
        return 0
    return 1 if EXPONENT_RULES["paper"].get(bits) == exponent_bits else 1 + exponent_bits
