"""Bit-level scaling curves: what a metric is at a given number of model bits, by precision (sections 4 and 5.1).

The paper found that power laws of parameters and precision fit poorly, and represents each precision by linear
interpolation between its models over the logarithm of total bits; so do these.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from analysis.cells import WHOLE_TENSOR, baselines, fullest_dtype, measured, one_exponent, plain, points
from analysis.metrics import Metric


def scaling_points(
    df: pd.DataFrame, metric: Metric, *, dtype: str | None = None, blocksize: int | None = 64
) -> tuple[pd.DataFrame, str | None]:
    """Return the points of Figure 2: cells of one data type at one block size, and the 16-bit baseline.

    Floats have one number of exponent bits per family and precision. Cells of an unknown size are left out.

    Args:
        df: a wide result table.
        metric: what is measured.
        dtype: data type; None takes the one that most cells have (of equals float, the paper's).
        blocksize: values a block; None for the whole tensor.

    Returns:
        Rows of ``cells.points``, and the data type (None without quantized cells).
    """
    rows = measured(df)
    cells = plain(rows)
    cells = points(cells[cells["blocksize"] == (blocksize or WHOLE_TENSOR)], metric)
    cells = one_exponent(cells, ["family", "dtype", "bits"])
    dtype = dtype or fullest_dtype(cells, "bits")
    both = [c for c in (points(baselines(rows), metric), cells[cells["dtype"] == dtype]) if len(c)]
    curves = pd.concat(both, ignore_index=True) if both else cells
    return curves.dropna(subset=["total_bits"]), dtype


def interpolate(total_bits: ArrayLike, values: ArrayLike, budgets: ArrayLike) -> NDArray[np.float64]:
    """Interpolate a metric at given numbers of model bits, linear in log2(total bits) between measured models.

    Args:
        total_bits: bits of the measured models [n], positive, in any order; distinct.
        values: their metric [n]; infinite where a model diverged.
        budgets: numbers of bits [m].

    Returns:
        float64 [m]. NaN outside the measured range: nothing is extrapolated. Beside a diverged model the value is
        infinite, as the model's is.
    """
    x, y = np.log2(np.asarray(total_bits, dtype=float)), np.asarray(values, dtype=float)
    order = np.argsort(x)
    x, y, at = x[order], y[order], np.log2(np.asarray(budgets, dtype=float))
    if len(x) == 0:
        return np.full(at.shape, np.nan)
    finite = np.isfinite(y)
    found = np.interp(at, x, np.where(finite, y, 0.0), left=np.nan, right=np.nan)
    touched = np.interp(at, x, (~finite).astype(float)) > 0
    worst = y[~finite][0] if not finite.all() else 0.0
    return np.asarray(np.where(touched & ~np.isnan(found), worst, found), dtype=np.float64)


def common_range(curves: pd.DataFrame) -> tuple[float, float] | None:
    """Return the range of total bits that all precisions of ``points`` with several models cover; None without one."""
    spans = curves.groupby("bits")["total_bits"].agg(["min", "max", "nunique"])
    spans = spans[spans["nunique"] > 1]
    if len(spans) < 2:
        return None
    low, high = float(spans["min"].max()), float(spans["max"].min())
    return (low, high) if low < high else None


def best_precision(curves: pd.DataFrame, metric: Metric, budgets: ArrayLike) -> pd.DataFrame:
    """Return which precision is best for a number of model bits, by interpolation between one family's models.

    Args:
        curves: ``points`` of one family (``scaling_points``).
        metric: what is measured; decides what is better.
        budgets: numbers of total bits [m].

    Returns:
        One row a budget: budget, bits (Int64, NA where no precision reaches the budget), value, runner_up (Int64),
        margin (how much better the best is than the runner-up, in the metric's unit; NaN without one), precisions (how
        many were compared).
    """
    at = np.atleast_1d(np.asarray(budgets, dtype=float))
    sign = metric.sign
    by_bits = {int(str(b)): interpolate(g["total_bits"], sign * g["value"], at) for b, g in curves.groupby("bits")}
    rows = []
    for i, budget in enumerate(at):
        # A stable sort: of equal values the fewer bits come first, as groupby ordered them.
        ranked = sorted(((v[i], b) for b, v in by_bits.items() if np.isfinite(v[i])), key=lambda pair: pair[0])
        first = ranked[0] if ranked else (np.nan, None)
        second = ranked[1] if len(ranked) > 1 else (np.nan, None)
        compared = sum(not np.isnan(v[i]) for v in by_bits.values())
        rows.append((budget, first[1], sign * first[0], second[1], second[0] - first[0], compared))
    best = pd.DataFrame(rows, columns=["budget", "bits", "value", "runner_up", "margin", "precisions"])
    return best.astype({"bits": "Int64", "runner_up": "Int64"})


def budget_grid(low: float, high: float, n: int = 201) -> NDArray[np.float64]:
    """Numbers of bits from low to high, evenly spaced in their logarithm [n]."""
    return np.exp2(np.linspace(np.log2(low), np.log2(high), n))
