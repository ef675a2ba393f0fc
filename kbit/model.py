"""Quantize a whole model in place, count its bits, and take it back."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor, nn

from kbit.architectures import Layer, block_layers, key_of
from kbit.blockwise import QuantizedTensor, dequantize, quantize
from kbit.codebooks import is_data_dependent
from kbit.outliers import outlier_columns
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
    _originals: list[tuple[nn.Parameter, Tensor]] = field(repr=False)

    def restore(self) -> None:
        """Give the model its original weights back, bit for bit. A second call does nothing."""
        _restore(self._originals)

    def __enter__(self) -> QuantHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


@torch.no_grad()
def quantize_model(model: nn.Module, spec: QuantSpec, *, storage_dtype: torch.dtype | None = None) -> QuantHandle:
    """Replace the weights of a model's attention and FFN layers by their quantized and dequantized values.

    Taken is what ``kbit.architectures.block_layers`` lists. GPT-2's Conv1D weights are transposed to [out, in] first.
    The originals are copied to the host until ``restore``; at work are the largest weight's quantized and dequantized
    forms beside it.

    Args:
        model: a causal language model on any device, in its 16-bit dtype or one that was cast up from it.
        spec: how. With bits=16 nothing changes, and the handle works all the same.
        storage_dtype: the checkpoint's 16-bit dtype, float16 or bfloat16, for a model that was cast up; None takes the
            weights' own, or float16.

    Raises:
        ArchitectureError: no layers to quantize, or spec.outlier_fraction > 0 and the layers' order isn't known.
        WeightError: a weight with NaN or infinite values. Whatever the error, the model has its original weights again.
    """
    layers = [] if spec.is_baseline else block_layers(model)
    columns = (
        outlier_columns(model, spec.outlier_fraction, storage_dtype=storage_dtype) if spec.outlier_fraction else {}
    )
    hashed = hashlib.sha256()
    originals: list[tuple[nn.Parameter, Tensor]] = []
    stored_bits = 0
    try:
        for number, layer in enumerate(layers):
            q = _quantized(layer, spec, columns.get(layer.name), storage_dtype)
            originals.append((layer.parameter, layer.parameter.detach().to("cpu", copy=True)))
            layer.weight.copy_(dequantize(q))
            stored_bits += q.nbits
            if number == 0 or is_data_dependent(spec):
                hashed.update(q.codebook.cpu().numpy().astype("<f4").tobytes())
    except BaseException:
        _restore(originals)
        raise
    quantized = sum(original.numel() for _, original in originals)
    rest = BASELINE_BITS * (_parameters(model) - quantized)
    return QuantHandle(
        spec=spec,
        layers={layer.name: (layer.weight.shape[0], layer.weight.shape[1]) for layer in layers},
        bits_per_param=stored_bits / quantized if quantized else float(BASELINE_BITS),
        total_bits=stored_bits + rest,
        total_bits_nominal=quantized * spec.bits_per_param_nominal + rest,
        codebook_hash=hashed.hexdigest() if layers else None,
        _originals=originals,
    )


def _quantized(
    layer: Layer, spec: QuantSpec, columns: Tensor | None, storage_dtype: torch.dtype | None
) -> QuantizedTensor:
    try:
        return quantize(layer.weight, spec, outlier_columns=columns, storage_dtype=storage_dtype)
    except ValueError as error:
        error.add_note(f"in layer {layer.name}")
        raise


@torch.no_grad()
def _restore(originals: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Copy the originals back, each dropped once it is: what remains is what is still quantized."""
    while originals:
        parameter, original = originals[-1]
        parameter.detach().copy_(original)
        originals.pop()


def _parameters(model: nn.Module) -> int:
    """Parameters of the whole model, tied ones once."""
    return sum({key_of(p): p.numel() for p in model.parameters()}.values())
