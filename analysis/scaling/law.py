"""The protocol of laws: a formula, a fit, what it predicts; and their intervals and errors out of sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.significance import LEVEL
from kbit.specs.base import BASELINE_BITS

Floats = NDArray[np.float64]
Predict = Callable[[pd.DataFrame], Floats]

MIN_MODELS: Final = 3
"""Models from which an interval over models is stated."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A law fitted to ``LawPoints.cells``.

    Attributes:
        parameters: by name.
        predict: the metric of each of some cells [n], NaN where the law can't say. It may read their bits, sizes,
            tokens and 16-bit value ('baseline'), never their own value.
        intervals: (low, high) of parameters where the fit itself gives them; others are bootstrapped.
        between: parameters that only differences between models tell (an exponent of size); the others are told by
            differences within a model as well.
        note: what a reader has to know, in a sentence; empty without.
    """

    parameters: Mapping[str, float]
    predict: Predict
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    between: frozenset[str] = frozenset()
    note: str = ""


class Law(Protocol):
    """A law: its name, its formula for people, and its fit."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def formula(self) -> str:
        """It, as people write it."""

    def fit(self, cells: pd.DataFrame, near: Fitted | None = None) -> Fitted:
        """Fit it to ``LawPoints.cells`` of one family.

        Args:
            cells: the cells.
            near: a fit to much the same cells, near which the best is looked for; None looks everywhere.

        Raises:
            ValueError: the cells can't tell its parameters; the message says what is missing.
        """


def bootstrap(
    law: Law, cells: pd.DataFrame, fitted: Fitted, *, draws: int, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval of each parameter, by resampling models with all their cells and checkpoints.

    It is the estimate ± t x s, with s the draws' standard deviation (of the middle 68 %, which draws of few distinct
    models don't blow up) and Student's t of the number of models less one, or less two for what only differences
    between models tell; s is enlarged by the same lost degrees of freedom. Draws in which a law can't be fitted are
    drawn again. NaN where there are fewer than ``MIN_MODELS`` models, or most draws can't be fitted.

    Args:
        law: what is fitted.
        cells: of one family.
        fitted: the fit to all of them.
        draws: bootstrap samples.
        seed: of the draws.
    """
    names = [n for n in fitted.parameters if n not in fitted.intervals]
    nothing = {n: (float("nan"), float("nan")) for n in names}
    code, _ = pd.factorize(cells["model"], sort=True)
    groups = [np.flatnonzero(code == i) for i in range(code.max(initial=-1) + 1)]
    models = len(groups)
    if models < MIN_MODELS or not names or draws < 1:
        return {**nothing, **fitted.intervals}
    rng = np.random.default_rng(seed)
    found: list[list[float]] = []
    for _ in range(4 * draws):
        drawn = [groups[i] for i in rng.integers(0, models, models)]
        try:
            again = law.fit(cells.take(np.concatenate(drawn)), near=fitted)
        except ValueError:
            continue
        if set(names) <= set(again.parameters):
            found.append([again.parameters[n] for n in names])
        if len(found) == draws:
            break
    if len(found) < draws:
        return {**nothing, **fitted.intervals}
    low, high = np.quantile(np.array(found), [0.1587, 0.8413], axis=0)
    spread = (high - low) / 2
    return {
        **{
            n: _around(fitted.parameters[n], s, models, 1 + (n in fitted.between))
            for n, s in zip(names, spread, strict=True)
        },
        **fitted.intervals,
    }


def _around(estimate: float, spread: float, models: int, lost: int) -> tuple[float, float]:
    from scipy.stats import t

    free = max(1, models - lost)
    half = float(t.ppf(0.5 + LEVEL / 2, free)) * float(spread) * float(np.sqrt(models / free))
    return estimate - half, estimate + half


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """How far a law is off on the quantized cells of the largest model, which it was not fitted to.

    Attributes:
        model: the largest; None where it can't be left out.
        error: mean absolute error over its cells, in the metric's unit; NaN where nothing could be predicted.
        n: cells that it goes over; cells: those that there were (finite).
    """

    model: str | None
    error: float = float("nan")
    n: int = 0
    cells: int = 0


def held_out(law: Law, cells: pd.DataFrame) -> HeldOut:
    """Fit a law without the quantized cells of the largest model, whose 16-bit cells it keeps, and predict them.

    Every law is compared so: post-training laws predict a change from the 16-bit loss, which they are given, and the
    others may use it too.
    """
    if cells["model"].nunique() < 2:
        return HeldOut(model=None)
    largest = str(cells.sort_values("params", kind="stable")["model"].iloc[-1])
    out = (cells["model"] == largest) & (cells["bits"] < BASELINE_BITS)
    test = cells[out & np.isfinite(cells["value"]) & ~cells["diverged"]]
    if test.empty:
        return HeldOut(model=str(largest))
    try:
        predicted = law.fit(cells[~out]).predict(test)
    except ValueError:
        return HeldOut(model=str(largest), cells=len(test))
    off = np.abs(predicted - test["value"].to_numpy(dtype=np.float64))
    known = np.isfinite(off)
    error = float(off[known].mean()) if known.any() else float("nan")
    return HeldOut(model=str(largest), error=error, n=int(known.sum()), cells=len(test))


def residuals(fitted: Fitted, cells: pd.DataFrame) -> tuple[float, float, int]:
    """(root mean square, R², cells) of what a law leaves of the finite quantized cells that it predicts.

    R² is of the metric among the quantized cells: 1 - sum of squares left / sum of squares about the mean.
    """
    own = cells[(cells["bits"] < BASELINE_BITS) & np.isfinite(cells["value"]) & ~cells["diverged"]]
    if own.empty:
        return float("nan"), float("nan"), 0
    value = own["value"].to_numpy(dtype=np.float64)
    off = fitted.predict(own) - value
    known = np.isfinite(off)
    if not known.any():
        return float("nan"), float("nan"), 0
    total = ((value[known] - value[known].mean()) ** 2).sum()
    left = (off[known] ** 2).sum()
    return float(np.sqrt(left / known.sum())), float(1 - left / total) if total > 0 else float("nan"), int(known.sum())
