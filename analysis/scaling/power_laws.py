"""Power laws: of size and precision together, and of what post-training quantization adds to a loss.

``Bivariate`` is the law that the paper says fits poorly (section 4). ``PostTraining`` is the added loss as Ouyang et
al. (arXiv 2411.17691) and Kumar et al. (arXiv 2411.04330, section 3) write it. The papers' constants are of their data
and are no predictions: here everything is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.scaling.law import Fitted
from analysis.scaling.points import CENSORED_AT
from analysis.scaling.robust import HUBER, regress
from kbit.specs.base import BASELINE_BITS

Floats = NDArray[np.float64]

LEAST_CHANGE: Final = 1e-3
"""Nats a token below which a change from 16 bits counts as 'at most this': noise has no logarithm."""
_SEPARATE: Final = 0.3
"""Range of ln(tokens) from which their exponent can be told."""


@dataclass(frozen=True, kw_only=True)
class PostTraining:
    """The loss that quantization adds to a trained model: a power of size, of tokens, and of bits or an exponential.

    Attributes:
        bits: 'power' for Ouyang et al.: ΔL = k D^beta / (N^alpha P^gamma); 'exponential' for Kumar et al.:
            ΔL = C (D^gamma_D / N^gamma_N) exp(-P / gamma). N is without embeddings; P is the paper's count of bits per
            quantized weight, overhead included.
        least: a change below it is taken as censored there.
        censored_at: loss that a diverged cell is at least at (or a nat above its 16-bit model, if that is more).
        huber: of ``robust.regress``.
    """

    bits: Literal["power", "exponential"]
    least: float = LEAST_CHANGE
    censored_at: float = CENSORED_AT
    huber: float = HUBER

    @property
    def name(self) -> str:
        return "Ouyang et al." if self.bits == "power" else "Kumar et al., post-training"

    @property
    def formula(self) -> str:
        return (
            "ΔL = k D^beta / (N^alpha P^gamma)"
            if self.bits == "power"
            else "ΔL = C (D^gamma_D / N^gamma_N) exp(-P / gamma)"
        )

    def fit(self, cells: pd.DataFrame, near: Fitted | None = None) -> Fitted:
        """Fit it: linear in the logarithms, so one start is enough (the loss is convex).

        Args:
            cells: of one family, with their 16-bit values; of all its checkpoints.
            near: not needed.

        Raises:
            ValueError: fewer cells or different sizes or precisions than its parameters need.
        """
        del near
        own = cells[(cells["bits"] < BASELINE_BITS) & np.isfinite(cells["baseline"])]
        y, side = self._changes(own)
        with_tokens = _tokens_vary(own)
        center = self._center(own)
        design = self._design(own, center, with_tokens)
        if (side == 0).sum() <= design.shape[1]:
            raise ValueError(f"{int((side == 0).sum())} changes above {self.least:g} nats are too few for {self.name}")
        found = regress(design, y, side, huber=self.huber)

        def predict(new: pd.DataFrame) -> Floats:
            change = np.exp(self._design(new, center, with_tokens) @ found.coefficients)
            return np.asarray(new["baseline"].to_numpy(dtype=float) + change, dtype=np.float64)

        return Fitted(
            parameters=self._parameters(found.coefficients, center, with_tokens),
            predict=predict,
            between=frozenset({"alpha", "gamma_N", "ln k", "ln C"}),
            note=_note(own, side, with_tokens, self.least),
        )

    def _changes(self, own: pd.DataFrame) -> tuple[Floats, NDArray[np.int_]]:
        """ln of the change [n] or of the bound on it, and which it is (``robust.regress``)."""
        change, baseline = own["change"].to_numpy(dtype=float), own["baseline"].to_numpy(dtype=float)
        diverged = own["diverged"].to_numpy(dtype=bool)
        bound = np.maximum(self.censored_at - baseline, 1.0)
        low = ~diverged & (change < self.least)
        value = np.select([diverged, low], [bound, self.least], np.where(np.isfinite(change), change, 1.0))
        return np.log(value), np.select([diverged, low], [1, -1], 0)

    def _center(self, own: pd.DataFrame) -> tuple[float, float, float]:
        """Middle of ln N, ln D and of the bits' term: far from 0 a fit can't tell the constant from exponents."""
        n, d, p = self._terms(own)
        if not len(n):
            return 0.0, 0.0, 0.0
        return float(n.mean()), float(np.nanmean(d)) if np.isfinite(d).any() else 0.0, float(p.mean())

    def _terms(self, own: pd.DataFrame) -> tuple[Floats, Floats, Floats]:
        n = np.log(own["quantized"].to_numpy(dtype=float))
        d = np.log(own["tokens"].to_numpy(dtype=float))
        p = own["bits_per_param"].to_numpy(dtype=float)
        return n, d, np.log(p) if self.bits == "power" else p

    def _design(self, own: pd.DataFrame, center: tuple[float, float, float], with_tokens: bool) -> Floats:
        n, d, p = (term - c for term, c in zip(self._terms(own), center, strict=True))
        columns = [np.ones(len(own)), n, p, *([d] if with_tokens else [])]
        return np.column_stack(columns)

    def _parameters(self, b: Floats, center: tuple[float, float, float], with_tokens: bool) -> dict[str, float]:
        n, d, p = center
        tokens = float(b[3]) if with_tokens else 0.0
        constant = float(b[0] - b[1] * n - b[2] * p - tokens * d)
        if self.bits == "power":
            found = {"ln k": constant, "alpha": -float(b[1]), "gamma": -float(b[2])}
            return {**found, "beta": tokens} if with_tokens else found
        found = {"ln C": constant, "gamma_N": -float(b[1]), "1/gamma": -float(b[2])}
        return {**found, "gamma_D": tokens} if with_tokens else found


@dataclass(frozen=True, kw_only=True)
class Bivariate:
    """L = E + A N^-alpha P^-beta of parameters and stored bits a weight (16 for the baseline), in the logarithm of L.

    Attributes:
        delta: Huber's threshold, of ln L (Hoffmann et al. 2022, arXiv 2203.15556, take the same).
        starts: random starts, of which the best ``followed`` are followed to a minimum.
        censored_at: loss that a diverged cell is at least at; what is predicted above it costs nothing.
    """

    delta: float = 1e-3
    starts: int = 500
    followed: int = 8
    censored_at: float = CENSORED_AT
    name: str = "bivariate power law"
    formula: str = "L = E + A N^-alpha P^-beta"

    def fit(self, cells: pd.DataFrame, near: Fitted | None = None) -> Fitted:
        """Fit it from many starts; the best counts.

        Args:
            cells: of one family.
            near: the only start, where it is given.

        Raises:
            ValueError: fewer than two sizes or two precisions, or no more cells than parameters.
        """
        own = cells[(np.isfinite(cells["value"]) | cells["diverged"]) & (cells["params"] > 0)]
        seen = own[~own["diverged"]]
        if seen["params"].nunique() < 2 or seen["bits"].nunique() < 2 or len(seen) < 5:
            raise ValueError(
                "a bivariate power law needs two sizes, two precisions and five cells that did not diverge"
            )
        if not (seen["value"] > 0).all():
            raise ValueError("a bivariate power law needs positive values: a loss")
        from scipy.optimize import least_squares

        problem = _Power.of(own, self.censored_at)
        starts = problem.starts(self.delta, self.starts, self.followed)
        if near is not None:
            starts = [problem.start(near.parameters)]
        best = min(
            (
                least_squares(problem.off, start, jac=problem.slope, loss="huber", f_scale=self.delta, max_nfev=200)
                for start in starts
            ),
            key=lambda found: float(found.cost),
        )
        log_e, log_a, alpha, beta = (float(v) for v in best.x)

        def predict(new: pd.DataFrame) -> Floats:
            return np.asarray(np.exp(problem.log_loss(best.x, *problem.terms(new))), dtype=np.float64)

        return Fitted(
            parameters={
                "E": float(np.exp(log_e)),
                "ln A": log_a + alpha * problem.center[0] + beta * problem.center[1],
                "alpha": alpha,
                "beta": beta,
            },
            predict=predict,
            between=frozenset({"E", "ln A", "alpha"}),
        )


@dataclass(frozen=True, kw_only=True)
class _Power:
    """The residuals of ``Bivariate``: parameters are ln E, ln A (at the middle of ln N and ln P), alpha, beta."""

    n: Floats
    p: Floats
    y: Floats
    diverged: NDArray[np.bool_]
    center: tuple[float, float]

    @classmethod
    def of(cls, own: pd.DataFrame, censored_at: float) -> _Power:
        n, p = np.log(own["params"].to_numpy(dtype=float)), np.log(own["bits_per_param"].to_numpy(dtype=float))
        diverged = own["diverged"].to_numpy(dtype=bool)
        value = np.where(diverged, censored_at, own["value"].to_numpy(dtype=float))
        center = (float(n.mean()), float(p.mean()))
        return cls(n=n - center[0], p=p - center[1], y=np.log(value), diverged=diverged, center=center)

    def terms(self, own: pd.DataFrame) -> tuple[Floats, Floats]:
        n, p = np.log(own["params"].to_numpy(dtype=float)), np.log(own["bits_per_param"].to_numpy(dtype=float))
        return n - self.center[0], p - self.center[1]

    @staticmethod
    def log_loss(theta: Floats, n: Floats, p: Floats) -> Floats:
        return np.asarray(np.logaddexp(theta[0], theta[1] - theta[2] * n - theta[3] * p), dtype=np.float64)

    def off(self, theta: Floats) -> Floats:
        off = self.log_loss(theta, self.n, self.p) - self.y
        return np.where(self.diverged, np.minimum(off, 0.0), off)

    def slope(self, theta: Floats) -> Floats:
        log_loss = self.log_loss(theta, self.n, self.p)
        part = np.exp(theta[1] - theta[2] * self.n - theta[3] * self.p - log_loss)
        found = np.column_stack([np.exp(theta[0] - log_loss), part, -part * self.n, -part * self.p])
        counts = ~self.diverged | (log_loss < self.y)
        return np.where(counts[:, None], found, 0.0)

    def start(self, known: Mapping[str, float]) -> Floats:
        log_a = known["ln A"] - known["alpha"] * self.center[0] - known["beta"] * self.center[1]
        return np.array([np.log(known["E"]), log_a, known["alpha"], known["beta"]])

    def starts(self, delta: float, starts: int, followed: int) -> list[Floats]:
        """Return the best ``followed`` of ``starts`` random starts, by Huber's loss."""
        seen = np.exp(self.y[~self.diverged])
        floor, middle = float(seen.min()), float(np.median(seen))
        rng = np.random.default_rng(0)
        e = floor * rng.uniform(0.05, 0.99, starts)
        a = np.log(np.maximum(middle - e, 1e-3 * floor))
        theta = np.column_stack([np.log(e), a, rng.uniform(0, 1, starts), rng.uniform(0, 8, starts)])
        off = np.abs([self.off(t) for t in theta])
        cost = np.where(off <= delta, off**2 / 2, delta * (off - delta / 2)).sum(axis=1)
        return [theta[i] for i in np.argsort(cost)[:followed]]


