"""What data could have shown, and what it would take to show more."""

from __future__ import annotations

import math
from typing import Final

from analysis.significance.pairs import LEVEL

POWER: Final = 0.8
_MOST: Final = 1000
"""More models than that nobody has."""


def smallest_detectable(stderr: float, dof: float, *, level: float = LEVEL, power: float = POWER) -> float:
    """Return the true difference that a two-sided test at ``level`` finds with probability ``power``.

    To first order t_level + t_power standard errors (Bloom, 1995).

    Args:
        stderr: of the difference.
        dof: degrees of freedom of Student's t.
        level: of confidence.
        power: chance to find it.
    """
    if dof < 1 or not math.isfinite(stderr):
        return float("nan")
    from scipy.special import stdtrit  # Student's quantiles, without the checks of scipy.stats: hundreds a finding

    return float(stdtrit(dof, 0.5 + level / 2) + stdtrit(dof, power)) * stderr


def samples_needed(stderr: float, n: int, gap: float, *, level: float = LEVEL) -> float:
    """Return how many windows or documents would tell a difference of ``gap``: their error falls with √n.

    Args:
        stderr: of the difference, over
        n: windows or documents.
        gap: distance to what the difference is held against.
        level: of confidence, two-sided.

    Returns:
        A number of samples, rounded up; infinite where the gap is 0.
    """
    if gap <= 0:
        return float("inf")
    wanted = smallest_detectable(stderr, max(n - 1, 1), level=level) / gap
    return float("inf") if not math.isfinite(wanted) else float(max(n, math.ceil(n * wanted**2)))


def models_needed(spread: float, gap: float, *, level: float = LEVEL) -> float:
    """Return how many models would tell a difference of ``gap``; infinite where more than 1,000 would be.

    Args:
        spread: standard deviation of the difference over models.
        gap: distance to what the difference is held against.
        level: of confidence, two-sided.
    """
    if gap <= 0 or not math.isfinite(spread):
        return float("inf")

    def enough(n: int) -> bool:
        return smallest_detectable(spread / math.sqrt(n), n - 1, level=level) <= gap

    if not enough(_MOST):
        return float("inf")
    low, high = 1, _MOST  # not enough, enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return float(high)
