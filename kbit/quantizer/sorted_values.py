"""A tensor's values in order, with exact sums up to any of them: what fits a codebook to them.

Sums are whole numbers, so that every device gives the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

CHUNK: Final = 512
"""Sorted values whose sum is kept: a sum up to any value adds at most one chunk to kept ones. These take 1/16 byte a
value, and each of a round's 2^k sums adds up to a chunk. The sums are exact, so that this changes no codebook."""
SLICE: Final = 1 << 24
"""Values that are summed at a time: their float64 copies take 128 MB each."""
HIGH_BITS: Final = 20
LOW_BITS: Final = 32
"""A summand's bits below the point, in two whole numbers of 64 bits: 2^30 summands of magnitude 1 don't overflow."""


class SortedValues:
    """Values in order, and their sums and sums of squares up to any of them.

    Attributes:
        values: float32 [n], ascending.
        count: n.
        before: int64 [4, chunks + 1]: of the sums of y and of y^2 before each chunk, the high and the low bits.
    """

    def __init__(self, values: Tensor) -> None:
        # On a CPU NumPy sorts ten times as fast as torch, which also makes indices.
        on_cpu = values.device.type == "cpu"
        self.values = torch.from_numpy(np.sort(values.numpy())) if on_cpu else values.sort().values
        self.count = values.numel()
        chunks = torch.cat([_chunk_sums(part) for part in torch.split(self.values, SLICE)], dim=1)
        self.before = torch.cat([chunks.new_zeros(4, 1), chunks.cumsum(1)], dim=1)
        self._in_chunk = torch.arange(CHUNK, device=values.device)
        self._none, self._all = torch.tensor([[0], [self.count]], device=values.device)

    def quantiles(self, at: Sequence[float]) -> Tensor:
        """Return ``quantiles_of`` these values."""
        return quantiles_of(self.values, at)

    def round(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Run a round of Lloyd's iteration.

        Args:
            values: float64 [m], ascending: those to begin with.

        Returns:
            float64 [4, m], the values, and the counts, sums and sums of squares of what is nearest to each; and
            float64 [m], the values after it.
        """
        ends = torch.cat([self._counts_up_to((values[:-1] + values[1:]) / 2), self._all])
        zero = values.new_zeros(1)
        counts = torch.diff(ends, prepend=self._none).double()
        sums, squares = (torch.diff(part, prepend=zero) for part in self._sums(ends))
        after = torch.where(counts > 0, sums / counts.clamp(min=1), values)
        return torch.stack([values, counts, sums, squares]), after

    def _counts_up_to(self, limits: Tensor) -> Tensor:
        """Return how many values are at most each limit: int64 [m]."""
        # A value is at most a limit where it is at most the largest float32 that is.
        narrow = limits.float()
        narrow = torch.where(narrow.double() > limits, narrow.nextafter(torch.full_like(narrow, -torch.inf)), narrow)
        return torch.searchsorted(self.values, narrow, right=True)

    def _sums(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of the first n values, and of their squares, for each n: float64 [m], correctly rounded."""
        chunk = ends // CHUNK
        places = chunk.unsqueeze(1) * CHUNK + self._in_chunk
        rest = self.values[places.clamp(max=self.count - 1)].double() * (places < ends.unsqueeze(1))
        high_y, low_y, high_square, low_square = self.before[:, chunk] + torch.stack(
            [part.sum(-1) for part in _fixed(rest)]
        )
        return _float64(high_y, low_y), _float64(high_square, low_square)


def _fixed(values: Tensor) -> Iterator[Tensor]:
    """Yield values and their squares as whole numbers of high and low bits: four int64 tensors of their shape."""
    for summand in (values, values * values):
        scaled = summand * 2.0**HIGH_BITS
        high = scaled.floor()
        yield high.long()
        yield (scaled - high).mul_(2.0**LOW_BITS).floor_().long()


def _float64(high: Tensor, low: Tensor) -> Tensor:
    """Return high and low bits as one number: one addition of two exact ones, so it is rounded once."""
    carried = high + (low >> LOW_BITS)
    rest = low & ((1 << LOW_BITS) - 1)
    return (carried.double() * 2.0**LOW_BITS + rest.double()) * 2.0 ** -(HIGH_BITS + LOW_BITS)


def _chunk_sums(values: Tensor) -> Tensor:
    """Sums of each chunk of float32 values [n]: int64 [4, ceil(n / CHUNK)]."""
    padded = torch.nn.functional.pad(values, (0, -values.numel() % CHUNK)).view(-1, CHUNK).double()
    return torch.stack([part.sum(-1) for part in _fixed(padded)])


def quantiles_of(values: Tensor, at: Sequence[float]) -> Tensor:
    """Return exact empirical quantiles of sorted float32 values, with linear interpolation: float64 [m]."""
    last = values.numel() - 1
    position = torch.tensor(at, dtype=torch.float64) * last
    low = position.floor().long()
    pair = torch.stack([low, (low + 1).clamp(max=last)])
    pairs = values[pair.to(values.device)].double()
    return pairs[0] + (position - low).to(pairs.device) * (pairs[1] - pairs[0])
