"""p-values of several hypotheses at once, adjusted so that each can be held against the level of all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Adjust for the chance of any false rejection at all (Holm, 1979), whatever the dependence.

    Args:
        p: p-values [n]; NaN stands for a hypothesis that was not tested, stays NaN and counts for nothing.

    Returns:
        float64 [n], in the same order, at most 1.
    """
    return _adjusted(p, _step_down)


def benjamini_hochberg(p: ArrayLike) -> NDArray[np.float64]:
    """Adjust for the share of false among all rejections (Benjamini and Hochberg, 1995).

    It holds for tests that are independent or positively dependent, as those on the same documents are.

    Args:
        p: p-values [n]; NaN as in ``holm``.

    Returns:
        float64 [n], in the same order, at most 1.
    """
    return _adjusted(p, _step_up)


def _step_down(ordered: NDArray[np.float64]) -> NDArray[np.float64]:
    n = len(ordered)
    return np.maximum.accumulate(ordered * (n - np.arange(n)))


def _step_up(ordered: NDArray[np.float64]) -> NDArray[np.float64]:
    n = len(ordered)
    return np.minimum.accumulate((ordered * n / np.arange(1, n + 1))[::-1])[::-1]


def _adjusted(p: ArrayLike, step: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> NDArray[np.float64]:
    values = np.asarray(p, dtype=np.float64)
    adjusted = np.full(values.shape, np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    adjusted[order] = np.minimum(step(values[order]), 1.0)
    return adjusted
