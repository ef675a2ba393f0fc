"""Clipping search: the absmax of each block by the squared error of its values, without data.

Of absmax (1 - i / 20), i = 0 ... 9, the one with the least error; of equals the largest, so that a tie clips nothing.
Errors are summed as whole numbers, so that every device chooses alike.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kbit.quantizer.absmax import NestedAbsmax, largest_magnitudes, nest
from kbit.quantizer.blocks import Blocks, Piece
from kbit.quantizer.encode import Encoder
from kbit.quantizer.source import Source
from kbit.quantizer.storage import FLOAT16_MAX
from kbit.spec import QuantSpec

STEPS: Final = 20
CANDIDATES: Final = 10
_SUM_BITS: Final = 60
"""A block's sum of squared errors stays below 2^63: an error is below 2.01 times the power of two above absmax."""


def clipped_absmax(source: Source, blocks: Blocks, spec: QuantSpec, values: Tensor) -> Tensor | NestedAbsmax:
    """Return the best absmax of each block, as it is stored.

    Each candidate is rounded to the absmax dtype before its error is taken; nested ones are chosen in float32, and
    rounded to 8 bits then.

    Args:
        source: the weight.
        blocks: how it is cut.
        spec: absmax dtype.
        values: the codebook.

    Raises:
        WeightError: a value is NaN or infinite.
    """
    largest = largest_magnitudes(source, blocks, torch.float32)
    found = candidates(largest, spec.absmax_dtype)
    errors = torch.zeros(CANDIDATES, largest.numel(), dtype=torch.int64, device=source.device)
    encode, unit = Encoder(values), _units(largest)
    scale = 2.0 ** (_SUM_BITS - blocks.size.bit_length())
    for piece in blocks.pieces(source.device, source.row):
        own = source[piece]
        for absmax, total in zip(found, errors, strict=True):
            codes = own.clone()
            piece.divide_(codes, absmax)
            back = values.index_select(0, encode(codes).int())
            piece.multiply_(back, absmax)
            error = own.double().sub_(back)
            if source.columns is not None and source.row is not None:
                error.view(-1, source.row)[:, source.columns] = 0
            _add_squares(piece, error, unit, total, scale)
    chosen = errors.argmin(0, keepdim=True)
    absmax = torch.stack(found).gather(0, chosen)[0]
    return nest(absmax) if spec.absmax_dtype == "nested" else absmax


def candidates(largest: Tensor, absmax_dtype: str) -> list[Tensor]:
    """Return what a block's absmax may be, the largest first: tensors like `largest`, in the absmax dtype."""
    found = [largest * ((STEPS - i) / STEPS) for i in range(CANDIDATES)]
    return [c.clamp(max=FLOAT16_MAX).half() for c in found] if absmax_dtype == "float16" else found


def _units(largest: Tensor) -> Tensor:
    """Return 1 over the power of two above each value, float64: exact."""
    return torch.ldexp(torch.ones_like(largest, dtype=torch.float64), -torch.frexp(largest).exponent)


def _add_squares(piece: Piece, error: Tensor, unit: Tensor, total: Tensor, scale: float) -> None:
    for (span, of_block), (_, sums) in zip(piece.spans(error, unit), piece.spans(error, total), strict=True):
        relative = span * of_block.unsqueeze(-1)
        sums += relative.square_().mul_(scale).long().sum(-1)
