"""Fit every law to every family; compare them by what they leave, and by their error on the largest size left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pandas as pd

from analysis.metrics import Metric
from analysis.scaling.effective import Effective
from analysis.scaling.law import MIN_MODELS, Fitted, Law, bootstrap, held_out, residuals
from analysis.scaling.offsets import ParallelCurves, parallel_curves
from analysis.scaling.points import last_curves, law_points
from analysis.scaling.power_laws import Bivariate, PostTraining
from kbit.specs.base import BASELINE_BITS

LAWS: Final[tuple[Law, ...]] = (
    ParallelCurves(),
    Bivariate(),
    Effective(),
    PostTraining(bits="power"),
    PostTraining(bits="exponential"),
)
"""Every law, the paper's first."""

LAW_COLUMNS: Final = (
    *("family", "dtype", "blocksize", "metric", "law", "formula", "models", "cells", "diverged"),
    *("parameters", "low", "high", "rmse", "r2", "held_out", "held_out_error", "held_out_cells"),
    *("parallel_p", "drift", "drift_low", "drift_high", "drift_bits", "note"),
)


def fit_laws(
    df: pd.DataFrame,
    metric: Metric,
    *,
    dtype: str | None = None,
    blocksize: int | None = None,
    draws: int = 200,
    laws: Sequence[Law] = LAWS,
) -> pd.DataFrame:
    """Fit laws to each family's cells of one data type at one block size.

    Laws of a changed loss (all but parallel curves) are fitted to losses only. Curves over sizes take a family's last
    checkpoint; post-training laws take all checkpoints. No diverged cell is dropped unsaid: 'diverged' counts them, and
    the note says what a law takes them for.

    Args:
        df: a wide result table.
        metric: what is fitted; its direction must be known.
        dtype: data type; None takes the one that most cells have.
        blocksize: values per block, 0 for the whole tensor; None takes the one that most cells have.
        draws: bootstrap samples of models for the intervals; 0 for none.
        laws: which.

    Returns:
        One row per family and law, whether it could be fitted or not (then 'note' says why, and numbers are missing):
        family, dtype, blocksize, metric, law, formula, models, cells (quantized ones that it leaves a residual of),
        diverged (quantized), parameters, low, high (dicts by parameter: estimate and 95 % interval, NaN where fewer
        than 3 models tell none), rmse (metric's unit) and r2 of these cells, held_out (the largest model),
        held_out_error (mean absolute error on its quantized cells, left out of the fit), held_out_cells, and of
        parallel curves: parallel_p (F test), drift with its interval and precision (how much the largest distance
        between two curves changes over the sizes; metric's unit). Empty where no family has quantized cells.
    """
    points = law_points(df, metric, dtype=dtype, blocksize=blocksize)
    rows = []
    for family, own in points.cells.groupby("family", sort=False):
        if (own["bits"] >= BASELINE_BITS).all():
            continue
        about = {
            "family": family,
            "dtype": points.dtype,
            "blocksize": points.blocksize,
            "metric": metric.column,
            "models": own["model"].nunique(),
            "diverged": int((own["diverged"] & (own["bits"] < BASELINE_BITS)).sum()),
        }
        rows += [about | _row(law, own, metric, draws) for law in laws]
    return pd.DataFrame(rows, columns=list(LAW_COLUMNS)).astype({"drift_bits": "Int64", "held_out_cells": "Int64"})


def law_parameters(laws: pd.DataFrame) -> pd.DataFrame:
    """Return ``fit_laws`` with one row per parameter: family, law, parameter, value, low, high."""
    rows = [
        (row["family"], row["law"], name, value, row["low"].get(name, np.nan), row["high"].get(name, np.nan))
        for row in laws.to_dict("records")
        for name, value in row["parameters"].items()
    ]
    return pd.DataFrame(rows, columns=["family", "law", "parameter", "value", "low", "high"])


def flat_laws(laws: pd.DataFrame) -> pd.DataFrame:
    """Return ``fit_laws`` with parameters and intervals as one text, for CSV, Markdown and LaTeX."""
    texts = [_parameters_text(r["parameters"], r["low"], r["high"]) for r in laws.to_dict("records")]
    return laws.drop(columns=["low", "high"]).assign(parameters=texts)


def _row(law: Law, own: pd.DataFrame, metric: Metric, draws: int) -> dict[str, Any]:
    about: dict[str, Any] = {
        "law": law.name,
        "formula": law.formula,
        "parameters": {},
        "low": {},
        "high": {},
        "cells": 0,
    }
    curves = isinstance(law, ParallelCurves)
    if not curves and metric.metric != "loss":
        return about | {"note": f"a law of losses; {metric.column} is none"}
    # Over checkpoints a curve over sizes would be one of training.
    cells = own if isinstance(law, PostTraining | Effective) else last_curves(own)
    try:
        fitted = law.fit(cells)
    except ValueError as error:
        return about | {"note": f"not fitted: {error}"}
    intervals = bootstrap(law, cells, fitted, draws=draws)
    rmse, r2, count = residuals(fitted, cells)
    left_out = held_out(law, cells)
    about |= {
        "parameters": dict(fitted.parameters),
        "low": {name: low for name, (low, _) in intervals.items()},
        "high": {name: high for name, (_, high) in intervals.items()},
        "rmse": rmse,
        "r2": r2,
        "cells": count,
        "held_out": left_out.model,
        "held_out_error": left_out.error,
        "held_out_cells": left_out.n,
        "note": _note(fitted, cells, left_out.n < left_out.cells and left_out.n > 0),
    }
    return about | (_parallelism(cells) if curves else {})


def _parallelism(cells: pd.DataFrame) -> dict[str, Any]:
    found = parallel_curves(cells)
    largest = found.largest_drift
    if largest.empty:
        return {"parallel_p": found.p}
    return {
        "parallel_p": found.p,
        "drift": float(largest["drift"]),
        "drift_low": float(largest["drift_low"]),
        "drift_high": float(largest["drift_high"]),
        "drift_bits": int(str(largest.name)),
    }


def _note(fitted: Fitted, cells: pd.DataFrame, partly: bool) -> str:
    said = [fitted.note] if fitted.note else []
    if cells["model"].nunique() < MIN_MODELS:
        said.append(f"intervals over models need {MIN_MODELS} models")
    if partly:
        said.append("some cells of the largest model are beyond what it can predict")
    return "; ".join(said)


def _parameters_text(values: dict[str, float], low: dict[str, float], high: dict[str, float]) -> str:
    said = []
    for name, value in values.items():
        known = np.isfinite(low.get(name, np.nan))
        said.append(f"{name} {value:.4g}" + (f" [{low[name]:.4g}, {high[name]:.4g}]" if known else ""))
    return ", ".join(said)
