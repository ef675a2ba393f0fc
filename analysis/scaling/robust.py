"""Linear regression by Huber's loss with its scale, of values some of which are only known to lie above or below.

The post-training laws are linear in their logarithms, so this is all that they need: the loss is convex for a given
scale, and the start decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

HUBER: Final = 1.345
"""Standard deviations from which a residual counts linearly: 95 % as efficient as least squares for normal errors."""
_ROUNDS: Final = 500
_TOLERANCE: Final = 1e-7
_LEAST_SCALE: Final = 1e-9
_FAR: Final = 1e3
_LOG_ROOT: Final = float(np.log(2 * np.pi) / 2)


@dataclass(frozen=True, kw_only=True)
class Regression:
    """A fit: coefficients [p], and the errors' standard deviation as Huber's Proposal 2 has it."""

    coefficients: Floats
    scale: float


def regress(
    design: Floats,
    y: Floats,
    side: NDArray[np.int_] | None = None,
    *,
    huber: float = HUBER,
    start: Regression | None = None,
) -> Regression:
    """Fit y = design @ coefficients + error.

    Coefficients and scale solve Huber's Proposal 2 (Huber, Robust Statistics, 1981, section 7.7). Values that are only
    bounds are replaced by their expectation given the bound, for normal errors, until nothing changes: for a large
    ``huber`` that is the EM algorithm of the Tobit model (Amemiya, 1984), else a bounded influence of the same.

    Args:
        design: [n, p], of full rank.
        y: [n], a value or a bound.
        side: [n]: 0 where y was observed, 1 where the truth is above y, -1 where it is below; None for all observed.
        huber: residuals beyond this many scales count linearly.
        start: where to begin; None for least squares.

    Raises:
        ValueError: the design is not of full rank, or nothing was observed.
    """
    n, p = design.shape
    side = np.zeros(n, dtype=np.int_) if side is None else side
    observed = side == 0
    if np.linalg.matrix_rank(design[observed]) < p:
        raise ValueError(f"{int(observed.sum())} observed values can't tell {p} parameters apart")
    if start is None:
        first = np.linalg.lstsq(design[observed], y[observed], rcond=None)[0]
        off = y[observed] - design[observed] @ first
        start = Regression(coefficients=first, scale=float(np.sqrt((off**2).sum() / max(1, len(off) - p))))
    beta, scale = start.coefficients, max(start.scale, _LEAST_SCALE)
    expected = _mean_square(huber) * max(1, n - p)
    for _ in range(_ROUNDS):
        mu = design @ beta
        target, spread = _completed(y, mu, side, scale)
        r = target - mu
        weights = np.minimum(1.0, huber * scale / np.maximum(np.abs(r), _LEAST_SCALE * scale))
        weighted = design.T * weights
        new: Floats = np.linalg.solve(weighted @ design, weighted @ target).astype(np.float64)
        square = np.minimum((target - design @ new) ** 2, (huber * scale) ** 2).sum() + (spread * scale**2).sum()
        new_scale = max(float(np.sqrt(square / expected)), _LEAST_SCALE)
        moved = np.abs(design @ (new - beta)).max() / scale + abs(new_scale / scale - 1)
        beta, scale = new, new_scale
        if moved < _TOLERANCE or scale <= _LEAST_SCALE:
            break
    return Regression(coefficients=beta, scale=scale)


def _completed(y: Floats, mu: Floats, side: NDArray[np.int_], scale: float) -> tuple[Floats, Floats]:
    """Return values with bounds replaced by their expectation, and the variance around it in units of scale²."""
    if not side.any():
        return y, np.zeros_like(y)
    from scipy.special import log_ndtr

    # Mirrored, a bound from below is one from above.
    z = side * (y - mu) / scale
    near = np.minimum(z, _FAR)
    # The inverse Mills ratio, by logarithms: far out both density and tail vanish.
    mills = np.exp(-near * near / 2 - _LOG_ROOT - log_ndtr(-near))
    # So far beyond what is expected, the truth is the bound, and without spread.
    far = z > _FAR
    target = np.where((side != 0) & ~far, mu + side * scale * mills, y)
    return target, np.where((side != 0) & ~far, np.clip(1 + near * mills - mills**2, 0.0, 1.0), 0.0)


@cache
def _mean_square(k: float) -> float:
    """E[min(Z², k²)] of a standard normal Z."""
    from scipy.stats import norm

    return float(2 * norm.cdf(k) - 1 - 2 * k * norm.pdf(k) + 2 * k * k * norm.sf(k)) if np.isfinite(k) else 1.0
