"""Select the rows of a result table that count, and the plain block-wise cells that comparisons start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Final

import numpy as np
import pandas as pd

from analysis.families import told_apart
from analysis.metrics import STATUS_SUFFIX, ZERO_SHOT_TASKS, Metric, metric_columns, stderr
from kbit.axes import VARIED
from kbit.data_types import DTYPES, EXPONENT_RULES
from kbit.spec import METHODS, axes
from kbit.specs.base import BASELINE_BITS, ROW

MEASURED: Final = ("done", "diverged")
WHOLE_TENSOR: Final = 0
"""Stands for a missing block size (the whole tensor) where a number is needed."""

SIZE: Final = "Total model bits"
"""What ``total_bits`` counts, for people."""

_NEEDED: Final = (
    *("key", "status", "family", "model", "model_id", "revision", "weights_hash", "params", "checkpoint"),
    *(
        "method",
        *axes(),
        "calibration",
        "calibration_seed",
        "bits_per_param_nominal",
        "total_bits",
        "total_bits_nominal",
    ),
)
_IDENTITY: Final = ["model_id", "revision", "weights_hash"]
_NO_EXPONENT: Final = 0
"""Stands for the exponent bits of a data type that has none where a number is needed."""


def measured(df: pd.DataFrame) -> pd.DataFrame:
    """Return the rows whose numbers count, each cell once.

    They are done, diverged, or have a value or a diverged outcome of some metric although another of the cell's
    evaluations failed or is not there yet. Columns a table lacks are added as missing.

    A model name that stands for several checkpoints (hub id, revision or weights differ) is told apart by its revision
    or its weights' hash, and a family of several architectures by their names (``families.told_apart``).
    """
    df = df.reindex(columns=[*df.columns, *(c for c in _NEEDED if c not in df.columns)])
    some_value = df[[m.column for m in metric_columns(df)]].notna().any(axis=1)
    some_outcome = df[_status_columns(df)].isin(MEASURED).any(axis=1)
    df = df[df["status"].isin(MEASURED) | some_value | some_outcome]
    df = df[df["key"].isna() | ~df["key"].duplicated()].reset_index(drop=True)
    df["family"] = told_apart(df["family"], df["model"])
    trained = df["checkpoint"].notna()
    if trained.any():
        # Checkpoints of one model have one size: a curve over sizes needs them apart.
        named = df["family"].astype("string") + "@" + df["checkpoint"].astype("string")
        df["family"] = df["family"].astype("string").where(~trained, named)
    return tell_models_apart(df)


def tell_models_apart(df: pd.DataFrame) -> pd.DataFrame:
    """Name models that stand for several checkpoints (hub id, revision or weights differ) by those, too.

    Args:
        df: a result table, wide or long. Columns that it lacks count as missing.
    """
    checkpoint = df.reindex(columns=_IDENTITY).astype("string").fillna("")
    identity = checkpoint["model_id"] + "|" + checkpoint["revision"] + "|" + checkpoint["weights_hash"]
    several = identity.groupby(df["model"]).transform("nunique") > 1 if len(df) else pd.Series(dtype=bool)
    if not several.any():
        return df
    mark = checkpoint["revision"].where(
        checkpoint["revision"] != "", checkpoint["weights_hash"].str.removeprefix("sha256:")
    )
    model = df["model"].astype("string")
    return df.assign(model=model.where(~several, model + "@" + mark.str[:7]))


def baselines(df: pd.DataFrame) -> pd.DataFrame:
    """Return the 16-bit cells among ``measured`` rows."""
    return df[numbers(df, "bits") == BASELINE_BITS]


def plain(
    df: pd.DataFrame, *, outlier_fraction: float = 0.0, every_method: bool = False, free: Sequence[str] = ()
) -> pd.DataFrame:
    """Block-wise cells of ``measured`` that are as the paper's main results but for bits, data type and block size.

    Left out: groups, centering, other absmax types, outlier dimensions (unless ``outlier_fraction`` asks for them),
    methods that are more than a codebook (unless ``every_method``, which takes them all, with their replicates). Of the
    axes that are ``free`` every value is taken. Block
    sizes become numbers (``WHOLE_TENSOR`` where there is one). Float cells come with every number of exponent bits:
    ``one_exponent`` takes one for a comparison.
    """
    fixed = {name: a.neutral for name, a in axes().items() if a.neutral is not VARIED and name not in free}
    wanted = {name: outlier_fraction if name == "outlier_fraction" else value for name, value in fixed.items()}
    methods = [str(method) for method in df["method"].dropna().unique() if method in METHODS]
    of_method = df["method"] != "baseline" if every_method else df["method"] == "blockwise"
    keep = of_method & numbers(df, "bits").notna()
    for column, value in wanted.items():
        same = (df[column].isna() & (value == fixed[column])) | (df[column] == value).fillna(False).astype(bool)
        # Which way a method's blocks lie is its own matter: GPTQ's are of rows.
        if column == "scheme":
            keep &= same | (df["method"] != "blockwise")
            continue
        if defaults := _own_defaults(methods, column, fixed[column]):
            own = df["method"].map(defaults)
            same = same.where(own.isna(), df[column] == own)
        keep &= same
    df = df[keep.fillna(False).astype(bool)].copy()
    df["blocksize"] = numbers(df, "blocksize").fillna(WHOLE_TENSOR).astype(int)
    df["bits"] = numbers(df, "bits").astype(int)
    apart = ("method", "calibration") if every_method else ()
    return df.drop_duplicates(["family", "model", *apart, *(name for name in axes() if name not in fixed)])


def _own_defaults(methods: Sequence[str], column: str, neutral: object) -> dict[str, object]:
    """Return the defaults of methods whose default isn't the neutral value: AWQ clips by default."""
    defaults = {m: f.default for m in methods for f in fields(METHODS[m]) if f.name == column}
    return {m: d for m, d in defaults.items() if d is not MISSING and d != neutral}


