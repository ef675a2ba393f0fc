"""AWQ: weights of inputs that matter are scaled up before rounding, and down again after (Lin et al. 2023).

Scales are mean |x|^r, of the r with the least error of the block's output; of an expert's matrix, with that of its own
output, since a block has too many of them to run it for each. They are folded exactly: the weight that the model
computes with is the dequantized one over the scales, so that no norm or other layer has to take them, and every
architecture works. A block's inputs are those of the 16-bit model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kbit.methods.inputs import BlockInputs, InputSums
from kbit.methods.protocol import Block, ModelPass, Undo, naming
from kbit.models.activations import Activations
from kbit.models.architectures import Layer
from kbit.models.overwriting import rewrite, trying
from kbit.quantizer.absmax import largest_magnitudes
from kbit.quantizer.blocks import Blocks
from kbit.quantizer.blockwise import QuantizedTensor, dequantize, quantize_wide
from kbit.quantizer.clipping import CANDIDATES, STEPS
from kbit.quantizer.codebooks import is_data_dependent
from kbit.quantizer.source import Source
from kbit.quantizer.storage import check_weight, non_finite, storage_dtype_of
from kbit.specs.awq import AwqSpec
from kbit.specs.base import ROW

EXPONENTS: Final = tuple(i / 20 for i in range(20))
"""r: 0, 0.05 ... 0.95."""
LEAST_SCALE: Final = 1e-4


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredScaled:
    """Codes, absmax and codebook of a layer's scaled weight, and the scales.

    Attributes:
        tensor: of the scaled weight, float32.
        scale: float16 [in_features].
        storage_dtype: that the weight is rounded to.
        has_scale: the scales are counted here; layers that share an input store them once.
        tokens: that the layer calibrated on.
    """

    tensor: QuantizedTensor
    scale: Tensor
    storage_dtype: torch.dtype
    has_scale: bool = True
    tokens: int = 0

    @property
    def nbits(self) -> int:
        return self.tensor.nbits + (8 * self.scale.nbytes if self.has_scale else 0)

    @property
    def codebook(self) -> Tensor:
        return self.tensor.codebook

    @property
    def shares_codebook(self) -> bool:
        return not is_data_dependent(self.tensor.spec)

    def code_tensors(self) -> tuple[Tensor, ...]:
        return self.tensor.codes, self.scale

    def weight(self) -> Tensor:
        """Return the weight that the model computes with, in the storage dtype."""
        limit = torch.finfo(self.storage_dtype).max
        return dequantize(self.tensor).div_(self.scale.float()).clamp_(-limit, limit).to(self.storage_dtype)

    def put(self, layer: Layer) -> Undo:
        return rewrite(layer, lambda working: working.copy_(self.weight()))


def quantize_layers(model: ModelPass, spec: AwqSpec, calibration: Tensor) -> Iterator[tuple[Layer, StoredScaled]]:
    """Yield the codes and scales of each layer of each block.

    Args:
        model: a pass that runs blocks.
        spec: the method's.
        calibration: token windows, int64 [samples, length].

    Raises:
        ActivationError: inputs on calibration data are not finite.
        WeightError: a weight with NaN or infinite values.
    """
    kept = model.start(calibration)
    for block in model.blocks():
        inputs = BlockInputs(group_size=spec.blocksize if spec.clip else None, of_stacks=ROW)
        after = block.run(kept, watch=inputs.add)
        # All scales are searched for before the first weight changes.
        scales: dict[str, Tensor] = {}
        for layers in inputs.groups(block.layers):
            scale = _best_scale(block, layers, kept, after, inputs, spec=spec, storage_dtype=model.storage_dtype)
            scales |= {layer.name: scale for layer in layers}
        for layer in block.layers:
            dtype = storage_dtype_of(layer.weight, model.storage_dtype)
            values, scale = _stored_values(layer, dtype), scales[layer.name]
            yield (
                layer,
                StoredScaled(
                    tensor=_quantized(values, scale.float(), spec, inputs.of(layer.name)),
                    scale=scale,
                    storage_dtype=dtype,
                    has_scale=inputs.shared.get(layer.name, layer.name) == layer.name,
                    tokens=inputs.tokens.get(layer.name, 0),
                ),
            )
        kept = after


def scales_of(magnitudes: Tensor, exponent: float) -> Tensor:
    """Return scales mean |x|^r, at least 1e-4, over the root of the largest times the least: float16 [in_features].

    Codes don't depend on what all are divided by, but for absmax's rounding.
    """
    scale = magnitudes.float().pow(exponent).clamp_(min=LEAST_SCALE)
    return scale.div_((scale.max() * scale.min()).sqrt()).half()


def _best_scale(  # noqa: PLR0913  # what a search is of
    block: Block,
    layers: Sequence[Layer],
    before: Activations,
    after: Activations,
    inputs: BlockInputs,
    *,
    spec: AwqSpec,
    storage_dtype: torch.dtype | None,
) -> Tensor:
    """Return the scales of layers that share an input: those of the least squared error of the block's output.

    The block's other layers have their 16-bit weights. Matrices of a stack go by the error of their own output. Of
    equals the lowest exponent.
    """
    dtypes = [storage_dtype_of(layer.weight, storage_dtype) for layer in layers]
    weights = [_stored_values(layer, dtype) for layer, dtype in zip(layers, dtypes, strict=True)]
    sums, plain = inputs.of(layers[0].name), spec.blockwise()
    if sums is None:  # no token reaches them
        return torch.ones(weights[0].shape[1], dtype=torch.float16, device=weights[0].device)
    magnitudes = sums.magnitudes / sums.tokens

    def scaled(exponent: float) -> Iterator[Tensor]:
        scale = scales_of(magnitudes, exponent)
        for values, dtype in zip(weights, dtypes, strict=True):
            q = quantize_wide(values * scale.float(), plain)
            yield StoredScaled(tensor=q, scale=scale, storage_dtype=dtype).weight()

    errors = []
    with trying([layer for layer in layers if layer.stack is None]):
        for candidate in map(scaled, EXPONENTS):
            if layers[0].stack is not None:
                own = zip(candidate, weights, strict=True)
                errors.append(torch.stack([_own_error(q.float() - values, sums) for q, values in own]).sum())
                continue
            for layer, weight in zip(layers, candidate, strict=True):
                layer.working.copy_(weight)
            errors.append(_output_error(block, before, after))
    # Looked at once, at the end: a GPU is not waited for after each.
    best = int(torch.stack(errors).nan_to_num_(nan=torch.inf).argmin())
    return scales_of(magnitudes, EXPONENTS[best])


def _own_error(error: Tensor, sums: InputSums) -> Tensor:
    """Return the squared error of a layer's output over all tokens, for that of its weight: float64, 0-dim."""
    return _group_errors(error, sums.within(error.shape[1])).sum(dtype=torch.float64)


