"""q4_K, q5_K, q6_K: blocks of 256 values, whose sub-blocks have scales in few bits under one or two of float16.

The search is llama.cpp's without an importance matrix, with its order of every sum, since float32 sums depend on it.
Values lie as [values of a sub-block, sub-blocks], so that each step is a run over memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from kbit.ggml.simple import as_bytes, as_float
from kbit.quantizer.storage import divided

VALUES: Final = 256
SUB: Final = 32
"""Values of a sub-block of q4_K and q5_K."""
SUB_6: Final = 16
"""Values of a sub-block of q6_K."""
TINY: Final = 1e-15
"""A sub-block of q6_K whose magnitudes lie below is zero."""
MOST: Final = 63
"""The largest scale, and offset, of a sub-block in six bits."""
STEPS_6: Final = tuple(step for step in range(-9, 10) if step)


@dataclass(frozen=True, kw_only=True)
class Search:
    """The candidates for a sub-block's scale: (start + i * step + top) / range for i = 0 … steps."""

    start: float
    step: float
    steps: int


SEARCHES: Final = {4: Search(start=-1.0, step=0.1, steps=20), 5: Search(start=-0.5, step=0.1, steps=15)}
"""By bits of a code."""


def quantize_offset(x: Tensor, out: Tensor, bits: int) -> Tensor:
    """Write q4_K or q5_K: value = d * scale * code - dmin * offset, scale and offset of a sub-block in six bits.

    Args:
        x: float32 [blocks, 256].
        out: uint8 [blocks, bytes of a block].
        bits: of a code.

    Returns:
        float32 [blocks]: not finite where a value isn't, or a scale is too large for float16.
    """
    values = x.view(-1, SUB).t().contiguous()
    fit = _fit_offset(values, bits)
    scales, offsets = fit.scale.view(-1, 8), fit.low.view(-1, 8).abs()  # abs: no -0
    largest, lowest = scales.amax(1).clamp_min(0), offsets.amax(1)
    in_scales, in_offsets = _in_six_bits(scales, largest), _in_six_bits(offsets, lowest)
    d, dmin = divided(largest, MOST).half(), divided(lowest, MOST).half()
    scale = (d.float()[:, None] * in_scales).view(-1)
    offset = (dmin.float()[:, None] * in_offsets).view(-1)
    codes = (values + offset).div_(scale).round_().clamp_(0, 2**bits - 1)
    zero = (scale == 0).nonzero()[:, 0]  # nothing to divide by: the search's own codes stay
    if len(zero):
        codes[:, zero] = fit.codes(values, zero, 2**bits - 1)
    of_sub = codes.to(torch.uint8).t().reshape(-1, 8, SUB)
    out[:, :2], out[:, 2:4] = as_bytes(d), as_bytes(dmin)
    _write_scales(in_scales.to(torch.uint8), in_offsets.to(torch.uint8), out[:, 4:16])
    if bits == 5:
        bit = 1 << torch.arange(8, dtype=torch.uint8, device=x.device)
        out[:, 16:48] = ((of_sub >> 4) * bit[:, None]).sum(1, dtype=torch.uint8)
        of_sub = of_sub & 15
    out[:, -128:] = (of_sub[:, 0::2] | (of_sub[:, 1::2] << 4)).reshape(-1, 128)
    return x.amax(1) - x.amin(1) + d + dmin


