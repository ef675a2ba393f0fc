"""Packed codes of a tensor, and what it takes to read them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kbit.quantizer.blocks import Blocks, Piece
from kbit.quantizer.packing import packed_bytes, unpack


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """A quantized tensor as it is read; kept columns are the caller's.

    Attributes:
        codes: uint8, of exactly `bits` bits each (``kbit.quantizer.packing``).
        absmax: float16 or float32, one per block, in order.
        codebook: float32 [at most 2^bits].
        mean: 0-dim, added to every value; or None.
        zero: float32, one per block, subtracted from the codebook's value; or None.
        blocks: how the tensor is cut.
    """

    codes: Tensor
    absmax: Tensor
    codebook: Tensor
    mean: Tensor | None
    bits: int
    blocks: Blocks
    zero: Tensor | None = None

    def codes_of(self, piece: Piece) -> Tensor:
        """Return the bytes of a piece's codes, a view."""
        return self.codes[piece.start * self.bits // 8 : packed_bytes(piece.stop, self.bits)]

    def values(self, piece: Piece) -> Tensor:
        """Return (codebook[code] - zero) · absmax + mean of a piece: float32, flat, a fresh tensor."""
        codes = unpack(self.codes_of(piece), self.bits, piece.stop - piece.start)
        values = self.codebook.index_select(0, codes.int())
        if self.zero is not None:
            piece.add_(values, self.zero, sign=-1)
        piece.multiply_(values, self.absmax)
        return values if self.mean is None else values.add_(self.mean.float())