def _tokens_vary(own: pd.DataFrame) -> bool:
    """Tokens are known of every cell, and differ enough for an exponent, apart from size."""
    tokens = own["tokens"].to_numpy(dtype=float)
    if not (np.isfinite(tokens) & (tokens > 0)).all() or len(tokens) == 0:
        return False
    d, n = np.log(tokens), np.log(own["quantized"].to_numpy(dtype=float))
    if np.ptp(d) < _SEPARATE:
        return False
    return bool(np.ptp(n) == 0 or abs(np.corrcoef(d, n)[0, 1]) < 0.999)


def _note(own: pd.DataFrame, side: NDArray[np.int_], with_tokens: bool, least: float) -> str:
    said = []
    if with_tokens:
        said.append("tokens and the phase of the learning rate go together in checkpoints: D may stand for either")
    else:
        known = np.isfinite(own["tokens"].to_numpy(dtype=float)).all() and len(own) > 0
        said.append(
            "without D: " + ("tokens don't differ apart from size" if known else "tokens are not known of all models")
        )
    if (side < 0).any():
        said.append(f"{int((side < 0).sum())} changes below {least:g} nats count as at most that")
    if (side > 0).any():
        said.append(f"{int((side > 0).sum())} diverged cells count as at least the loss at which one is called so")
    return "; ".join(said)
