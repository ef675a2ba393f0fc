"""Resampling: a bootstrap over windows or documents, and the exact test that flips the signs of models' differences."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.significance.pairs import LEVEL, Comparison, Samples, can_pair, compare

ROUNDS: Final = 4000
LEAST_ROUNDS: Final = 1000
_DRAWS: Final = 2_000_000
"""Of more than 500 samples fewer rounds are drawn, at least 1,000: so many are all but normal, and take long."""
_AT_ONCE: Final = 4_000_000
"""Counts that are drawn at once: 32 MB."""
_EXACT: Final = 16
"""Up to so many differences all of their 2^n signs are taken; of more, 2^16 that are drawn."""


def bootstrap(
    a: Samples,
    b: Samples,
    metric: str,
    *,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare two measurements by a bootstrap over what was drawn: windows, documents, or clusters of them; 4,000
    resamples, of more than 500 samples fewer, at least 1,000.

    The interval is the bootstrap-t (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 12.5) of a
    ratio, the sum of differences by the sum of tokens (of a mean: by their number), with the ratio estimator's standard
    error in every round; so that few windows get the wider interval that they need. The p-value is the share of rounds
    that lie farther out, so that it agrees with a symmetric interval.

    Args:
        a: outcomes of each sample: 'nats' and 'tokens' for a loss, else ``metric``'s own and, where they are, 'tokens'.
        b: the same of the other.
        metric: 'loss', 'kl', 'acc', ...
        clusters: [n] what each sample belongs to, e.g. its document, where samples of one are alike; None takes each
            for itself.
        seed: of the draws.

    Returns:
        The difference, first minus second; ``n`` is the number of clusters.

    Raises:
        ValueError: the samples can't be paired.
    """
    if not can_pair(a, b, metric):
        raise ValueError(f"the samples of {metric!r} can't be paired; compare measurements of one dataset and limit")
    name = "nats" if metric == "loss" else metric
    d = np.asarray(a[name], dtype=np.float64) - np.asarray(b[name], dtype=np.float64)
    weights = np.asarray(a["tokens"], dtype=np.float64) if "tokens" in a else np.ones(len(d))
    if metric != "loss":
        d = d * weights
    if clusters is not None:
        number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
        of = np.asarray([number[cluster] for cluster in clusters])
        d, weights = (np.bincount(of, x).astype(np.float64) for x in (d, weights))
    n = len(d)
    found = compare({"nats": d, "tokens": weights}, {"nats": np.zeros(n), "tokens": weights}, "loss")
    if n < 2 or not np.isfinite(found.stderr):
        return found
    rounds = max(LEAST_ROUNDS, min(ROUNDS, _DRAWS // n))
    if found.stderr <= np.abs(found.difference) * 1e-12:
        # All samples say the same.
        p = 1.0 if found.difference == 0 else 1 / (rounds + 1)
        return replace(found, low=found.difference, high=found.difference, p=p)
    far = np.abs(_studentised(d, weights, found.difference, rounds, np.random.default_rng(seed)))
    half = float(np.quantile(far, LEVEL)) * found.stderr
    p = float((1 + (far >= abs(found.difference) / found.stderr).sum()) / (len(far) + 1))
    return replace(found, low=found.difference - half, high=found.difference + half, p=p)


def _studentised(
    d: NDArray[np.float64], t: NDArray[np.float64], ratio: float, rounds: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(R* - R) / se* of each round; rounds without any spread, which few samples may give, are left out."""
    n = len(d)
    columns = np.stack([d, t, d * d, d * t, t * t], axis=1)
    found = []
    for start in range(0, rounds, max(1, _AT_ONCE // n)):
        size = min(rounds - start, max(1, _AT_ONCE // n))
        counts = rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)
        sum_d, sum_t, dd, dt, tt = (counts @ columns).T
        drawn = sum_d / sum_t
        squares = np.maximum(dd - 2 * drawn * dt + drawn**2 * tt, 0)
        error = np.sqrt(n / (n - 1) * squares) / sum_t
        usable = error > 0
        found.append((drawn[usable] - ratio) / error[usable])
    return np.concatenate(found)


def sign_flip(differences: ArrayLike, *, seed: int = 0) -> float:
    """Return the one-sided p-value that differences are centred at 0 or below, by flipping their signs.

    Exact for differences that are symmetric about their centre (Fisher, The Design of Experiments, 1935, section 21),
    with no assumption of normality: the share of all 2^n ways to sign them whose sum is as large. Least is 2^-n.

    Args:
        differences: [n] finite, e.g. one of each model.
        seed: of the draws that stand for all signs where there are more than 16 differences.
    """
    d = np.asarray(differences, dtype=np.float64)
    if not len(d):
        return float("nan")
    signs = all_signs(len(d), seed)
    sums = signs @ d
    # Sums of the same terms in another order differ by rounding.
    as_large = sums >= d.sum() - 1e-12 * np.abs(d).sum()
    if len(d) <= _EXACT:
        return float(as_large.mean())
    return float((1 + as_large.sum()) / (1 + len(sums)))


@lru_cache(maxsize=4)
def all_signs(n: int, seed: int = 0) -> NDArray[Any]:
    """Return all ways to sign ``n`` numbers, float64 [2^n, n] of ±1; of more than 16, 2^16 that are drawn."""
    if n > _EXACT:
        return np.random.default_rng(seed).integers(0, 2, size=(2**_EXACT, n)) * 2.0 - 1.0
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1) * 2.0 - 1.0
