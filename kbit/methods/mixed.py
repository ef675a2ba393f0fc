"""Mixed bits: each layer its own bits, by how much its error costs in loss (Malinovskii et al. 2025).

The slopes of the loss are known where they were measured before (``Calibrated.slopes``), else measured once per loaded
model and calibration data; each layer's error is once per candidate. All budgets share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kbit.errors import SpecError
from kbit.methods.blockwise import CalibratedCodes, quantize_layer
from kbit.methods.noise import known_slopes
from kbit.methods.protocol import ModelPass
from kbit.models.architectures import Layer
from kbit.quantizer.allocation import allocate, mean_bits, parts_of
from kbit.quantizer.blockwise import QuantizedTensor, dequantize
from kbit.quantizer.storage import storage_dtype_of
from kbit.specs.blockwise import QuantSpec
from kbit.specs.mixed import MixedSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class AllottedCodes(CalibratedCodes):
    """Codes of a layer with bits of its own.

    Attributes:
        predicted: nats that its error adds to the loss, by the linear model.
    """

    predicted: float

    @property
    def bits(self) -> int:
        return self.tensor.spec.bits

    @property
    def shares_codebook(self) -> bool:
        return False


def quantize_layers(model: ModelPass, spec: MixedSpec, calibration: Tensor) -> Iterator[tuple[Layer, AllottedCodes]]:
    """Yield the codes of each layer of each block, in the bits that it gets.

    Args:
        model: a pass that scores windows.
        spec: the method's.
        calibration: token windows, int64 [samples, length].

    Raises:
        ActivationError: a loss on calibration data is not finite.
        SpecError: the model's layers need more than the budget.
        WeightError: a weight with NaN or infinite values.
    """
    slopes = known_slopes(model, calibration)
    errors = [_errors(model, layer, spec.choices) for block in model.blocks() for layer in block.layers]
    sizes = [int(of_layer[0, 2]) for of_layer in errors]
    costs = np.array([[slope * float(t) for t in of[:, 0]] for slope, of in zip(slopes, errors, strict=True)])
    # Where noise lowered the loss, a larger error must not count as a gain: such a layer gets the fewest bits.
    costs = costs.clip(min=0.0)
    bits = [[int(b) for b in of_layer[:, 1]] for of_layer in errors]
    try:
        chosen = allocate(costs, bits, sizes, spec.budget)
    except ValueError as error:
        least = mean_bits(parts_of(bits, sizes).min(1), sizes)
        allowed = f"at least {least:.6g}, which this model's layers take in the least of candidates={spec.candidates}"
        raise SpecError("budget", spec.budget, allowed) from error
    number = 0
    for block in model.blocks():
        for layer in block.layers:
            q = quantize_layer(layer, spec.choices[chosen[number]], None, model)
            yield layer, AllottedCodes(tensor=q, predicted=float(costs[number, chosen[number]]))
            number += 1


def _errors(model: ModelPass, layer: Layer, choices: Sequence[QuantSpec]) -> Tensor:
    """Return a layer's squared relative error, stored bits and weights by choice: float64 [choices, 3], each once."""
    found = []
    for choice in choices:
        key = (f"error of {layer.name}", choice, model.storage_dtype)
        if key not in model.fitted:
            q = quantize_layer(layer, choice, None, model)
            error = relative_error(layer.weight, q, model.storage_dtype)
            model.fitted[key] = torch.tensor([error, q.nbits, layer.weight.numel()], dtype=torch.float64)
        found.append(model.fitted[key])
    return torch.stack(found)


def relative_error(weight: Tensor, q: QuantizedTensor, storage_dtype: torch.dtype | None) -> float:
    """Return t^2: squared error of a quantized weight over the squares of the 16-bit one; 0 of a zero one."""
    true = weight.detach().to(storage_dtype_of(weight, storage_dtype)).float()
    error = (dequantize(q).float() - true).square_().sum(dtype=torch.float64)
    return float(error / true.square_().sum(dtype=torch.float64).clamp_min(torch.finfo(torch.float64).tiny))
