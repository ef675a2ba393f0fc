"""HQQ: each layer by itself, with zero points optimised without data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from kbit.methods.protocol import ModelPass, Undo, naming
from kbit.models.architectures import Layer
from kbit.models.overwriting import rewrite
from kbit.packed.replacing import pack_layer
from kbit.quantizer.hqq import HqqTensor, as_blockwise, dequantize_hqq, quantize_hqq
from kbit.specs.hqq import HqqSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredHqq:
    """Codes, scales and zero points of one layer. There is no codebook: codes are whole numbers."""

    tensor: HqqTensor
    codebook: None = None
    shares_codebook: bool = True

    @property
    def nbits(self) -> int:
        return self.tensor.nbits

    def put(self, layer: Layer) -> Undo:
        return rewrite(layer, lambda working: dequantize_hqq(self.tensor, out=working))

    def pack(self, model: nn.Module, layer: Layer) -> Undo:
        return pack_layer(model, layer, as_blockwise(self.tensor))


def quantize_layers(
    model: ModelPass, spec: HqqSpec, calibration: Tensor | None = None
) -> Iterator[tuple[Layer, StoredHqq]]:
    """Yield codes, scales and zero points of each layer of each block.

    Raises:
        WeightError: a weight with NaN or infinite values.
    """
    for block in model.blocks():
        for layer in block.layers:
            with naming(layer):
                q = quantize_hqq(layer.weight, spec, storage_dtype=model.storage_dtype)
            yield layer, StoredHqq(tensor=q)
