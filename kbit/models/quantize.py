"""Quantize a whole model, in place or packed into k bits, count its bits, and take it back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor, nn

from kbit.models.architectures import ArchitectureError, Layer, block_layers, key_of
from kbit.models.outliers import outlier_columns
from kbit.packed.linear import KBitLinear
from kbit.packed.replacing import check_replaceable, pack_layer
from kbit.quantizer.blockwise import QuantizedTensor, dequantize, quantize
from kbit.quantizer.codebooks import is_data_dependent
from kbit.spec import BASELINE_BITS, QuantSpec


@dataclass(kw_only=True, eq=False)
class QuantHandle:
    """A quantized model's way back, and its size. As a context manager it restores the model at the end.

    Attributes:
        spec: how it was quantized.
        layers: [out_features, in_features] of each quantized layer, by name; empty for the baseline.
        bits_per_param: bits stored for the quantized weights, a weight (codes, absmax, data-dependent codebooks, kept
            columns with their indices, means); 16 for the baseline.
        total_bits: bits of the whole model: the quantized weights as stored, every other parameter at 16 bits, tied
            ones once.
        total_bits_nominal: the same with the paper's count of a quantized weight, k + 16/B + p (16 - k).
        codebook_hash: SHA-256 over the layers' codebooks (float32, little-endian), in their order; over the one
            codebook where all share it. None for the baseline, which has none.
    """

    spec: QuantSpec
    layers: dict[str, tuple[int, int]]
    bits_per_param: float
    total_bits: int
    total_bits_nominal: float
    codebook_hash: str | None
    _undo: list[Callable[[], None]] = field(repr=False)

    def restore(self) -> None:
        """Give the model its original weights back, bit for bit, and in a packed one its modules, where it now lies.

        Where the packed model was cast, they are cast to its dtype now. A second call does nothing.

        Raises:
            ValueError: the packed model is on the meta device.
        """
        _restore(self._undo)

    def __enter__(self) -> QuantHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


@torch.no_grad()
def quantize_model(
    model: nn.Module, spec: QuantSpec, *, storage_dtype: torch.dtype | None = None, packed: bool = False
) -> QuantHandle:
    """Quantize a model's attention and FFN layers: those that ``kbit.models.architectures.block_layers`` lists.

    Their weights are replaced by their quantized and dequantized values, in the model's dtype; or, with `packed`, the
    layers by ``KBitLinear`` modules, which hold k bits a weight. GPT-2's Conv1D weights are transposed to [out, in]
    first. The originals are kept on the host until ``restore``; on the device there are never more than the model and
    one layer's quantized and dequantized (packed: quantized and laid out) forms.

    Args:
        model: a causal language model on any device, in its 16-bit dtype or one that was cast up from it.
        spec: how. With bits=16 nothing changes, and the handle works all the same.
        storage_dtype: the checkpoint's 16-bit dtype, float16 or bfloat16, for a model that was cast up; None takes the
            weights' own, or float16.
        packed: hold the layers in k bits. Such a model is for inference: call it under torch.no_grad(), without which
            torch.compile traces a backward that these layers don't have.

    Raises:
        ArchitectureError: no layers to quantize, or they are quantized already; spec.outlier_fraction > 0 and the
            layers' order isn't known; packed, and a layer has hooks or a forward of its own, shares its weight with
            another, or is float64.
        WeightError: a weight with NaN or infinite values. Whatever the error, the model has its original weights again.
    """
    if any(isinstance(module, KBitLinear) for module in model.modules()):
        raise ArchitectureError(f"{type(model).__name__} is packed in k bits already: restore or load the 16-bit model")
    layers = [] if spec.is_baseline else block_layers(model)
    if packed:
        check_replaceable(model, layers)
    columns = (
        outlier_columns(model, spec.outlier_fraction, storage_dtype=storage_dtype) if spec.outlier_fraction else {}
    )
    quantized = sum(layer.weight.numel() for layer in layers)
    rest = BASELINE_BITS * (_parameters(model) - quantized)
    shapes = {layer.name: (layer.weight.shape[0], layer.weight.shape[1]) for layer in layers}
    hashed = hashlib.sha256()
    undo: list[Callable[[], None]] = []
    stored_bits = 0
    try:
        for number, layer in enumerate(layers):
            q = _quantized(layer, spec, columns.get(layer.name), storage_dtype)
            stored_bits += q.nbits
            if number == 0 or is_data_dependent(spec):
                hashed.update(q.codebook.cpu().numpy().astype("<f4").tobytes())
            undo.append(pack_layer(model, layer, q) if packed else _overwrite(layer, q))
            del q  # before the next one is made
    except BaseException:
        _restore(undo)
        raise
    return QuantHandle(
        spec=spec,
        layers=shapes,
        bits_per_param=stored_bits / quantized if quantized else float(BASELINE_BITS),
        total_bits=stored_bits + rest,
        total_bits_nominal=quantized * spec.bits_per_param_nominal + rest,
        codebook_hash=hashed.hexdigest() if layers else None,
        _undo=undo,
    )


def _quantized(
    layer: Layer, spec: QuantSpec, columns: Tensor | None, storage_dtype: torch.dtype | None
) -> QuantizedTensor:
    try:
        return quantize(layer.weight, spec, outlier_columns=columns, storage_dtype=storage_dtype)
    except ValueError as error:
        error.add_note(f"in layer {layer.name}")
        raise


def _overwrite(layer: Layer, q: QuantizedTensor) -> Callable[[], None]:
    """Give a layer its dequantized weight. Returns the way back."""
    parameter = layer.parameter
    original = parameter.detach().to("cpu", copy=True)
    layer.weight.copy_(dequantize(q))

    def undo() -> None:
        parameter.detach().copy_(original)

    return undo


@torch.no_grad()
def _restore(undo: list[Callable[[], None]]) -> None:
    """Go every step back, each dropped once it is done: what remains is what is still quantized."""
    while undo:
        undo[-1]()
        undo.pop()


def _parameters(model: nn.Module) -> int:
    """Parameters of the whole model, tied ones once."""
    return sum({key_of(p): p.numel() for p in model.parameters()}.values())
