"""Block-scaled floats: each layer by itself, in an MX format or NVFP4."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kbit.methods.protocol import ModelPass, Undo, naming
from kbit.models.architectures import Layer
from kbit.models.overwriting import rewrite
from kbit.packed.block_float import BlockFloatLinear
from kbit.packed.replacing import put_in_place
from kbit.quantizer.block_float import BlockFloatTensor, dequantize_block_float, quantize_block_float
from kbit.specs.block_float import BlockFloatSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredBlockFloat:
    """Codes and scales of one layer."""

    tensor: BlockFloatTensor
    shares_codebook: bool = True

    @property
    def nbits(self) -> int:
        return self.tensor.nbits

    @property
    def codebook(self) -> Tensor:
        """The format's magnitudes, ascending."""
        return torch.tensor(self.tensor.spec.element.magnitudes(), dtype=torch.float32)

    def put(self, layer: Layer) -> Undo:
        return rewrite(layer, lambda working: dequantize_block_float(self.tensor, out=working))

    def pack(self, model: nn.Module, layer: Layer) -> Undo:
        dtype = layer.parameter.dtype
        return put_in_place(
            model, layer, lambda bias: BlockFloatLinear.from_quantized(self.tensor, bias=bias, dtype=dtype)
        )


def quantize_layers(
    model: ModelPass, spec: BlockFloatSpec, calibration: Tensor | None = None
) -> Iterator[tuple[Layer, StoredBlockFloat]]:
    """Yield the codes and scales of each layer of each block.

    Raises:
        WeightError: a weight with NaN or infinite values.
    """
    for block in model.blocks():
        for layer in block.layers:
            with naming(layer):
                q = quantize_block_float(layer.weight, spec, storage_dtype=model.storage_dtype)
            yield layer, StoredBlockFloat(tensor=q)
