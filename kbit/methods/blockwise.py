"""Block-wise quantization with a codebook: each layer by itself (sections 2.2-2.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from kbit.data_types import data_type
from kbit.methods.inputs import BlockInputs
from kbit.methods.protocol import ModelPass, Undo, naming
from kbit.models.architectures import Layer
from kbit.models.overwriting import rewrite
from kbit.packed.replacing import pack_layer
from kbit.quantizer.blockwise import QuantizedTensor, dequantize, quantize
from kbit.quantizer.codebooks import is_data_dependent
from kbit.quantizer.weighted_lloyd import weighted_codebook
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


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibratedCodes(StoredCodes):
    """Codes that calibration data had a part in.

    Attributes:
        tokens: that the layer calibrated on; None where the method looks at no layer's inputs.
    """

    tokens: int | None = None

    def code_tensors(self) -> tuple[Tensor, ...]:
        return (self.tensor.codes,)


def quantize_layers(
    model: ModelPass, spec: QuantSpec, calibration: Tensor | None = None
) -> Iterator[tuple[Layer, StoredCodes]]:
    """Yield the codes of each layer of each block.

    Raises:
        ActivationError: as ``_calibrated``.
        ArchitectureError: spec.outlier_fraction > 0 and the layers' order isn't known.
        WeightError: a weight with NaN or infinite values.
    """
    columns = model.outlier_columns(spec.outlier_fraction) if spec.outlier_fraction else {}
    if spec.calibrates and calibration is not None:
        yield from _calibrated(model, spec, columns, calibration)
        return
    for block in model.blocks():
        for layer in block.layers:
            yield layer, StoredCodes(tensor=quantize_layer(layer, spec, columns.get(layer.name), model))


def _calibrated(
    model: ModelPass, spec: QuantSpec, columns: Mapping[str, Tensor | None], calibration: Tensor
) -> Iterator[tuple[Layer, StoredCodes]]:
    """As ``quantize_layers``, by what the layers' inputs are in the 16-bit model.

    Raises:
        ActivationError: inputs on calibration data are not finite.
    """
    kept = model.start(calibration)
    for block in model.blocks():
        inputs = BlockInputs()
        after = block.run(kept, watch=inputs.add)
        for layer in block.layers:
            means, own = inputs.means(layer), columns.get(layer.name)
            # Where no token reaches a layer (an expert), the proxy's columns stay.
            if own is not None and spec.outlier_criterion == "activation" and means.tokens:
                own = largest_inputs(means.magnitudes, own.numel())
            weights = means.squares if spec.weighting == "activation" else None
            q = quantize_layer(layer, spec, own, model, weights)
            yield layer, CalibratedCodes(tensor=q, tokens=means.tokens)
        kept = after


def largest_inputs(magnitudes: Tensor, count: int) -> Tensor:
    """Return the input dimensions of the largest magnitudes, ties to the lower one: int32 [count], ascending."""
    chosen: Tensor = magnitudes.sort(descending=True, stable=True).indices[:count].sort().values
    return chosen.int()


def quantize_layer(
    layer: Layer, spec: QuantSpec, columns: Tensor | None, model: ModelPass, weights: Tensor | None = None
) -> QuantizedTensor:
    """Quantize a layer, by what was fitted to it already.

    Args:
        layer: the layer.
        spec: how.
        columns: input dimensions that stay in 16 bits.
        model: the pass that it is of.
        weights: of the input dimensions, float64 [in_features], for a codebook that is fitted by them.

    Raises:
        WeightError: a weight with NaN or infinite values.
    """
    key = (layer.name, what_fits(spec), model.storage_dtype)
    # What is fitted by calibration data is of this cell alone; so is what kept columns of calibration data leave.
    is_shared = is_data_dependent(spec) and not spec.calibrates
    fitted = model.fitted.get(key) if is_shared else None
    with naming(layer):
        if weights is not None:
            fitted = weighted_codebook(
                layer.weight, spec, weights, outlier_columns=columns, storage_dtype=model.storage_dtype
            )
        q = quantize(layer.weight, spec, outlier_columns=columns, storage_dtype=model.storage_dtype, fitted=fitted)
    if is_shared and key not in model.fitted:
        model.fitted[key] = q.codebook.to("cpu", copy=True)
    return q


def what_fits(spec: QuantSpec) -> QuantSpec:
    """Return the spec with the axes that no fitted codebook of its data type depends on at one value each."""
    spec = replace(spec, clip=False)
    if data_type(str(spec.dtype), spec.codebook).of_blocks:
        return spec
    return replace(spec, blocksize=None, scheme="block", absmax_dtype="float16")