def one_exponent(cells: pd.DataFrame, within: Sequence[str], *, axis: str | None = None) -> pd.DataFrame:
    """``points`` with a single number of exponent bits for each combination of ``within``, so that what is compared
    differs in nothing else.

    Taken is the number found at most values of ``axis`` (all of them, where one is), then on most models; of equals by
    ``exponent_order``. Cells of other numbers are left out.
    """
    cells = cells.assign(_exponent=cells["exponent_bits"].fillna(_NO_EXPONENT), _side=cells[axis] if axis else 0)
    kept = []
    for _, own in cells.groupby(list(within), sort=False):
        ranks = []
        for exponent, same in own.groupby("_exponent"):
            number = float(str(exponent))
            cover = len(same.drop_duplicates(["family", "model", "_side"]))
            ranks.append(exponent_order(int(same["bits"].iloc[0]), number, same["_side"].nunique(), cover))
        kept.append(own[own["_exponent"] == min(ranks)[-1]])
    return (pd.concat(kept).sort_index() if kept else cells).drop(columns=["_exponent", "_side"])


def points(df: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Cells with a value of ``metric``, one row each, ordered by family, params and bits.

    Columns: key, family, model, params, method, dtype, bits, blocksize, exponent_bits (float64, NaN but for floats),
    bits_per_param, total_bits (bits; both the paper's nominal count where it is known), value (float64), stderr
    (float64, NaN where unknown), diverged (bool: on the metric's own eval, where the table says). A diverged cell
    without a finite value has the worst one, an infinity; a cell not evaluated on the metric is left out.
    """
    # Of a metric that can't be ranked either infinity says "diverged".
    worst = -np.inf if metric.higher_is_better else np.inf
    value = numbers(df, metric.column).replace([np.inf, -np.inf], np.nan)
    diverged = _diverged(_status(df, metric))
    total = numbers(df, "total_bits_nominal").fillna(numbers(df, "total_bits"))
    found = pd.DataFrame(
        {
            **{c: df[c] for c in ("key", "family", "model")},
            "params": numbers(df, "params"),
            "method": df["method"],
            "dtype": df["dtype"],
            "bits": numbers(df, "bits").astype(int),
            "blocksize": df["blocksize"],
            "exponent_bits": numbers(df, "exponent_bits"),
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


def quantized_alone(df: pd.DataFrame) -> pd.DataFrame:
    """Return a wide table whose sizes count the bits of the quantized weights alone: no embedding, head or norms.

    A small model is mostly embedding, at 16 bits whatever the precision of the rest. A model's quantized weights are
    counted from its cells, since total bits = quantized x bits per weight + (params - quantized) x 16, and its 16-bit
    baseline has as many. A method that also quantizes the embedding has no such size: NaN, as where sizes are unknown.
    """
    params, found = numbers(df, "params"), df.copy()
    # A recipe quantizes the embedding and the head, too.
    is_whole = df["recipe"].notna() if "recipe" in df.columns else pd.Series(False, index=df.index)
    for total, each in (("total_bits", "bits_per_param"), ("total_bits_nominal", "bits_per_param_nominal")):
        bits = numbers(df, each)
        is_less = (bits < BASELINE_BITS) & ~is_whole
        own = ((BASELINE_BITS * params - numbers(df, total)) / (BASELINE_BITS - bits)).where(is_less)
        weights = own.groupby([df["family"], df["model"]]).transform("median")
        found[total] = (weights * bits).where(~is_whole)
    return found


def with_baseline(cells: pd.DataFrame, baseline: pd.DataFrame) -> pd.DataFrame:
    """Join ``points`` with their model's 16-bit cell: adds baseline, baseline_key, change (value - baseline), or NaN.

    A baseline that diverged without a finite value is none: nothing can be compared with it.
    """
    finite = baseline[np.isfinite(baseline["value"])]
    found = finite[["family", "model", "key", "value"]].rename(columns={"key": "baseline_key", "value": "baseline"})
    merged = cells.merge(found.drop_duplicates(["family", "model"]), on=["family", "model"], how="left")
    return merged.assign(change=merged["value"] - merged["baseline"])


def numbers(df: pd.DataFrame, column: str) -> pd.Series[float]:
    """Return a column as float64; missing values, and a missing column, are NaN."""
    if column not in df.columns:
        return pd.Series(np.nan, index=df.index, dtype="float64")
    return pd.to_numeric(df[column], errors="coerce").astype("float64")


def ordered_dtypes(cells: pd.DataFrame) -> list[str]:
    """Data types present, in one order everywhere: that of ``kbit.spec.DTYPES``, then others by name."""
    present = set(cells["dtype"].dropna())
    return [d for d in DTYPES if d in present] + sorted(present - set(DTYPES))


def fullest_dtype(cells: pd.DataFrame, axis: str) -> str | None:
    """Return the data type with the most (model, ``axis``) combinations; of equals float, then the first."""
    order = sorted(ordered_dtypes(cells), key=lambda d: d != "float")
    counts = {d: len(cells[cells["dtype"] == d].drop_duplicates(["family", "model", axis])) for d in order}
    return max(order, key=lambda d: counts[d]) if order else None


def some_eval_diverged(df: pd.DataFrame) -> pd.Series[bool]:
    """Return which cells diverged on any of their evals, by row."""
    found = _diverged(df["status"])
    for column in _status_columns(df):
        found |= _diverged(df[column])
    return found


def exponents_text(cells: pd.DataFrame) -> str:
    """'2 at 3, 4 bits; 3 at 5 bits': the exponent bits of float cells by precision; empty without float cells."""
    floats = cells.dropna(subset=["exponent_bits"])
    by_exponents: dict[str, list[str]] = {}
    for bits, own in floats.groupby("bits"):
        numbers_found = " or ".join(f"{e:.0f}" for e in sorted(own["exponent_bits"].unique()))
        by_exponents.setdefault(numbers_found, []).append(str(bits))
    return "; ".join(f"{exponents} at {', '.join(bits)} bits" for exponents, bits in by_exponents.items())


def block_name(blocksize: int) -> str:
    return {WHOLE_TENSOR: "whole tensor", ROW: "row"}.get(blocksize, str(blocksize))


def _status(df: pd.DataFrame, metric: Metric) -> pd.Series[str]:
    """Status of the metric's eval by row; the cell's where the table has no column for it.

    The zero-shot mean's is the cell's where all of its tasks were measured.
    """
    if metric.eval:
        return df[metric.status_column] if metric.status_column in df.columns else df["status"]
    tasks = [c for c in (task + STATUS_SUFFIX for task in ZERO_SHOT_TASKS) if c in df.columns]
    return df["status"].where(df[tasks].isin(MEASURED).all(axis=1))


def _status_columns(df: pd.DataFrame) -> list[str]:
    return [c for c in df.columns if c.endswith(STATUS_SUFFIX)]


def _diverged(status: pd.Series[str]) -> pd.Series[bool]:
    return status.isin(["diverged"])


def exponent_order(bits: int, exponent_bits: float, *found: int) -> tuple[float, ...]:
    """Return by what exponent bits are chosen, the least first: found most often, in this order of counts; of equals
    Appendix C.4's heuristic, then Appendix A's number, then the fewest.
    """
    rules = [EXPONENT_RULES[rule].get(bits) == exponent_bits for rule in ("heuristic", "paper")]
    return (*(-count for count in found), rules.index(True) if any(rules) else len(rules), exponent_bits)
