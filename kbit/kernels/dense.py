"""Products with a weight that was dequantized, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def product(x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None, out: Tensor) -> None:
    """Fill `out` with x · weight^T (+ bias + addend), summed in float32 and rounded once.

    Args:
        x: [m, k], float32, or on a GPU a 16-bit dtype.
        weight: [n, k] of x's dtype.
        bias: [n] of x's dtype.
        addend: float32 [m, n].
        out: [m, n] of x's dtype, its rows anywhere.
    """
    if addend is not None:
        is_wide = x.dtype == torch.float32
        sums = torch.mm(x, weight.T) if is_wide else torch.mm(x, weight.T, out_dtype=torch.float32)
        sums.add_(addend)
        out.copy_(sums if bias is None else sums.add_(bias))
    elif bias is not None:
        torch.addmm(bias, x, weight.T, out=out)
    else:
        torch.mm(x, weight.T, out=out)
