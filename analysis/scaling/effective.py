"""Effective parameters: the size of the 16-bit model that is as good as a quantized one, read off the 16-bit curve.

No law is assumed: the curve of 16-bit models over the logarithm of their parameters is interpolated and inverted.
Kumar et al. (arXiv 2411.04330, section 4) give N_eff = N (1 - exp(-P / gamma)) for models trained in P bits;
``Effective`` fits that form to what is read off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.metrics import Metric
from analysis.scaling.law import Fitted
from kbit.specs.base import BASELINE_BITS

Floats = NDArray[np.float64]

_COLUMNS: Final = ["family", "curve", "model", "params", "bits", "bits_per_param", "effective", "ratio", "known"]


def effective_parameters(cells: pd.DataFrame, metric: Metric | None = None) -> pd.DataFrame:
    """Return the effective parameters of each quantized cell, by its own curve of 16-bit models.

    Where a larger 16-bit model is worse than a smaller one, the curve is replaced by the nearest one that never worsens
    (isotonic regression), and the smallest size of a flat stretch is taken.

    Args:
        cells: ``LawPoints.cells``.
        metric: decides what is better; None for a loss.

    Returns:
        One row a cell: family, curve, model, params, bits, bits_per_param, effective, ratio (effective / params), known
        ('yes'; 'at most': worse than the smallest 16-bit model, or diverged, so both numbers are upper bounds; 'at
        least': better than the largest). A curve of a single 16-bit model gives no rows.
    """
    effective, known = _effective(cells, 1.0 if metric is None else metric.sign)
    found = cells.assign(effective=effective, ratio=effective / cells["params"].to_numpy(dtype=float), known=known)
    wanted: pd.DataFrame = found[known != ""][_COLUMNS]
    return wanted.reset_index(drop=True)


def _effective(cells: pd.DataFrame, sign: float) -> tuple[Floats, NDArray[np.str_]]:
    """(effective parameters, what is known of them) of each cell [n]; empty text for a cell that has none."""
    size, value = cells["params"].to_numpy(dtype=float), sign * cells["value"].to_numpy(dtype=float)
    bits, diverged = cells["bits"].to_numpy(), cells["diverged"].to_numpy(dtype=bool)
    curve, _ = pd.factorize(cells["curve"])
    value = np.where(diverged, np.inf, value)
    effective, known = np.full(len(cells), np.nan), np.full(len(cells), "", dtype="<U8")
    for number in range(curve.max(initial=-1) + 1):
        own = (curve == number) & np.isfinite(size)
        base, quantized = own & (bits == BASELINE_BITS) & np.isfinite(value), own & (bits < BASELINE_BITS)
        if len(np.unique(size[base])) < 2 or not quantized.any():
            continue
        sizes, losses = monotone_curve(size[base], value[base])
        at = value[quantized]
        effective[quantized] = invert(sizes, losses, at)
        known[quantized] = np.select([at > losses[0], at < losses[-1]], ["at most", "at least"], "yes")
    return effective, known


def monotone_curve(size: Floats, loss: Floats) -> tuple[Floats, Floats]:
    """Return sizes in ascending order, each once, and the nearest losses that never rise with size."""
    from scipy.optimize import isotonic_regression

    sizes, where = np.unique(size, return_inverse=True)
    means = np.bincount(where, weights=loss) / np.bincount(where)
    return sizes, np.asarray(isotonic_regression(means, increasing=False).x, dtype=np.float64)


def invert(size: Floats, loss: Floats, value: Floats) -> Floats:
    """Return the size at which a curve that never rises has a loss, linear in log size; its ends beyond them [m]."""
    # np.interp needs a rising abscissa; of a flat stretch its first point, the smallest size, is kept.
    _, first = np.unique(loss, return_index=True)
    keep = np.sort(first)
    return np.asarray(np.exp(np.interp(-value, -loss[keep], np.log(size[keep]))), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Effective:
    """N_eff as a law: a share 1 - exp(-P / gamma) of the parameters counts; the loss is the 16-bit curve's there.

    Attributes:
        delta: Huber's threshold, of the logarithm of the share.
    """

    delta: float = 0.1
    name: str = "effective parameters"
    formula: str = "L = L16(N (1 - exp(-P / gamma))), L16 interpolated"

    def fit(self, cells: pd.DataFrame, near: Fitted | None = None) -> Fitted:
        """Fit gamma by Huber's loss of the logarithm of the share, over cells within the 16-bit curve.

        Args:
            cells: of any curves of one family.
            near: not needed: there is one parameter.

        Raises:
            ValueError: no curve, or cells within it at fewer than two precisions.
        """
        del near
        effective, known = _effective(cells, 1.0)
        ratio = effective / cells["params"].to_numpy(dtype=float)
        inside = (known == "yes") & (ratio < 1)
        p, ratio = cells["bits_per_param"].to_numpy(dtype=float)[inside], ratio[inside]
        if len(np.unique(p)) < 2:
            raise ValueError(
                "effective parameters need a 16-bit curve, and cells within it at two precisions: most are worse than "
                "the smallest 16-bit model, or as good as their own"
            )
        from scipy.optimize import minimize_scalar

        def off(log_gamma: float) -> float:
            predicted = -np.expm1(-p / np.exp(log_gamma))
            off = np.abs(np.log(predicted) - np.log(ratio))
            return float(np.where(off <= self.delta, off**2 / 2, self.delta * (off - self.delta / 2)).sum())

        starts = np.linspace(np.log(0.05), np.log(20.0), 60)
        best = float(starts[int(np.argmin([off(s) for s in starts]))])
        step = float(starts[1] - starts[0])
        gamma = float(np.exp(minimize_scalar(off, bounds=(best - step, best + step), method="bounded").x))
        curves = _sixteen(cells)

        def predict(own: pd.DataFrame) -> Floats:
            part = -np.expm1(-own["bits_per_param"].to_numpy(dtype=float) / gamma)
            log_size = np.log(own["params"].to_numpy(dtype=float) * part)
            values = np.full(len(own), np.nan)
            for curve, (size, loss) in curves.items():
                of_curve = (own["curve"] == curve).to_numpy()
                values[of_curve] = np.interp(log_size[of_curve], np.log(size), loss, left=np.nan, right=np.nan)
            return values

        count = int((known != "").sum())
        bounds = count - int(inside.sum())
        return Fitted(
            parameters={"gamma": gamma},
            predict=predict,
            note=f"{bounds} of {count} cells only bound their size and are not fitted" if bounds else "",
        )


def _sixteen(cells: pd.DataFrame) -> dict[str, tuple[Floats, Floats]]:
    base = cells[(cells["bits"] == BASELINE_BITS) & np.isfinite(cells["value"]) & ~cells["diverged"]]
    base = base.dropna(subset=["params"])
    return {
        str(curve): monotone_curve(own["params"].to_numpy(dtype=float), own["value"].to_numpy(dtype=float))
        for curve, own in base.groupby("curve")
        if own["params"].nunique() > 1
    }
