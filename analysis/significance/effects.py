"""An effect over models: its interval, and how surely it lies above or below a bound.

The model is the unit of replication: an interval says what another model of the same kind would show. Where there is a
single one, the unit is the window or document, and the interval speaks of other texts for that model alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.significance.pairs import LEVEL, Comparison

Basis = Literal["models", "ranks", "samples"]
_NOTHING: Final = float("nan")
_ROUNDING: Final = 1e-12
"""An error that is smaller, as a share of what it is of, is rounding."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A mean difference with a two-sided 95 % interval.

    Attributes:
        value: the effect; with ``ranks`` the median, infinite where most models diverged.
        low, high: the interval; NaN where there is too little to have one.
        stderr: standard error of ``value``; NaN with ``ranks``, and over models that all give one number other than 0.
        dof: degrees of freedom of Student's t.
        n: models; with ``samples`` windows or documents.
        basis: 'models' (t over models), 'ranks' (signed ranks over models, where some differences are infinite) or
            'samples' (of a single model).
        values: each model's, ordered as they came; empty with 'samples'.
    """

    value: float
    low: float
    high: float
    stderr: float
    dof: float
    n: int
    basis: Basis
    values: tuple[float, ...] = ()

    @property
    def tested(self) -> bool:
        """Whether anything can be concluded."""
        return self.basis == "ranks" or bool(np.isfinite(self.stderr) and self.dof >= 1)

    def p_above(self, bound: float) -> float:
        """p-value against 'the effect is at most ``bound``': small where it lies above. NaN where nothing is known."""
        return self._p(bound, 1.0)

    def p_below(self, bound: float) -> float:
        """p-value against 'the effect is at least ``bound``': small where it lies below."""
        return self._p(bound, -1.0)

    def _p(self, bound: float, side: float) -> float:
        if not self.tested:
            return _NOTHING
        if self.basis == "ranks":
            return signed_ranks(side * (np.asarray(self.values) - bound))
        from scipy.special import stdtr

        distance = side * (self.value - bound)
        if self.stderr == 0:
            return 0.0 if distance > 0 else 1.0
        return float(stdtr(self.dof, -distance / self.stderr))


def over_models(differences: ArrayLike, correlation: NDArray[np.float64] | None = None) -> Effect:
    """Return the mean over models with Student's t.

    Differences that share cells (a curve's neighbours in an interpolation) are correlated by construction. With R their
    correlation, C = I - 1/n the centring and S the sum of squares about the mean, s² = S / tr(C R) is unbiased for the
    variance of one, and 1'R1 s²/n² for that of the mean; with R = I it is the usual t.

    Args:
        differences: [n], a model each. An infinite one (a cell diverged) is a rank, not a number: then the effect is
            ``by_ranks``. NaN (both diverged) says nothing and is left out.
        correlation: R [n, n].
    """
    d = np.asarray(differences, dtype=np.float64)
    known = ~np.isnan(d)
    d = d[known]
    n = len(d)
    if np.isinf(d).any():
        return by_ranks(d)
    if n == 0:
        return Effect(value=_NOTHING, low=_NOTHING, high=_NOTHING, stderr=_NOTHING, dof=0, n=0, basis="models")
    mean, values = float(d.mean()), tuple(map(float, d))
    if n == 1:
        return Effect(
            value=mean, low=_NOTHING, high=_NOTHING, stderr=_NOTHING, dof=0, n=1, basis="models", values=values
        )
    r = np.eye(n) if correlation is None else correlation[np.ix_(known, known)]
    variance = float(((d - mean) ** 2).sum()) / float(np.trace(r) - r.sum() / n)
    error = float(np.sqrt(variance * r.sum())) / n
    return student(mean, error, n - 1, n=n, size=float(np.abs(d).max()), values=values)


def by_ranks(differences: ArrayLike) -> Effect:
    """Return the median over models, where some differences are infinite: a diverged cell is worse than any number.

    The interval is the sign test's, between order statistics at the least confidence that reaches 95 %; infinite ends
    where the models are too few. p-values are of Wilcoxon's signed ranks.
    """
    d = np.sort(np.asarray(differences, dtype=np.float64))
    from scipy.stats import binom

    n = len(d)
    outside = int(binom.ppf((1 - LEVEL) / 2, n, 0.5))
    low, high = (d[outside - 1], d[n - outside]) if outside >= 1 else (-np.inf, np.inf)
    middle = d[(n - 1) // 2], d[n // 2]
    value = middle[0] if middle[0] == middle[1] else sum(middle) / 2
    values = tuple(float(x) for x in np.asarray(differences, dtype=np.float64))
    return Effect(
        value=float(value), low=float(low), high=float(high), stderr=_NOTHING, dof=0, n=n, basis="ranks", values=values
    )


def of_samples(found: Comparison, *, sign: float = 1.0) -> Effect:
    """Return the effect for a single model, from its windows or documents.

    Args:
        found: the comparison on the same samples.
        sign: -1 turns it round, e.g. where less is better.
    """
    low, high = sorted((sign * found.low, sign * found.high))
    return Effect(
        value=sign * found.difference,
        low=low,
        high=high,
        stderr=found.stderr,
        dof=max(found.n - 1, 0),
        n=found.n,
        basis="samples",
    )


def signed_ranks(d: NDArray[np.float64]) -> float:
    """One-sided p-value of Wilcoxon's signed-rank test that values are centred at 0 or below.

    Exact, over all signs of the ranks of |d|; ties share their rank, and zeros have none (Wilcoxon, 1945). Infinite
    values have the largest ranks.
    """
    from scipy.stats import rankdata

    from analysis.significance.resampling import sign_flip

    d = d[(d != 0) & ~np.isnan(d)]
    if not len(d):
        return 1.0
    return sign_flip(np.sign(d) * rankdata(np.abs(d)))


def student(value: float, error: float, dof: int, *, n: int, size: float, values: tuple[float, ...] = ()) -> Effect:
    """Return an effect over models with Student's t, from its standard error.

    Differences that leave no spread tell nothing of their error, unless all are exactly 0: then both cells are the same
    on every model, e.g. of the same codes.

    Args:
        value: the effect.
        error: its standard error.
        dof: degrees of freedom, at least 1.
        n: models.
        size: the largest of their differences: an error that is nothing beside it is rounding.
        values: each model's.
    """
    from scipy.special import stdtrit

    if size > 0 and error <= _ROUNDING * size:
        error = _NOTHING
    half = float(stdtrit(dof, 0.5 + LEVEL / 2)) * error
    return Effect(
        value=value, low=value - half, high=value + half, stderr=error, dof=dof, n=n, basis="models", values=values
    )
