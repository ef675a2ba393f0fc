"""The best precision at each number of model bits, and how sure that is: over texts, and over models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from analysis.metrics import Metric
from analysis.scaling.interpolation import best_precision, budget_grid
from analysis.scaling.points import last_curves, law_points
from analysis.significance import LEVEL, SampleKey, Samples

Floats = NDArray[np.float64]

BUDGETS: Final = 25
DRAWS: Final = 1000
"""Bootstrap samples: of texts, and of models."""
_COLUMNS: Final = (
    *("family", "dtype", "blocksize", "budget", "bits", "value", "runner_up", "margin", "low", "high"),
    *("confidence", "confidence_models", "precisions", "windows"),
)


def best_by_budget(
    df: pd.DataFrame,
    metric: Metric,
    samples: Mapping[SampleKey, Samples] | None = None,
    *,
    budgets: Sequence[float] | None = None,
    dtype: str | None = None,
    blocksize: int | None = None,
) -> pd.DataFrame:
    """Return the best precision for each number of model bits, by interpolation between one family's models.

    Two questions have two answers. *Over texts*: the same models on other texts of this kind. All cells of a family
    saw the same windows (or documents), so they are resampled together, and what is hard for all of them cancels.
    *Over models*: other models of this kind; models are resampled with all their precisions.

    Args:
        df: a wide result table.
        metric: its direction must be known.
        samples: outcomes by (cell key, eval); without them nothing is said over texts.
        budgets: total bits; None takes 25 over the range in which two precisions compare, evenly in the logarithm.
        dtype: as ``law_points``.
        blocksize: as ``law_points``.

    Returns:
        One row per family and budget: family, dtype, blocksize, budget, bits (Int64; NA where no precision reaches it),
        value, runner_up (Int64), margin (by how much the best is better, metric's unit), low and high (its 95 %
        bootstrap interval over texts: below 0 where the runner-up may be as good), confidence (share of draws of texts
        in which these bits are best), confidence_models (the same of draws of models, of those in which two precisions
        reach the budget; NaN with fewer than 3 models), precisions (compared), windows (samples; 0 without).
    """
    points = law_points(df, metric, dtype=dtype, blocksize=blocksize)
    tables = []
    for family, own in last_curves(points.cells).groupby("family", sort=False):
        own = own.dropna(subset=["total_bits"])
        at = _budgets(own) if budgets is None else np.asarray(budgets, dtype=np.float64)
        if len(at) == 0:
            continue
        about = {"family": family, "dtype": points.dtype, "blocksize": points.blocksize}
        tables.append(family_budgets(own, metric, samples or {}, at).assign(**about))
    if not tables:
        return pd.DataFrame(columns=list(_COLUMNS))
    return pd.concat(tables, ignore_index=True)[list(_COLUMNS)]


def family_budgets(
    own: pd.DataFrame, metric: Metric, samples: Mapping[SampleKey, Samples], budgets: ArrayLike
) -> pd.DataFrame:
    """Return ``best_by_budget`` of one curve over sizes, without its name.

    Args:
        own: ``LawPoints.cells`` of one curve; key, model, bits, total_bits, value and diverged are read.
        metric: its direction must be known.
        samples: outcomes by (cell key, eval).
        budgets: total bits.
    """
    at = np.asarray(budgets, dtype=np.float64)
    best = best_precision(own, metric, at)
    low, high, share, windows = _confidence(best, _over_texts(own, metric, samples, at))
    models = _over_models(own, metric, at, best)
    return best.assign(low=low, high=high, confidence=share, confidence_models=models, windows=windows)


def _budgets(own: pd.DataFrame) -> Floats:
    """Budgets over the range that at least two precisions with several models each cover."""
    spans = own.groupby("bits")["total_bits"].agg(["min", "max", "nunique"])
    spans = spans[spans["nunique"] > 1]
    if len(spans) < 2:
        return np.zeros(0)
    # The second smallest beginning and the second largest end: there two curves run.
    low, high = sorted(spans["min"])[1], sorted(spans["max"])[-2]
    return budget_grid(low, high, BUDGETS) if low < high else np.zeros(0)


def _over_texts(
    own: pd.DataFrame, metric: Metric, samples: Mapping[SampleKey, Samples], at: Floats
) -> tuple[list[int], Floats, int] | None:
    """(precisions [b], their values in each draw [draws, b, budgets] times the metric's sign, windows).

    None where a cell has no samples that can be paired. A diverged cell is infinitely bad in every draw.
    """
    own = own.reset_index(drop=True)
    alive = ~(own["diverged"] | ~np.isfinite(own["value"])).to_numpy()
    outcomes = [samples.get((str(k), metric.eval)) for k in own["key"]]
    if not alive.any() or any(o is None for o, a in zip(outcomes, alive, strict=True) if a):
        return None
    kept = [o for o, a in zip(outcomes, alive, strict=True) if a and o is not None]
    found = _numbers(kept, metric.metric)
    if found is None:
        return None
    totals, weights = found
    counts = np.random.default_rng(0).multinomial(len(weights), np.full(len(weights), 1 / len(weights)), size=DRAWS)
    value = np.full((DRAWS, len(own)), np.inf)
    value[:, alive] = metric.sign * (counts @ totals.T) / (counts @ weights)[:, None]
    precisions = [int(b) for b in sorted(own["bits"].unique())]
    by_bits = [_interpolated(own, value, bits, at) for bits in precisions]
    return precisions, np.stack(by_bits, axis=1), len(weights)


def _numbers(kept: Sequence[Samples], metric: str) -> tuple[Floats, Floats] | None:
    """(sum of a sample's outcome [cells, n], its weight [n]): nats by tokens of a window, or an outcome by 1."""
    name = "nats" if metric == "loss" else metric
    if any(name not in o for o in kept) or len({len(o[name]) for o in kept}) != 1 or len(kept[0][name]) < 2:
        return None
    totals = np.stack([np.asarray(o[name], dtype=np.float64) for o in kept])
    if metric != "loss":
        return totals, np.ones(totals.shape[1])
    tokens = np.asarray(kept[0]["tokens"], dtype=np.float64)
    same = all(np.array_equal(tokens, np.asarray(o["tokens"], dtype=np.float64)) for o in kept)
    return (totals, tokens) if same and np.isfinite(totals).all() else None


def _interpolated(own: pd.DataFrame, value: Floats, bits: int, at: Floats) -> Floats:
    """Values of a precision at budgets [draws, budgets], as ``interpolate``: NaN outside, infinite beside inf."""
    rows = np.flatnonzero(own["bits"].to_numpy() == bits)
    x = np.log2(own["total_bits"].to_numpy(dtype=float)[rows])
    order = np.argsort(x)
    rows, x, log_at = rows[order], x[order], np.log2(at)
    weights = np.stack([np.interp(log_at, x, row, left=np.nan, right=np.nan) for row in np.eye(len(rows))])
    own_values = value[:, rows]
    bad = np.isinf(own_values[0])
    finite = np.where(bad, 0.0, own_values) @ np.nan_to_num(weights)
    touched = (np.nan_to_num(weights)[bad] > 0).any(axis=0)
    return np.where(np.isnan(weights[0]), np.nan, np.where(touched, np.inf, finite))


def _confidence(best: pd.DataFrame, texts: tuple[list[int], Floats, int] | None) -> tuple[Floats, Floats, Floats, int]:
    n = len(best)
    low, high, share = (np.full(n, np.nan) for _ in range(3))
    if texts is None:
        return low, high, share, 0
    precisions, draws, windows = texts
    tail = (1 - LEVEL) / 2
    for i, (bits, second) in enumerate(zip(best["bits"], best["runner_up"], strict=True)):
        if pd.isna(bits):
            continue
        values = np.where(np.isnan(draws[:, :, i]), np.inf, draws[:, :, i])
        place = precisions.index(int(bits))
        share[i] = float((values.argmin(axis=1) == place).mean())
        if pd.notna(second):
            ahead = values[:, precisions.index(int(second))] - values[:, place]
            # Between two infinities (a cell that diverged) nothing can be interpolated.
            method: Literal["linear", "inverted_cdf"] = "linear" if np.isfinite(ahead).all() else "inverted_cdf"
            low[i], high[i] = np.quantile(ahead, [tail, 1 - tail], method=method)
    return low, high, share, windows


def _over_models(own: pd.DataFrame, metric: Metric, at: Floats, best: pd.DataFrame) -> Floats:
    """Share of draws of models in which the same bits are best, of those in which two precisions reach a budget."""
    models = own["model"].unique()
    if len(models) < 3:
        return np.full(len(at), np.nan)
    rng = np.random.default_rng(0)
    precisions = [int(b) for b in sorted(own["bits"].unique())]
    value = np.where(own["diverged"] & ~np.isfinite(own["value"]), np.inf, metric.sign * own["value"])[None, :]
    # Which models were drawn decides all, not how often: a curve goes through each once.
    drawn = np.sort(rng.integers(0, len(models), (DRAWS, len(models))), axis=1)
    drawn, times = np.unique(drawn, axis=0, return_counts=True)
    sets: dict[tuple[int, ...], int] = {}
    for row, count in zip(drawn, times, strict=True):
        chosen = tuple(sorted(set(row.tolist())))
        sets[chosen] = sets.get(chosen, 0) + int(count)
    same, valid = np.zeros(len(at)), np.zeros(len(at))
    wanted = best["bits"].fillna(-1).astype(int).to_numpy()
    for chosen, count in sets.items():
        rows = own["model"].isin(models[list(chosen)]).to_numpy()
        some, values = own[rows], value[:, rows]
        have = [b for b in precisions if (some["bits"] == b).any()]
        table = np.stack([_interpolated(some, values, b, at)[0] for b in have])
        reached = (~np.isnan(table)).sum(axis=0) > 1
        winner = np.array(have)[np.where(np.isnan(table), np.inf, table).argmin(axis=0)]
        valid += count * reached
        same += count * (reached & (winner == wanted))
    share: Floats = np.divide(same, valid, out=np.full(len(at), np.nan), where=valid > 0)
    return share
