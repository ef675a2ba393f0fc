"""Second moments of a layer's inputs, and the factor of their inverse by which GPTQ corrects.

Frantar et al. 2022, sections 3.2-3.4: the layer's squared output error is Σ (w - ŵ) H (w - ŵ)^T over its rows with
H = 2/n Σ x x^T, and rounding column by column needs the rows of the upper Cholesky factor of H^-1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kbit.errors import HessianError
from kbit.quantizer.rotation import rotate

DAMPING: Final = (0.01, 0.1, 1.0)
"""Shares of the mean diagonal that are added to it, one after another, until there is a Cholesky factor."""
_ROWS: Final = 1 << 16
"""Tokens that are multiplied at once where they are cast to float32 first."""


class SecondMoments:
    """H = 2/n Σ x x^T of a layer's inputs, accumulated in float32.

    Args:
        in_features: of the layer.
        device: of the inputs.

    Attributes:
        tokens: n, so far.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.tokens = 0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take in inputs: floating point, [tokens, in_features], on the device. No tokens change nothing."""
        if not len(x):
            return
        self.tokens += x.shape[0]
        if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
            # Products of 16-bit numbers are exact in float32, so that only their sum is rounded.
            self._sum += torch.mm(x.t(), x, out_dtype=torch.float32)
            return
        for part in torch.split(x, _ROWS):
            wide = part.float()
            self._sum.addmm_(wide.t(), wide)

    def take(self) -> Tensor:
        """Return H, float32 [in_features, in_features], which is the caller's from now on; this object is done.

        Raises:
            HessianError: an input was NaN or infinite.
        """
        h, self._sum = self._sum, self._sum.new_zeros(0, 0)
        h *= 2 / max(1, self.tokens)
        # Where an entry overflows, those of its row and column on the diagonal do.
        if not bool(h.diagonal().isfinite().all()):
            raise HessianError(
                "inputs on calibration data are NaN or infinite, or their squares too large for float32: compute in a "
                "dtype of wider range (calibration.compute_dtype=bfloat16 or float32)"
            )
        return h


@dataclass(frozen=True, kw_only=True, eq=False)
class Correction:
    """By what the columns to come are corrected: the same for all layers that share an input.

    Attributes:
        upper: U with H^-1 = U^T U, upper triangular, float32 [in, in], in the order in which columns go.
        order: int64 [in], the column that goes at each place; None for their own order.
        dead: bool [in], inputs that are always zero, in the columns' own order.
    """

    upper: Tensor
    order: Tensor | None
    dead: Tensor


@torch.no_grad()
def correction(h: Tensor, *, act_order: bool = False, rotation: int | None = None) -> Correction:
    """Factor the inverse of second moments.

    A dead input (H_ii = 0) has H_ii = 1. Then 0.01 of the mean diagonal is added to the diagonal, and on each failure
    of the factorization ten times as much.

    Args:
        h: symmetric, float32 [in, in]; it is changed.
        act_order: columns go by descending diagonal, of equals the first ones first.
        rotation: seed of the rotation of the inputs that the weight is quantized in (``kbit.quantizer.rotation``).

    Returns:
        The correction. Beside `h` there are at most three matrices of its size at work, and one at the end.

    Raises:
        HessianError: none of the three dampings has a factor.
    """
    diagonal = h.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    if rotation is not None:
        h.copy_(rotate(rotate(h, rotation).t(), rotation))
    order = torch.argsort(h.diagonal(), descending=True, stable=True) if act_order else None
    if order is not None:
        h.copy_(h[order][:, order])  # in place: a caller may hold it
    mean = float(h.diagonal().mean())
    for share in DAMPING:
        upper = _inverse_factor(h, share * mean)
        if upper is not None:
            return Correction(upper=upper, order=order, dead=dead)
    tried = ", ".join(f"{share:g}" for share in DAMPING)
    raise HessianError(
        f"second moments of the inputs have no Cholesky factor with {tried} times their mean diagonal ({mean:.3g}) "
        "added: they are too ill-conditioned for float32. Calibrate on other or more text (calibration.set, .samples)"
    )


def _inverse_factor(h: Tensor, damping: float) -> Tensor | None:
    """Return upper U with (h + damping I)^-1 = U^T U; None where h + damping I is not positive definite in float32.

    With rows and columns reversed, h = L L^T makes U the reversed L^-1: one factorization instead of two and an inverse
    between them.
    """
    reverse = h.flip(0, 1)
    reverse.diagonal().add_(damping)
    lower, info = torch.linalg.cholesky_ex(reverse)
    del reverse
    if int(info) != 0:
        return None
    # Solutions come in column-major order: of the transposed system that is the row-major order of the inverse.
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    inverse = torch.linalg.solve_triangular(lower.mT, eye, upper=True)
    del lower, eye
    upper = inverse.mT.flip(0, 1).contiguous()
    return upper if bool(upper.diagonal().isfinite().all()) else None
