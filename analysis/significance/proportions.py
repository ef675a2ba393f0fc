"""Right-or-wrong outcomes: the interval of one accuracy, and the exact test of two on the same documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.significance.pairs import LEVEL


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """McNemar's exact test of two accuracies on the same documents.

    Attributes:
        first_only: documents that only the first got right.
        second_only: those that only the second did.
        p: two-sided; 1 where no document changes sides.
    """

    first_only: int
    second_only: int
    p: float


def mcnemar(a: NDArray[Any], b: NDArray[Any]) -> McNemar:
    """Test whether two accuracies on the same documents are equal (McNemar, 1947; exact, by the binomial distribution).

    Given how many documents change sides, each side is as likely as the other under the null hypothesis.

    Args:
        a: outcomes of the first [n], bool.
        b: the same documents' of the second [n], bool.

    Raises:
        ValueError: the numbers of documents differ, or outcomes aren't bool.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} documents can't be paired; compare measurements of one task and limit")
    if a.dtype != np.bool_ or b.dtype != np.bool_:
        raise ValueError(f"McNemar's test is of right-or-wrong outcomes (bool), not of {a.dtype} and {b.dtype}")
    from scipy.stats import binom

    first, second = int((a & ~b).sum()), int((b & ~a).sum())
    p = min(1.0, 2 * float(binom.cdf(min(first, second), first + second, 0.5)))
    return McNemar(first_only=first, second_only=second, p=p)


def wilson(right: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Return Wilson's score interval of a share, which holds its level also for few documents (Wilson, 1927).

    Args:
        right: documents that were right, of
        n: documents.
        level: of confidence.

    Returns:
        (low, high), within [0, 1]; NaN without documents.
    """
    if n <= 0:
        return float("nan"), float("nan")
    from scipy.stats import norm

    z2 = float(norm.ppf(0.5 + level / 2)) ** 2
    share = right / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))
