"""The data type 'lloyd': the codebook of least squared error for a tensor's values as they are scaled (Lloyd-Max).

Section 8 of the paper names codebooks fitted to the data as a missed opportunity. The values are sorted once; each
round then needs only the sums between the midpoints. Every device gives the same codebook.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from kbit.errors import SpecError
from kbit.quantizer.absmax import load_absmax, stored_absmax
from kbit.quantizer.blocks import Blocks, Piece
from kbit.quantizer.sorted_values import SortedValues
from kbit.quantizer.source import Source
from kbit.spec import QuantSpec

MOST_ROUNDS: Final = 100
LEAST_CHANGE: Final = 1e-6
"""Of the squared error, relative: with less, the fit is done."""
ROUNDS_AHEAD: Final = 10
"""Rounds to ask a GPU for before the first is looked at: it is not waited for, and up to nine are wasted."""


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


def _iterated(scaled: SortedValues, bits: int) -> Tensor:
    """Return the values at which the iteration ends: float64 [2^bits], on the CPU."""
    values = scaled.quantiles([(2 * i + 1) / 2 ** (bits + 1) for i in range(2**bits)])
    before, left = math.inf, MOST_ROUNDS
    while left:
        rounds, values = _rounds(scaled, values, most=left)
        left -= len(rounds)
        for of_round in rounds.cpu().unbind():
            began_with, counts, sums, squares = of_round.numpy()
            # NumPy sums these few in one order wherever the tensor lies: the end must not depend on the device.
            error = float((squares - 2 * began_with * sums + counts * began_with**2).sum())
            if before - error <= LEAST_CHANGE * before < math.inf:
                return of_round[0]
            before = error
    return values.cpu()


def _rounds(scaled: SortedValues, values: Tensor, *, most: int) -> tuple[Tensor, Tensor]:
    """Run as many rounds at once as don't make the device wait: ``SortedValues.round`` of each, [rounds, 4, m]."""
    from kbit.kernels.availability import why_not_triton  # kernels import the reference

    if scaled.values.is_cuda and why_not_triton(scaled.values.device) is None:
        from kbit.kernels.lloyd import lloyd_rounds

        history = lloyd_rounds(scaled, values, min(most, ROUNDS_AHEAD))
        return history[:-1], history[-1, 0]
    of_round, after = scaled.round(values)
    return of_round[None], after


def _scaled(source: Source, spec: QuantSpec) -> Tensor:
    """x / absmax of what is quantized: float32 [n], in no order."""
    return torch.cat([values[taken] for _, values, taken in scaled_pieces(source, spec)])


def scaled_pieces(source: Source, spec: QuantSpec) -> Iterator[tuple[Piece, Tensor, Tensor]]:
    """Yield each piece's x / absmax, float32, and where it is quantized: not in kept columns or in blocks of zeros."""
    blocks = Blocks.of(tuple(source.weight.shape), spec)
    absmax = load_absmax(stored_absmax(source, blocks, spec))
    for piece in blocks.pieces(source.device, source.row):
        values = source[piece]
        taken = torch.ones_like(values)
        piece.multiply_(taken, absmax != 0)
        if source.columns is not None and source.row is not None:
            taken.view(-1, source.row)[:, source.columns] = 0
        piece.divide_(values, absmax)
        yield piece, values, taken != 0
