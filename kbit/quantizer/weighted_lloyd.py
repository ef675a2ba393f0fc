"""A Lloyd-Max codebook whose squared errors are weighted by input dimension: those of inputs that matter count more.

As ``kbit.quantizer.lloyd`` but for the weights: the inputs' mean squares on calibration data. SqueezeLLM (Kim et al.
2023) takes the Fisher information for them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kbit.quantizer.lloyd import LEAST_CHANGE, MOST_ROUNDS, as_codebook, scaled_pieces
from kbit.quantizer.sorted_values import quantiles_of
from kbit.quantizer.source import Source
from kbit.quantizer.storage import columns_of, mean16, storage_dtype_of
from kbit.spec import QuantSpec


@torch.no_grad()
def weighted_codebook(
    weight: Tensor,
    spec: QuantSpec,
    importance: Tensor,
    *,
    outlier_columns: Tensor | None = None,
    storage_dtype: torch.dtype | None = None,
) -> Tensor:
    """Fit 2^k values to x / absmax of a weight's blocks by weighted least squares.

    Start, end and what is left out are those of ``lloyd_values``. A cell whose weights are all zero keeps its value.
    Where all weights are, they count as equal. Sums are in float64, in the device's order.

    Args:
        weight: [out_features, in_features].
        spec: bits, blocks and absmax.
        importance: [in_features], at least 0, finite.
        outlier_columns: input dimensions that stay in 16 bits.
        storage_dtype: as of ``quantize``.

    Returns:
        float32 [2 to 2^k], sorted, distinct, within [-1, 1], on the weight's device.

    Raises:
        WeightError: a value is NaN or infinite.
    """
    dtype, spec = storage_dtype_of(weight, storage_dtype), spec.of_row(weight.shape[-1])
    mean = mean16(weight, dtype) if spec.center else None
    source = Source(weight, dtype, columns_of(weight, outlier_columns), mean)
    values, weights = _scaled(source, spec, importance.to(weight.device, torch.float64))
    if not values.numel():
        return torch.tensor([0.0, 1.0], dtype=torch.float32, device=weight.device)
    if not bool(weights.any()):
        weights = torch.ones_like(weights)
    values, order = values.sort(stable=True)
    weights = weights[order]
    del order
    return as_codebook(_iterated(values, weights, spec.bits)).to(weight.device)


def _scaled(source: Source, spec: QuantSpec, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Return x / absmax of what is quantized, float32 [n], and the weight of each, float64 [n]."""
    columns = source.weight.shape[-1]
    parts, weights = [], []
    for piece, values, taken in scaled_pieces(source, spec):
        of_value = importance[torch.arange(piece.start, piece.stop, device=source.device) % columns]
        parts.append(values[taken])
        weights.append(of_value[taken])
    scaled = torch.cat(parts)
    parts.clear()
    return scaled, torch.cat(weights)


def _iterated(values: Tensor, weights: Tensor, bits: int) -> Tensor:
    """Return the values at which the iteration ends, float64 [2^bits]; of sorted values [n] and their weights."""
    before = _sums_before(values, weights)
    wide = values.double()
    book = quantiles_of(values, [(2 * i + 1) / 2 ** (bits + 1) for i in range(2**bits)])
    error = math.inf
    for _ in range(MOST_ROUNDS):
        ends = torch.searchsorted(wide, (book[:-1] + book[1:]) / 2, right=True)
        ends = torch.nn.functional.pad(ends, (1, 1))
        ends[-1] = len(values)
        mass, first, second = before[:, ends].diff(dim=1)
        now = float((second - 2 * book * first + book.square() * mass).sum())
        if error - now <= LEAST_CHANGE * error < math.inf:
            break
        book, error = torch.where(mass > 0, first / mass.clamp(min=1e-300), book), now
    return book


def _sums_before(values: Tensor, weights: Tensor) -> Tensor:
    """Return the sums of w, w y and w y^2 before each place, float64 [3, n + 1]; one summand lies in memory at a time.

    Beside them are the values and their weights: of all that is fitted so, this takes most (``WEIGHTED_FIT_BYTES``).
    """
    before = weights.new_zeros(3, len(values) + 1)
    torch.cumsum(weights, 0, out=before[0, 1:])
    summand = values.double()
    torch.cumsum(summand.mul_(weights), 0, out=before[1, 1:])
    summand.copy_(values)
    torch.cumsum(summand.square_().mul_(weights), 0, out=before[2, 1:])
    return before
