"""The data type 'lloyd': the codebook of least squared error for a tensor's values as they are scaled (Lloyd-Max).

Section 8 of the paper names codebooks fitted to the data as a missed opportunity. The values are sorted once; each
round then needs only the sums between the midpoints. Sums are whole numbers, so that every device gives the same
codebook.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from kbit.quantizer.absmax import load_absmax, stored_absmax
from kbit.quantizer.blocks import Blocks
from kbit.quantizer.source import Source
from kbit.spec import QuantSpec

MOST_ROUNDS: Final = 100
LEAST_CHANGE: Final = 1e-6
"""Of the squared error, relative: with less, the fit is done."""
CHUNK: Final = 512
"""Sorted values whose sum is kept: a sum up to any value adds at most one chunk to kept ones. These take 1/16 byte a
value, and each of a round's 2^k sums adds up to a chunk. The sums are exact, so that this changes no codebook."""
SLICE: Final = 1 << 24
"""Values that are summed at a time: their float64 copies take 128 MB each."""
HIGH_BITS: Final = 20
LOW_BITS: Final = 32
"""A summand's bits below the point, in two whole numbers of 64 bits: 2^30 summands of magnitude 1 don't overflow."""


def lloyd_values(source: Source, spec: QuantSpec) -> Tensor:
    """Fit 2^k values to x / absmax of a tensor's blocks: Lloyd's iteration in float64.

    It starts at the quantiles (2i + 1) / 2^(k + 1) of those values and ends when the squared error changes by less than
    1e-6 of itself, or after 100 rounds. A cell without values keeps its value. Left out are kept columns, and blocks of
    zeros, which any codebook gives back.

    Args:
        source: the tensor. Sorting takes about 20 bytes per value on its device.
        spec: bits, blocks and absmax.

    Returns:
        float32 [2 to 2^k], sorted, distinct, within [-1, 1], on the tensor's device.

    Raises:
        WeightError: a value is NaN or infinite.
    """
    scaled = _Sorted(_scaled(source, spec))
    if not scaled.count:
        return torch.tensor([0.0, 1.0], dtype=torch.float32, device=source.device)
    values = scaled.quantiles([(2 * i + 1) / 2 ** (spec.bits + 1) for i in range(2**spec.bits)])
    before = None
    for _ in range(MOST_ROUNDS):
        ends = scaled.counts_up_to((values[:-1] + values[1:]) / 2)
        counts = np.diff([0, *ends, scaled.count])
        sums, squares = (np.diff(part, prepend=0.0) for part in scaled.sums([*ends, scaled.count]))
        error = float((squares - 2 * values * sums + counts * values**2).sum())
        if before is not None and before - error <= LEAST_CHANGE * before:
            break
        before = error
        values = np.where(counts > 0, sums / np.maximum(counts, 1), values)
    fitted = torch.unique(torch.from_numpy(values).float().clamp_(-1, 1) + 0.0)
    if fitted.numel() == 1:
        fitted = torch.unique(torch.tensor([0.0, float(fitted), 1.0], dtype=torch.float32))
    on_device: Tensor = fitted.to(source.device)
    return on_device


def _scaled(source: Source, spec: QuantSpec) -> Tensor:
    """x / absmax of what is quantized: float32 [n], in no order."""
    blocks = Blocks.of(tuple(source.weight.shape), spec)
    absmax = load_absmax(stored_absmax(source, blocks, spec))
    parts = []
    for piece in blocks.pieces(source.device, source.row):
        values = source[piece]
        taken = torch.ones_like(values)
        piece.multiply_(taken, absmax != 0)
        if source.columns is not None and source.row is not None:
            taken.view(-1, source.row)[:, source.columns] = 0
        piece.divide_(values, absmax)
        parts.append(values[taken != 0])
    return torch.cat(parts)


class _Sorted:
    """Values in order, and their sums and sums of squares up to any of them."""

    def __init__(self, values: Tensor) -> None:
        # On a CPU NumPy sorts ten times as fast as torch, which also makes indices.
        on_cpu = values.device.type == "cpu"
        self._values = torch.from_numpy(np.sort(values.numpy())) if on_cpu else values.sort().values
        self.count = values.numel()
        chunks = torch.cat([_chunk_sums(part) for part in torch.split(self._values, SLICE)], dim=1)
        self._before = torch.cat([chunks.new_zeros(4, 1), chunks.cumsum(1)], dim=1)

    def quantiles(self, at: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Exact empirical quantiles with linear interpolation: float64 [m]."""
        position = torch.tensor(at, dtype=torch.float64) * (self.count - 1)
        low = position.floor().long()
        pair = torch.stack([low, (low + 1).clamp(max=self.count - 1)])
        first, second = self._values[pair.to(self._values.device)].double().cpu()
        quantiles: np.ndarray[tuple[int], np.dtype[np.float64]] = (first + (position - low) * (second - first)).numpy()
        return quantiles

    def counts_up_to(self, limits: np.ndarray[tuple[int], np.dtype[np.float64]]) -> list[int]:
        """Return how many values are at most each limit."""
        wide = torch.from_numpy(limits)
        # A value is at most a limit where it is at most the largest float32 that is.
        narrow = wide.float()
        narrow = torch.where(narrow.double() > wide, narrow.nextafter(torch.tensor(-torch.inf)), narrow)
        ends: list[int] = torch.searchsorted(self._values, narrow.to(self._values.device), right=True).tolist()
        return ends

    def sums(self, ends: Sequence[int]) -> tuple[list[float], list[float]]:
        """Return the sum of the first n values, and of their squares, for each n."""
        upto = torch.tensor(ends, device=self._values.device)
        chunk = upto // CHUNK
        places = chunk.unsqueeze(1) * CHUNK + torch.arange(CHUNK, device=upto.device)
        rest = self._values[places.clamp(max=self.count - 1)].double() * (places < upto.unsqueeze(1))
        total = self._before[:, chunk] + torch.stack([part.sum(-1) for part in _fixed(rest)])
        high_y, low_y, high_square, low_square = total.tolist()
        unit = 1 << (HIGH_BITS + LOW_BITS)
        return (
            [((h << LOW_BITS) + low) / unit for h, low in zip(high_y, low_y, strict=True)],
            [((h << LOW_BITS) + low) / unit for h, low in zip(high_square, low_square, strict=True)],
        )


def _fixed(values: Tensor) -> Iterator[Tensor]:
    """Yield values and their squares as whole numbers of high and low bits: four int64 tensors of their shape."""
    for summand in (values, values * values):
        scaled = summand * 2.0**HIGH_BITS
        high = scaled.floor()
        yield high.long()
        yield (scaled - high).mul_(2.0**LOW_BITS).floor_().long()


def _chunk_sums(values: Tensor) -> Tensor:
    """Sums of each chunk of float32 values [n]: int64 [4, ceil(n / CHUNK)]."""
    padded = torch.nn.functional.pad(values, (0, -values.numel() % CHUNK)).view(-1, CHUNK).double()
    return torch.stack([part.sum(-1) for part in _fixed(padded)])
