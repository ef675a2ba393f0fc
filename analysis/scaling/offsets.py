"""Parallel curves: linear interpolation over log bits with an offset per precision (the paper's section 4), tested.

The paper says that curves of different precisions are almost parallel, a base function and an offset each, and tests
nothing. Here the base is piecewise linear with fixed knots, so that all of it is one linear model: offsets have
intervals, and whether the curves are parallel is an F test of a slope per precision beside its offset.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.scaling.law import Fitted
from analysis.significance import LEVEL
from kbit.specs.base import BASELINE_BITS

Floats = NDArray[np.float64]

_MOST_KNOTS: Final = 8


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """The base function with an offset per precision, and what a slope per precision would add.

    Attributes:
        reference: precision whose offset is 0: 16 bits, or the highest.
        knots: log2(total bits) of the base function [k], and ``base`` its values there [k].
        offsets: by bits: offset, low, high (95 %, Student's t): how far a curve lies above the reference's at the same
            total bits, in the metric's unit; and drift, drift_low, drift_high: by how much its distance to the
            reference changes from the smallest of its models to the largest. NaN where too few cells remain.
        f, p, df1, df2: the F test of parallelism (all drifts 0); NaN and 0 where too few cells remain.
        rmse: root mean square of the residuals over df, of the parallel model; NaN without any.
        n: cells fitted; censored: diverged ones, which have no place in it.
    """

    reference: int
    knots: Floats
    base: Floats
    offsets: pd.DataFrame
    f: float
    p: float
    df1: int
    df2: int
    rmse: float
    n: int
    censored: int

    @property
    def largest_drift(self) -> pd.Series[float]:
        """The row of ``offsets`` whose drift is largest in size; empty without any."""
        known = self.offsets.dropna(subset=["drift"])
        return known.iloc[int(known["drift"].abs().argmax())] if len(known) else pd.Series(dtype="float64")


def parallel_curves(cells: pd.DataFrame, *, knots: int | None = None) -> Parallel:
    """Fit and test parallel curves, by least squares.

    Intervals and the test are exact for errors that are normal, alike and independent. What a model's cells share (it
    was trained better than the curve says) cancels in offsets and drifts, so they are then too wide rather than too
    narrow. Diverged cells are left out and counted.

    Args:
        cells: ``LawPoints.cells`` (or ``scaling_points``) of one curve over sizes.
        knots: of the base function; None takes as many as there are models, at least 2 and at most 8.

    Raises:
        ValueError: fewer than two precisions have two models each that didn't diverge.
    """
    usable = np.isfinite(cells["value"]) & ~cells["diverged"] & (cells["total_bits"] > 0)
    own = cells[usable]
    counts = own.groupby("bits")["model"].nunique()
    own = own[own["bits"].isin(counts[counts > 1].index)]
    precisions = [int(b) for b in sorted(own["bits"].unique())]
    if len(precisions) < 2:
        raise ValueError("parallel curves need two precisions with two models each that did not diverge")
    reference = BASELINE_BITS if BASELINE_BITS in precisions else precisions[-1]
    x, y = np.log2(own["total_bits"].to_numpy(dtype=float)), own["value"].to_numpy(dtype=float)
    bits = own["bits"].to_numpy()
    count = min(_MOST_KNOTS, max(2, own["model"].nunique())) if knots is None else knots
    at = np.unique(np.quantile(x, np.linspace(0, 1, count)))
    others = [b for b in precisions if b != reference]
    design = np.column_stack([hats(x, at), *((bits == b).astype(float) for b in others)])
    # A precision's slope is measured from the middle of its models, so that its offset keeps its meaning.
    middle = {b: float(x[bits == b].mean()) for b in others}
    slopes = np.column_stack([np.where(bits == b, x - middle[b], 0.0) for b in others])
    plain, full = _Least.of(design, y), _Least.of(np.column_stack([design, slopes]), y)
    df1, df2 = full.rank - plain.rank, len(y) - full.rank
    f = (plain.left - full.left) / df1 / (full.left / df2) if df1 > 0 and df2 > 0 and full.left > 0 else float("nan")
    k, spans = len(at), {b: float(np.ptp(x[bits == b])) for b in others}
    rows: list[tuple[int, float, float, float, float, float, float]] = [(reference, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)]
    for i, b in enumerate(others):
        offset = plain.estimate(k + i)
        drift = [spans[b] * s for s in full.estimate(design.shape[1] + i)]
        rows.append((b, *offset, drift[0], drift[1], drift[2]))
    names = ["bits", "offset", "low", "high", "drift", "drift_low", "drift_high"]
    return Parallel(
        reference=reference,
        knots=at,
        base=plain.beta[:k],
        offsets=pd.DataFrame(rows, columns=names).sort_values("bits").set_index("bits"),
        f=f,
        p=_tail(f, df1, df2),
        df1=max(df1, 0),
        df2=max(df2, 0),
        rmse=float(np.sqrt(plain.left / plain.free)) if plain.free else float("nan"),
        n=len(y),
        censored=int(cells["diverged"].sum()),
    )


def hats(x: Floats, knots: Floats) -> Floats:
    """Return the piecewise linear functions that are 1 at a knot, 0 at the others [n, k]; the ends go on straight."""
    if len(knots) < 2:
        return np.ones((len(x), 1))
    segment = np.clip(np.searchsorted(knots, x, side="right") - 1, 0, len(knots) - 2)
    part = (x - knots[segment]) / (knots[segment + 1] - knots[segment])
    found = np.zeros((len(x), len(knots)))
    rows = np.arange(len(x))
    found[rows, segment], found[rows, segment + 1] = 1 - part, part
    return found


@dataclass(frozen=True, kw_only=True)
class ParallelCurves:
    """``parallel_curves`` as a law: what a cell has is the base at its bits plus its precision's offset."""

    name: str = "parallel curves"
    formula: str = "L = f(log2 total bits) + offset(bits), f piecewise linear"
    knots: int | None = field(default=None)

    def fit(self, cells: pd.DataFrame, near: Fitted | None = None) -> Fitted:
        """Fit it by least squares, which has one answer.

        Args:
            cells: of one curve over sizes.
            near: not needed.

        Raises:
            ValueError: see ``parallel_curves``.
        """
        del near
        found = parallel_curves(cells, knots=self.knots)
        rows = found.offsets.drop(index=found.reference)
        offsets = found.offsets["offset"]

        def predict(own: pd.DataFrame) -> Floats:
            x = np.log2(own["total_bits"].to_numpy(dtype=float))
            base = hats(x, found.knots) @ found.base
            return np.asarray(base + own["bits"].map(offsets).to_numpy(dtype=float), dtype=np.float64)

        names = [f"offset at {b} bits" for b in rows.index]
        intervals = {n: (float(lo), float(hi)) for n, lo, hi in zip(names, rows["low"], rows["high"], strict=True)}
        return Fitted(
            parameters={n: float(o) for n, o in zip(names, rows["offset"], strict=True)},
            predict=predict,
            intervals=intervals,
            note=f"offsets from {found.reference} bits at equal total bits",
        )


