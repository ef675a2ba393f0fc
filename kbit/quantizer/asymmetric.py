"""Asymmetric integers: codes 0 to 2^k - 1 with a scale and a zero point per block, which reach from its least to its
largest value.

scale = (max - min) / (2^k - 1) with 0 between min and max, rounded to float16 before it is used; zero = -min / scale
rounded to a whole number of k bits; code = round(x / scale) + zero within 0 and 2^k - 1; x is (code - zero) scale. It
is the integer grid of GPTQ's published code (quant.py), whose scale is not rounded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kbit.quantizer.blocks import Blocks
from kbit.quantizer.packing import pack, packed_bytes
from kbit.quantizer.source import Source
from kbit.quantizer.storage import FLOAT16_MAX, divided, non_finite


class Grid(NamedTuple):
    """What the codes of blocks stand for.

    Attributes:
        scale: float16, one per block.
        zero: uint8, one per block, below 2^k.
    """

    scale: Tensor
    zero: Tensor


def grid_between(low: Tensor, high: Tensor, bits: int) -> Grid:
    """Return the grid of blocks by their extremes: float32 tensors of one shape, which the grid's have too."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    top = 2**bits - 1
    scale = divided(high - low, top).clamp(max=FLOAT16_MAX).to(torch.float16)
    return Grid(scale, (-low / divisor(scale)).round_().clamp_(0, top).to(torch.uint8))


def divisor(scale: Tensor) -> Tensor:
    """Return what values are divided by, float32: infinity where the scale is 0, so that each gets the code of 0."""
    wide = scale.float()
    return torch.where(wide == 0, torch.inf, wide)


def nearest_codes(scaled: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the codes of x / scale, as float32; ties go to the even integer. `zero` is float32 and broadcasts."""
    return scaled.round().add_(zero).clamp_(0, 2**bits - 1)


class Stored(NamedTuple):
    """A quantized tensor, as ``QuantizedTensor`` has it: packed codes, scales and packed zero points."""

    codes: Tensor
    scale: Tensor
    zero_points: Tensor


def quantize_values(source: Source, blocks: Blocks, bits: int) -> Stored:
    """Quantize a tensor cut into blocks.

    Raises:
        WeightError: a value is NaN or infinite.
    """
    low = torch.zeros(blocks.rows * blocks.per_row, dtype=torch.float32, device=source.device)
    high = torch.zeros_like(low)
    finite = torch.ones((), dtype=torch.bool, device=source.device)
    for piece in blocks.pieces(source.device, source.row):
        finite &= piece.gather_extremes(source[piece], low, high)
    if not bool(finite):
        raise non_finite("weight", source.dtype)
    grid = grid_between(low, high, bits)
    zero = grid.zero.float()
    codes = torch.empty(packed_bytes(blocks.rows * blocks.length, bits), dtype=torch.uint8, device=source.device)
    for piece in blocks.pieces(source.device, source.row):
        values = source[piece]
        piece.divide_(values, grid.scale)
        values.round_()
        piece.add_(values, zero)
        values.clamp_(0, 2**bits - 1)
        codes[piece.start * bits // 8 : packed_bytes(piece.stop, bits)] = pack(values.to(torch.uint8), bits)
    return Stored(codes, grid.scale, pack(grid.zero, bits))
