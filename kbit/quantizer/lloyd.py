"""The data type 'lloyd': the codebook of least squared error for a tensor's values as they are scaled (Lloyd-Max).

Section 8 of the paper names codebooks fitted to the data as a missed opportunity. The values are sorted once; each
round then needs only the sums between the midpoints. Sums are whole numbers, so that every device gives the same
codebook.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from kbit.errors import SpecError
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
ROUNDS_AHEAD: Final = 10
"""Rounds to ask a GPU for before the first is looked at: it is not waited for, and up to nine are wasted."""
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
        SpecError: the spec's weighting takes calibration data (``kbit.quantizer.weighted_lloyd``), which aren't here.
        WeightError: a value is NaN or infinite.
    """
    if spec.weighting is not None:
        allowed = "null, or quantize with fitted=weighted_codebook(...): its weights come from calibration data"
        raise SpecError("weighting", spec.weighting, allowed)
    scaled = SortedValues(_scaled(source, spec))
    if not scaled.count:
        return torch.tensor([0.0, 1.0], dtype=torch.float32, device=source.device)
    return as_codebook(_iterated(scaled, spec.bits)).to(source.device)


def as_codebook(values: Tensor) -> Tensor:
    """Return fitted values, float64 [m], as a codebook: float32, sorted, distinct, within [-1, 1], at least two."""
    fitted: Tensor = torch.unique(values.float().clamp(-1, 1) + 0.0)
    if fitted.numel() == 1:
        fitted = torch.unique(torch.tensor([0.0, float(fitted), 1.0], dtype=torch.float32))
    return fitted


def quantiles_of(values: Tensor, at: Sequence[float]) -> Tensor:
    """Return exact empirical quantiles of sorted float32 values, with linear interpolation: float64 [m]."""
    last = values.numel() - 1
    position = torch.tensor(at, dtype=torch.float64) * last
    low = position.floor().long()
    pair = torch.stack([low, (low + 1).clamp(max=last)])
    pairs = values[pair.to(values.device)].double()
    return pairs[0] + (position - low).to(pairs.device) * (pairs[1] - pairs[0])


def _iterated(scaled: SortedValues, bits: int) -> Tensor:
    """Return the values at which the iteration ends: float64 [2^bits], on the CPU."""
    values = scaled.quantiles([(2 * i + 1) / 2 ** (bits + 1) for i in range(2**bits)])
    before, left = math.inf, MOST_ROUNDS
    while left:
        rounds, values = scaled.rounds(values, most=left)
        left -= len(rounds)
        for of_round in rounds.cpu().unbind():
            began_with, counts, sums, squares = of_round.numpy()
            # NumPy sums these few in one order wherever the tensor lies: the end must not depend on the device.
            error = float((squares - 2 * began_with * sums + counts * began_with**2).sum())
            if before - error <= LEAST_CHANGE * before < math.inf:
                return of_round[0]
            before = error
    return values.cpu()


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

    def rounds(self, values: Tensor, *, most: int) -> tuple[Tensor, Tensor]:
        """Run a few rounds: as many at once as don't make the device wait.

        Args:
            values: float64 [m], ascending: those to begin with.
            most: rounds that are left.

        Returns:
            float64 [rounds, 4, m], of each round its values, and the counts, sums and sums of squares of what is
            nearest to each; and float64 [m], the values after the last one.
        """
        from kbit.kernels.availability import why_not_triton  # kernels import the reference

        if self.values.is_cuda and why_not_triton(self.values.device) is None:
            from kbit.kernels.lloyd import lloyd_rounds

            history = lloyd_rounds(self, values, min(most, ROUNDS_AHEAD))
            return history[:-1], history[-1, 0]
        ends = torch.cat([self._counts_up_to((values[:-1] + values[1:]) / 2), self._all])
        zero = values.new_zeros(1)
        counts = torch.diff(ends, prepend=self._none).double()
        sums, squares = (torch.diff(part, prepend=zero) for part in self._sums(ends))
        after = torch.where(counts > 0, sums / counts.clamp(min=1), values)
        return torch.stack([values, counts, sums, squares])[None], after

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