@dataclass(frozen=True, kw_only=True)
class _Least:
    """Least squares: coefficients, squares left, rank, and (XᵀX)⁺ for standard errors."""

    beta: Floats
    left: float
    rank: int
    free: int
    inverse: Floats
    design: Floats

    @classmethod
    def of(cls, design: Floats, y: Floats) -> _Least:
        solved, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
        beta: Floats = solved.astype(np.float64)
        left = float(((y - design @ beta) ** 2).sum())
        inverse: Floats = np.linalg.pinv(design.T @ design).astype(np.float64)
        return cls(beta=beta, left=left, rank=int(rank), free=len(y) - int(rank), inverse=inverse, design=design)

    def estimate(self, column: int) -> tuple[float, float, float]:
        """(estimate, low, high) of a coefficient; NaN where the design can't tell it, no width without residuals."""
        from scipy.stats import t

        nothing = float("nan")
        rest = np.delete(self.design, column, axis=1)
        if np.linalg.matrix_rank(rest) == self.rank:
            return nothing, nothing, nothing
        value = float(self.beta[column])
        if self.free < 1:
            return value, nothing, nothing
        half = float(t.ppf(0.5 + LEVEL / 2, self.free) * np.sqrt(self.left / self.free * self.inverse[column, column]))
        return value, value - half, value + half


def _tail(f: float, df1: int, df2: int) -> float:
    from scipy.stats import f as f_distribution

    return float(f_distribution.sf(f, df1, df2)) if np.isfinite(f) else float("nan")
