"""Cut a tensor into blocks, whose values share an absmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kbit.quantizer.storage import FLOAT16_MAX, chunk_length
from kbit.spec import QuantSpec
from kbit.specs.base import ROW


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Blocks of a tensor: its values as [rows, length], each row cut every `size` values, its last block maybe short.

    `scheme=block` is one row of all values; `scheme=group` has the tensor's own rows.
    """

    rows: int
    length: int
    size: int

    @classmethod
    def of(cls, shape: tuple[int, ...], spec: QuantSpec) -> Blocks:
        return cls.cut(shape, blocksize=spec.blocksize, scheme=spec.scheme)

    @classmethod
    def cut(cls, shape: tuple[int, ...], *, blocksize: int | None, scheme: str) -> Blocks:
        """Cut a tensor of this shape; a block size of None is the whole tensor's, of ``ROW`` each row's."""
        count = prod(shape)
        if blocksize == ROW:
            blocksize = shape[-1]
        size = min(blocksize or count, count)
        # Rows that hold whole blocks are cut as the flat tensor is.
        if scheme == "block" or shape[-1] % size == 0:
            return cls(rows=1, length=count, size=size)
        return cls(rows=count // shape[-1], length=shape[-1], size=min(size, shape[-1]))

    @property
    def per_row(self) -> int:
        return -(-self.length // self.size)

    def pieces(self, device: torch.device, row: int | None = None) -> Iterator[Piece]:
        """Yield the tensor in pieces small enough to work on.

        Each begins at a multiple of 8 values, so that packed codes can be cut there too.

        Args:
            device: where they are worked on.
            row: length of the tensor's rows where pieces must hold whole ones.
        """
        whole = 8 * (self.length if self.rows > 1 else row or 1)
        step = whole * max(1, chunk_length(device) // whole)
        count = self.rows * self.length
        for start in range(0, count, step):
            yield Piece(blocks=self, start=start, stop=min(start + step, count))


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Values [start, stop) of a cut tensor: part of its one row, or whole rows."""

    blocks: Blocks
    start: int
    stop: int

    def spans(self, values: Tensor, absmax: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of values as [rows, blocks, width] with their absmax [rows, blocks].

        Up to three: the rest of a block begun before, whole blocks, the beginning of a last one.

        Args:
            values: this piece's values, flat.
            absmax: one per block of the whole tensor, flat.
        """
        length, size = self.blocks.length, self.blocks.size
        if self.blocks.rows == 1:
            first, last = self.start, self.stop
            values, absmax = values.view(1, -1), absmax.view(1, -1)
        else:
            first, last = 0, length
            values = values.view(-1, length)
            absmax = absmax.view(self.blocks.rows, -1)[self.start // length : self.stop // length]
        head = min(-(-first // size) * size, last)
        tail = max(last // size * size, head)
        for begin, end, width in ((first, head, head - first), (head, tail, size), (tail, last, last - tail)):
            if end > begin:
                span = values[:, begin - first : end - first].view(values.shape[0], -1, width)
                yield span, absmax[:, begin // size : -(-end // size)]

    def gather_absmax(self, values: Tensor, absmax: Tensor) -> Tensor:
        """Raise `absmax` (float16 or float32, one per block) to this piece's largest magnitudes, in place.

        Each is rounded to absmax's dtype before they are compared, and saturated at 65504 in float16: rounding keeps
        their order, so the result is the rounded largest, without a float32 copy of all.

        Returns:
            Whether this piece is finite: bool, 0-dim.
        """
        finite = torch.ones((), dtype=torch.bool, device=values.device)
        for span, stored in self.spans(values.abs(), absmax):
            largest = span.amax(-1)
            finite &= largest.isfinite().all()
            if stored.dtype == torch.float16:
                largest = largest.clamp(max=FLOAT16_MAX).to(torch.float16)
            stored.copy_(torch.maximum(stored, largest))
        return finite

    def gather_extremes(self, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Lower `low` and raise `high` (float32, one per block) to this piece's extremes, in place.

        Returns:
            Whether this piece is finite: bool, 0-dim.
        """
        for (span, least), (_, most) in zip(self.spans(values, low), self.spans(values, high), strict=True):
            least.copy_(torch.minimum(least, span.amin(-1)))
            most.copy_(torch.maximum(most, span.amax(-1)))
        return values.isfinite().all()

    def add_(self, values: Tensor, addend: Tensor, *, sign: int = 1) -> None:
        """values + sign · addend of its block (float32), in place."""
        for span, of_block in self.spans(values, addend):
            span.add_(of_block.unsqueeze(-1), alpha=sign)

    def divide_(self, values: Tensor, absmax: Tensor) -> None:
        """values / absmax of its block, in place; 0 where that is 0, so that such a block gets the code of 0.

        A division: multiplying by the reciprocal changes some codes.
        """
        for span, stored in self.spans(values, absmax):
            divisor = stored.float()
            span.div_(torch.where(divisor == 0, torch.inf, divisor).unsqueeze(-1))

    def multiply_(self, values: Tensor, absmax: Tensor) -> None:
        """values · absmax of its block, in place."""
        for span, stored in self.spans(values, absmax):
            span.mul_(stored.float().unsqueeze(-1))