def quantize_6bit(x: Tensor, out: Tensor, bits: int) -> Tensor:
    """Write q6_K: value = d * scale * (code - 32), scale of a sub-block in eight bits. As ``quantize_offset``."""
    half = 1 << (bits - 1)
    values = x.view(-1, SUB_6).t().contiguous()
    scales, inverse = _fit_symmetric(values, half)
    of_block = scales.view(-1, 16)
    largest = of_block.gather(1, of_block.abs().argmax(1, keepdim=True))
    empty = largest.abs() < TINY
    factor = _over(-128, largest).masked_fill_(empty, 0)
    d = factor.reciprocal().masked_fill_(empty, 0).half()
    in_scales = (factor * of_block).round_().clamp_(max=127)
    scale = (d.float() * in_scales).view(-1)
    codes = (values / scale).round_().clamp_(-half, half - 1)
    zero = (scale == 0).nonzero()[:, 0]
    if len(zero):
        kept = (values[:, zero] * inverse[zero]).round_().clamp_(-half, half - 1)
        codes[:, zero] = torch.where((inverse[zero] == 0) | empty.view(-1)[zero // 16], float(-half), kept)
    of_part = codes.add_(half).to(torch.uint8).t().reshape(-1, 2, 4, 32)
    low, high = of_part & 15, of_part >> 4
    out[:, :128] = (low[:, :, :2] | (low[:, :, 2:] << 4)).reshape(-1, 128)
    pairs = high[:, :, :2] | (high[:, :, 2:] << 4)
    out[:, 128:192] = (pairs[:, :, 0] | (pairs[:, :, 1] << 2)).reshape(-1, 64)
    out[:, 192:208], out[:, 208:] = in_scales.to(torch.int8).view(torch.uint8), as_bytes(d)
    return x.amax(1) - x.amin(1) + d[:, 0]


def dequantize_offset(blocks: Tensor, bits: int) -> Tensor:
    """Return float32 [blocks, 256] of uint8 [blocks, bytes of a block]."""
    in_scales, in_offsets = _read_scales(blocks[:, 4:16])
    packed = blocks[:, -128:].reshape(-1, 4, 1, SUB)
    codes = torch.cat([packed & 15, packed >> 4], dim=2).view(-1, 8, SUB)
    if bits == 5:
        bit = torch.arange(8, dtype=torch.uint8, device=blocks.device)
        codes |= ((blocks[:, 16:48][:, None, :] >> bit[:, None]) & 1) << 4
    scale, offset = as_float(blocks[:, :2]) * in_scales, as_float(blocks[:, 2:4]) * in_offsets
    return codes.float().mul_(scale[:, :, None]).sub_(offset[:, :, None]).view(-1, VALUES)


def dequantize_6bit(blocks: Tensor, bits: int) -> Tensor:
    """As ``dequantize_offset``."""
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)[:, None]
    codes = torch.cat([low & 15, low >> 4], dim=2) | (((high >> shifts) & 3) << 4)
    scale = as_float(blocks[:, 208:]) * blocks[:, 192:208].view(torch.int8).float()
    codes = codes.reshape(-1, 16, SUB_6).float().sub_(1 << (bits - 1))
    return codes.mul_(scale[:, :, None]).view(-1, VALUES)


@dataclass(kw_only=True, eq=False)
class _Fit:
    """The best scale and least value of each sub-block, float32 [sub-blocks], and what its codes were found with."""

    scale: Tensor
    low: Tensor
    inverse: Tensor
    base: Tensor

    def codes(self, values: Tensor, chosen: Tensor, top: int) -> Tensor:
        """Return the codes of some sub-blocks, float32 [values, chosen]."""
        return (values[:, chosen] - self.base[chosen]).mul_(self.inverse[chosen]).round_().clamp_(0, top)


def _fit_offset(x: Tensor, bits: int) -> _Fit:
    """Search the scale and least value (at most 0) of least squared error, each value weighted by rms + |x|.

    Each candidate scale gives codes, and these by weighted least squares the scale and least value that are tried. The
    codes of later candidates begin at the best least value so far.
    """
    top, search = 2**bits - 1, SEARCHES[bits]
    # In float64: torch's square root of float32 may be a unit in the last place off.
    weight = x.abs().add_((_in_order(x.square()) / SUB).double().sqrt_().float())
    low, high = x.amin(0), x.amax(0)
    low = low.clamp_max(0)
    same = high == low
    sums = _Sums(x=x, weight=weight)
    span = torch.where(same, 1.0, high - low)
    inverse, base = _over(top, span), low.clone()
    scale = inverse.reciprocal()
    sums.round(low, inverse, top)
    best = sums.error(scale, low)
    for i in range(search.steps + 1):
        tried = _over(_float32(search.start, search.step, i, top), torch.where(same, 1.0, high - low))
        sums.round(low, tried, top)
        new_scale, new_low, exists = sums.solve()
        error = sums.error(new_scale, new_low)
        better = exists & (error < best)
        base, inverse = torch.where(better, low, base), torch.where(better, tried, inverse)
        scale, low = torch.where(better, new_scale, scale), torch.where(better, new_low, low)
        best = torch.where(better, error, best)
    scale, inverse = scale.masked_fill_(same, 0), inverse.masked_fill_(same, 0)
    return _Fit(scale=scale, low=low, inverse=inverse, base=base)


class _Sums:
    """Buffers of a search, each of the shape of x, and the weighted sums over a sub-block's values."""

    def __init__(self, *, x: Tensor, weight: Tensor) -> None:
        self.x, self.weight = x, weight
        self.codes, self._work = torch.empty_like(x), torch.empty_like(x)
        self._parts = x.new_empty(len(x), 3, x.shape[1])
        self.total, self.x_total = _in_order(weight), _in_order(torch.mul(weight, x, out=self._work))

    def round(self, low: Tensor, inverse: Tensor, top: int) -> None:
        """Make the codes of a candidate."""
        torch.sub(self.x, low, out=self.codes).mul_(inverse).round_().clamp_(0, top)

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scale and least value of least error for the codes, and where these exist."""
        weighted = torch.mul(self.weight, self.codes, out=self._parts[:, 0])
        torch.mul(weighted, self.codes, out=self._parts[:, 1])
        torch.mul(weighted, self.x, out=self._parts[:, 2])
        codes, squares, products = _in_order(self._parts)
        determinant = self.total * squares - codes * codes
        scale = (self.total * products - self.x_total * codes) / determinant
        low = (squares * self.x_total - codes * products) / determinant
        above = low > 0
        scale = torch.where(above, products / squares, scale)
        return scale, low.masked_fill_(above, 0), determinant > 0

    def error(self, scale: Tensor, low: Tensor) -> Tensor:
        """Return the weighted squared error of the codes."""
        difference = torch.mul(self.codes, scale, out=self._work).add_(low).sub_(self.x)
        return _in_order(difference.square_().mul_(self.weight))


def _fit_symmetric(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Search the scale of most explained squares, each value weighted by x²: around the one that takes the largest
    magnitude to -half. Returns it, float32 [sub-blocks], and by what its codes were found; 0 for an empty sub-block.
    """
    low, high = x.amin(0), x.amax(0)
    largest = torch.where(high >= -low, high, low)
    tied = (high == -low).nonzero()[:, 0]
    if len(tied):
        columns = x[:, tied]
        largest[tied] = columns.gather(0, columns.abs().argmax(0, keepdim=True))[0]
    empty = largest.abs() < TINY
    weight = x.square()
    products = weight * x
    codes, parts = torch.empty_like(x), x.new_empty(len(x), 2, x.shape[1])

    def sums(inverse: Tensor) -> tuple[Tensor, Tensor]:
        torch.mul(x, inverse, out=codes).round_().clamp_(-half, half - 1)
        torch.mul(products, codes, out=parts[:, 0])
        torch.mul(weight, codes, out=parts[:, 1]).mul_(codes)
        with_x, squares = _in_order(parts)
        return with_x, squares

    divisor = torch.where(empty, 1.0, largest)
    inverse = _over(-half, divisor)
    with_x, squares = sums(inverse)
    scale = torch.where(squares > 0, with_x / squares, 0.0)
    best = scale * with_x
    for step in STEPS_6:
        tried = _over(-_float32(0.0, 0.1, step, half), divisor)
        with_x, squares = sums(tried)
        better = (squares > 0) & (with_x * with_x > best * squares)
        new = with_x / squares
        scale, inverse = torch.where(better, new, scale), torch.where(better, tried, inverse)
        best = torch.where(better, new * with_x, best)
    return scale.masked_fill_(empty, 0), inverse.masked_fill_(empty, 0)


def _in_order(parts: Tensor) -> Tensor:
    """Sum over the first dimension, one after the other: float32 sums depend on their order."""
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    return total


def _over(numerator: float, divisor: Tensor) -> Tensor:
    """Return a quotient as IEEE float32 has it: torch multiplies a number over a tensor by the reciprocal."""
    return torch.full_like(divisor, numerator).div_(divisor)


def _float32(start: float, step: float, i: int, top: int) -> float:
    """Return start + step * i + top, each operation rounded to float32."""
    f = np.float32
    return float(f(start) + f(step) * f(i) + f(top))


def _in_six_bits(values: Tensor, largest: Tensor) -> Tensor:
    """Return values [blocks, 8] as 0 … 63, 63 for the largest; float32."""
    inverse = _over(MOST, largest).masked_fill_(largest <= 0, 0)
    return (inverse[:, None] * values).round_().clamp_(0, MOST)


def _write_scales(scales: Tensor, offsets: Tensor, out: Tensor) -> None:
    """Put eight scales and offsets of six bits into twelve bytes.

    The first four of each have a byte, whose upper two bits are those of the other four; the lower bits of these share
    a byte.
    """
    out[:, :4] = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    out[:, 4:8] = offsets[:, :4] | ((offsets[:, 4:] >> 4) << 6)
    out[:, 8:] = (scales[:, 4:] & 15) | ((offsets[:, 4:] & 15) << 4)


def _read_scales(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverse of ``_write_scales``, float32 [blocks, 8] each."""
    a, b, both = stored[:, :4], stored[:, 4:8], stored[:, 8:]
    scales = torch.cat([a & 63, (both & 15) | ((a >> 6) << 4)], dim=1)
    offsets = torch.cat([b & 63, (both >> 4) | ((b >> 6) << 4)], dim=1)
    return scales.float(), offsets.float()
