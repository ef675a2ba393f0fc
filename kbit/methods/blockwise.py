"""Block-wise quantization with a codebook: each layer by itself (sections 2.2-2.3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from kbit.data_types import data_type
from kbit.methods.protocol import ModelPass, Undo
from kbit.models.architectures import Layer
from kbit.models.overwriting import rewrite
from kbit.packed.replacing import pack_layer
from kbit.quantizer.blockwise import QuantizedTensor, dequantize, quantize
from kbit.quantizer.codebooks import is_data_dependent
from kbit.spec import QuantSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredCodes:
    """Codes, absmax and codebook of one layer."""

    tensor: QuantizedTensor

    @property
    def nbits(self) -> int:
        return self.tensor.nbits

    @property
    def codebook(self) -> Tensor:
        return self.tensor.codebook

    @property
    def shares_codebook(self) -> bool:
        return not is_data_dependent(self.tensor.spec)

    def put(self, layer: Layer) -> Undo:
        return rewrite(layer, lambda working: dequantize(self.tensor, out=working))

    def pack(self, model: nn.Module, layer: Layer) -> Undo:
        return pack_layer(model, layer, self.tensor)


def quantize_layers(
    model: ModelPass, spec: QuantSpec, calibration: Tensor | None = None
) -> Iterator[tuple[Layer, StoredCodes]]:
    """Yield the codes of each layer of each block.

    Raises:
        ArchitectureError: spec.outlier_fraction > 0 and the layers' order isn't known.
        WeightError: a weight with NaN or infinite values.
    """
    columns = model.outlier_columns(spec.outlier_fraction) if spec.outlier_fraction else {}
    for block in model.blocks():
        for layer in block.layers:
            yield layer, StoredCodes(tensor=_quantized(layer, spec, columns.get(layer.name), model))


def _quantized(layer: Layer, spec: QuantSpec, columns: Tensor | None, model: ModelPass) -> QuantizedTensor:
    key = (layer.name, what_fits(spec), model.storage_dtype)
    try:
        q = quantize(
            layer.weight,
            spec,
            outlier_columns=columns,
            storage_dtype=model.storage_dtype,
            fitted=model.fitted.get(key),
        )
    except ValueError as error:
        error.add_note(f"in layer {layer.name}")
        raise
    if is_data_dependent(spec) and key not in model.fitted:
        model.fitted[key] = q.codebook.to("cpu", copy=True)
    return q


def what_fits(spec: QuantSpec) -> QuantSpec:
    """Return the spec with the axes that no fitted codebook of its data type depends on at one value each."""
    spec = replace(spec, clip=False)
    if data_type(str(spec.dtype), spec.codebook).of_blocks:
        return spec
    return replace(spec, blocksize=None, scheme="block", absmax_dtype="float16")