def _output_error(block: Block, before: Activations, after: Activations) -> Tensor:
    """Return the squared error of what leaves a block, as its layers are now: float64, 0-dim. A batch at a time."""
    total = None
    for left, true in zip(block.outputs(before), after.hidden, strict=True):
        error = (left.float() - true.to(left.device, non_blocking=True).float()).square().sum(dtype=torch.float64)
        total = error if total is None else total + error
    assert total is not None
    return total


def _stored_values(layer: Layer, dtype: torch.dtype) -> Tensor:
    """Return a layer's weight cast to 16 bits, as float32."""
    weight = layer.weight
    with naming(layer):
        check_weight(weight)
        values = weight.detach().to(dtype).float()
        if not bool(values.isfinite().all()):
            raise non_finite("weight", dtype)
    return values


def _quantized(values: Tensor, scale: Tensor, spec: AwqSpec, sums: InputSums | None) -> QuantizedTensor:
    """Quantize a scaled weight [out, in], whose groups are clipped by the error of their part of the output."""
    scaled, plain = values * scale, spec.blockwise().of_row(values.shape[1])
    first = quantize_wide(scaled, plain)
    if not spec.clip or sums is None or sums.products is None:
        return first
    fitted = first.codebook if is_data_dependent(plain) else None
    blocks = Blocks.of(tuple(values.shape), plain)
    largest = largest_magnitudes(Source(scaled, torch.float32, None, None), blocks, torch.float32)
    largest = largest.view(len(values), -1)
    products = sums.within(min(blocks.size, values.shape[1]))
    limit, least = largest, torch.full_like(largest, torch.inf)
    for i in range(CANDIDATES):
        candidate = largest * ((STEPS - i) / STEPS)
        q = quantize_wide(_clamped(scaled, candidate, blocks.size), plain, fitted=fitted)
        error = _group_errors(dequantize(q).div_(scale).sub_(values), products)
        better = error < least
        limit, least = torch.where(better, candidate, limit), torch.where(better, error, least)
    return quantize_wide(_clamped(scaled, limit, blocks.size), plain, fitted=fitted)


def _clamped(values: Tensor, limit: Tensor, size: int) -> Tensor:
    """Return values [out, in] within the limits of their groups [out, groups]."""
    of_value = limit.repeat_interleave(size, dim=1)[:, : values.shape[1]]
    return values.clamp(-of_value, of_value)


def _group_errors(error: Tensor, products: Tensor) -> Tensor:
    """Return the squared error of each group's part of the output, over all tokens: float32 [out, groups].

    Args:
        error: of the weight, [out, in].
        products: sums of x x^T within groups, [groups, size, size].
    """
    groups, size, _ = products.shape
    padded = torch.nn.functional.pad(error, (0, groups * size - error.shape[1])).view(len(error), groups, size)
    of_group = padded.transpose(0, 1)
    return (torch.bmm(of_group, products) * of_group).sum(-1).t()
