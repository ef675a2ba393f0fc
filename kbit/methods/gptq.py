"""GPTQ: block by block, each layer rounded so that later columns make up for the errors of earlier ones.

Frantar et al. 2022. A block's inputs are those of the quantized blocks before it; the second moments of its layers'
inputs are taken with the block as it was, in one pass over the calibration windows, a batch at a time. Layers that
share an input share its second moments and their factor. What is stored of a layer is what block-wise quantization with
groups stores; of permuted columns their order too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from kbit.methods.blockwise import StoredCodes, what_fits
from kbit.methods.inputs import SharedInputs
from kbit.methods.protocol import Block, ModelPass, Undo, naming
from kbit.models.architectures import Layer
from kbit.models.overwriting import rewrite
from kbit.packed.replacing import pack_layer
from kbit.quantizer.blockwise import dequantize, quantize
from kbit.quantizer.codebooks import is_data_dependent
from kbit.quantizer.gptq import quantize_corrected
from kbit.quantizer.hessian import Correction, SecondMoments, correction
from kbit.specs.gptq import GptqSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class CorrectedCodes(StoredCodes):
    """Codes, absmax and codebook of one layer; and of permuted columns the order.

    Attributes:
        order: int32 [in_features], the column that each place of the tensor is of; None where they are in place.
        tokens: that the layer calibrated on; 0 of one that is rounded, since none reached it.
    """

    order: Tensor | None = None
    tokens: int = 0

    @property
    def nbits(self) -> int:
        return self.tensor.nbits + (0 if self.order is None else 8 * self.order.nbytes)

    def code_tensors(self) -> tuple[Tensor, ...]:
        return (self.tensor.codes,) if self.order is None else (self.tensor.codes, self.order)

    def put(self, layer: Layer) -> Undo:
        order = self.order
        if order is None:
            return super().put(layer)
        return rewrite(layer, lambda working: working.index_copy_(1, order.long(), dequantize(self.tensor)))

    def pack(self, model: nn.Module, layer: Layer) -> Undo:
        return pack_layer(model, layer, self.tensor, self.order)


def quantize_layers(model: ModelPass, spec: GptqSpec, calibration: Tensor) -> Iterator[tuple[Layer, CorrectedCodes]]:
    """Yield the codes of each layer of each block.

    Args:
        model: a pass that runs blocks.
        spec: the method's.
        calibration: token windows, int64 [samples, length].

    Raises:
        HessianError: second moments of a layer's inputs that can't be used.
        WeightError: a weight with NaN or infinite values.
    """
    kept = model.start(calibration)
    for block in model.blocks():
        if block.layers:
            moments = BlockMoments()
            block.look(kept, moments.add)
            yield from quantize_block(model, block, spec, moments)
        kept = block.run(kept)


def quantize_block(
    model: ModelPass, block: Block, spec: GptqSpec, moments: BlockMoments
) -> Iterator[tuple[Layer, CorrectedCodes]]:
    """Yield the codes of a block's layers, by what is known of their inputs; as ``quantize_layers``."""
    left = Counter(moments.shared.get(layer.name) for layer in block.layers)
    factors: dict[str, Correction] = {}
    for layer in block.layers:
        source = moments.shared.get(layer.name)
        with naming(layer):
            if source is not None and source not in factors:
                factors[source] = correction(moments.take(source), act_order=spec.act_order, rotation=spec.rotation)
            by = None if source is None else factors[source]
            stored = _quantized(model, layer, spec, by, moments.tokens.get(layer.name, 0))
        left[source] -= 1
        if not left[source]:
            factors.pop(str(source), None)
        yield layer, stored
        del stored


def _quantized(model: ModelPass, layer: Layer, spec: GptqSpec, by: Correction | None, tokens: int) -> CorrectedCodes:
    """Quantize a layer; without a correction where no token reached it."""
    weight = layer.weight
    plain = spec.blockwise(weight.shape[1])
    key = (layer.name, what_fits(plain), model.storage_dtype)
    fitted, order = model.fitted.get(key), None
    if by is None:
        q = quantize(weight, plain, storage_dtype=model.storage_dtype, fitted=fitted)
    else:
        q, order = quantize_corrected(weight, spec, by, storage_dtype=model.storage_dtype, fitted=fitted)
    if is_data_dependent(plain) and fitted is None:
        model.fitted[key] = q.codebook.to("cpu", copy=True)
    return CorrectedCodes(tensor=q, order=order, tokens=tokens)


@dataclass(kw_only=True, eq=False)
class BlockMoments(SharedInputs):
    """Second moments of the inputs of a block's layers, one for all layers that are given the same tensor."""

    _sums: dict[str, SecondMoments] = field(default_factory=dict)

    def add(self, layer: Layer, x: Tensor) -> None:
        """Take in the input of a layer, [tokens, in_features], for a batch; no tokens are as if it was not called."""
        if not len(x):
            return
        if self.is_first(layer, x):
            if layer.name not in self._sums:
                self._sums[layer.name] = SecondMoments(x.shape[1], x.device)
            self._sums[layer.name].add(x)

    def take(self, layer: str) -> Tensor:
        """Return the second moments of a layer's input, float32, which are the caller's from now on."""
        self.let_go()
        return self._sums.pop(layer).take()
