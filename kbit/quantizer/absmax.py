"""The absmax (scale) that is stored per block: in float16, float32 or nested 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kbit.quantizer.blocks import Blocks, Piece
from kbit.quantizer.codebooks import codebook
from kbit.quantizer.encode import Encoder
from kbit.quantizer.source import Source
from kbit.quantizer.storage import non_finite
from kbit.spec import QuantSpec
from kbit.specs.blockwise import NESTED_BLOCKSIZE

NESTED_SPEC = QuantSpec(bits=8, dtype="dynamic")
"""Data type of nested absmax values: bitsandbytes' signed 8-bit dynamic map."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NestedAbsmax:
    """Absmax values in 8 bits, codebook[codes] · scale + offset: QLoRA's double quantization, as bitsandbytes has it.

    Attributes:
        codes: uint8 [blocks].
        scale: float32 [ceil(blocks / 256)], the largest magnitude of 256 values less the offset.
        offset: float32, 0-dim: the mean of all absmax values, computed in float64.
        codebook: float32 [256], bitsandbytes' signed dynamic map; the same for every tensor, so it isn't counted.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    codebook: Tensor

    @property
    def nbits(self) -> int:
        return 8 * self.codes.numel() + 32 * self.scale.numel() + 32


def nest(absmax: Tensor) -> NestedAbsmax:
    """Convert float32 absmax values [blocks] to nested 8 bits."""
    offset = absmax.mean(dtype=torch.float64).float()
    centred = absmax - offset
    piece = _nested_piece(absmax.numel())
    scale = centred.new_zeros(piece.blocks.per_row)
    piece.gather_absmax(centred, scale)
    piece.divide_(centred, scale)
    values = codebook(NESTED_SPEC, absmax)
    return NestedAbsmax(codes=Encoder(values)(centred), scale=scale, offset=offset, codebook=values)


def load_absmax(stored: Tensor | NestedAbsmax) -> Tensor:
    """Return the absmax values [blocks] that quantizing and dequantizing use: as stored, nested ones as float32.

    Nested ones may come out slightly below zero where the true value is near zero and another of its group is large,
    as bitsandbytes' do. Codes are made with the same number, so the signs cancel.
    """
    if isinstance(stored, Tensor):
        return stored
    values = stored.codebook[stored.codes.int()]
    _nested_piece(values.numel()).multiply_(values, stored.scale)
    return values + stored.offset


def _nested_piece(count: int) -> Piece:
    return Piece(blocks=Blocks(rows=1, length=count, size=min(NESTED_BLOCKSIZE, count)), start=0, stop=count)


def stored_absmax(source: Source, blocks: Blocks, spec: QuantSpec) -> Tensor | NestedAbsmax:
    """Return what is stored: one per block.

    Raises:
        WeightError: a value is NaN or infinite.
    """
    absmax = largest_magnitudes(source, blocks, torch.float16 if spec.absmax_dtype == "float16" else torch.float32)
    return nest(absmax) if spec.absmax_dtype == "nested" else absmax


def largest_magnitudes(source: Source, blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """Return the absmax of each block, rounded to float16 or float32.

    Raises:
        WeightError: a value is NaN or infinite.
    """
    absmax = torch.zeros(blocks.rows * blocks.per_row, dtype=dtype, device=source.device)
    finite = torch.ones((), dtype=torch.bool, device=source.device)
    for piece in blocks.pieces(source.device, source.row):
        finite &= piece.gather_absmax(source[piece], absmax)
    if not bool(finite):
        raise non_finite("weight", source.dtype)
    return absmax
