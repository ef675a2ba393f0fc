"""Rank correlation of what weights spread and how large activations are, block by block. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def spearman(spread: NDArray[np.float64], magnitude: NDArray[np.float64]) -> float:
    """Spearman's rank correlation of two arrays [n], equal values sharing their mean rank; NaN where it is undefined:
    one of them is constant, or not all values are finite.
    """
    a, b = (unit_ranks(values) for values in (spread, magnitude))
    return math.nan if a is None or b is None else float(a @ b)


def unit_ranks(values: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Return the ranks of values [n], centred and of length 1; None where all are equal, or not all are finite."""
    from scipy.stats import rankdata

    if not np.isfinite(values).all():
        return None
    ranks = rankdata(values) - (len(values) + 1) / 2
    length = float(np.linalg.norm(ranks))
    return np.asarray(ranks / length) if length else None


def chance_deviation(spreads: Sequence[NDArray[np.float64]], magnitudes: Sequence[NDArray[np.float64]]) -> float:
    """Standard deviation of the mean of several blocks' rank correlations if weights told nothing of activations.

    That is: over all permutations of the dimensions, the same in every block, since dimension i of a hidden state is
    the same feature in all of them and blocks are no independent samples. With unit ranks a_b, m_b of block b and
    C = sum_b a_b m_b', the mean is tr(C P) / blocks, of variance ||C||² / (n - 1) / blocks² (Hoeffding, 1951),
    and ||C||² = sum_{b,c} (a_b . a_c)(m_b . m_c). Blocks of different widths count as independent.

    Args:
        spreads: of each block, float64 [dimensions]; blocks without a correlation don't count.
        magnitudes: the same.
    """
    by_width: dict[int, list[tuple[NDArray[np.float64], NDArray[np.float64]]]] = {}
    for spread, magnitude in zip(spreads, magnitudes, strict=True):
        a, m = unit_ranks(spread), unit_ranks(magnitude)
        if a is not None and m is not None:
            by_width.setdefault(len(a), []).append((a, m))
    variance = 0.0
    for width, ranks in by_width.items():
        a, m = (np.stack(of_all) for of_all in zip(*ranks, strict=True))
        variance += float(((a @ a.T) * (m @ m.T)).sum()) / (width - 1)
    blocks = sum(len(ranks) for ranks in by_width.values())
    return math.sqrt(variance) / blocks if blocks else math.nan
