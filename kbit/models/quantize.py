"""Quantize a whole model, in place or packed into k bits, count its bits, and take it back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor, nn

from kbit.errors import ArchitectureError, SpecError
from kbit.methods.protocol import method_of
from kbit.models.architectures import key_of
from kbit.models.overwriting import restore
from kbit.models.whole import WholeModel
from kbit.packed.linear import KBitLinear
from kbit.packed.replacing import check_replaceable
from kbit.spec import BASELINE_BITS, Spec


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

    spec: Spec
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
        restore(self._undo)

    def __enter__(self) -> QuantHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibrated:
    """The data that a method calibrates on.

    Attributes:
        tokens: windows, int64 [samples, length].
        dtype: what they run in; None is the model's dtype.
    """

    tokens: Tensor
    dtype: torch.dtype | None = None


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    spec: Spec,
    *,
    storage_dtype: torch.dtype | None = None,
    packed: bool = False,
    calibration: Calibrated | None = None,
) -> QuantHandle:
    """Quantize a model's attention and FFN layers: those that ``kbit.models.architectures.block_layers`` lists.

    Their weights are replaced by their quantized and dequantized values, in the model's dtype; or, with `packed`, the
    layers by ``KBitLinear`` modules, which hold k bits per weight. GPT-2's Conv1D weights are transposed to [out, in]
    first. The originals are kept on the host until ``restore``; on the device there are never more than the model and
    one layer's quantized and dequantized (packed: quantized and laid out) forms, besides what the method itself needs.

    Args:
        model: a causal language model on any device, in its 16-bit dtype or one that was cast up from it.
        spec: how. With bits=16 nothing changes, and the handle works all the same.
        storage_dtype: the checkpoint's 16-bit dtype, float16 or bfloat16, for a model that was cast up; None takes the
            weights' own, or float16.
        packed: hold the layers in k bits. Such a model is for inference: call it under torch.no_grad(), without which
            torch.compile traces a backward that these layers don't have.
        calibration: for a method that calibrates.

    Raises:
        ArchitectureError: no layers to quantize, or they are quantized already; spec.outlier_fraction > 0 and the
            layers' order isn't known; packed, and a layer has hooks or a forward of its own, shares its weight with
            another, or is float64.
        SpecError: a method that calibrates without calibration; packed, and the method's layers can't be packed.
        WeightError: a weight with NaN or infinite values. Whatever the error, the model has its original weights again.
    """
    if any(isinstance(module, KBitLinear) for module in model.modules()):
        raise ArchitectureError(f"{type(model).__name__} is packed in k bits already: restore or load the 16-bit model")
    if spec.calibrates and calibration is None:
        raise SpecError("method", spec.method, "one that does not calibrate, or give calibration=Calibrated(...)")
    tokens, compute_dtype = (None, None) if calibration is None else (calibration.tokens, calibration.dtype)
    model_pass = WholeModel(module=model, storage_dtype=storage_dtype, compute_dtype=compute_dtype)
    layers = [] if spec.is_baseline else model_pass.layers
    if spec.calibrates and any(layer.stack is not None for layer in layers):
        allowed = f"one that does not calibrate: an expert of {type(model).__name__} sees only the tokens sent to it"
        raise SpecError("method", spec.method, allowed)
    if packed and not spec.is_baseline:
        if not spec.packs:
            raise SpecError("method", spec.method, "one whose layers can be held in k bits, or packed=False")
        check_replaceable(model, layers)
    shapes: dict[str, tuple[int, int]] = {}
    hashed = hashlib.sha256()
    undo: list[Callable[[], None]] = []
    parameters, stored_bits, quantized = _parameters(model), 0, 0
    try:
        for layer, stored in () if spec.is_baseline else method_of(spec)(model_pass, spec, tokens):
            shapes[layer.name] = (layer.weight.shape[0], layer.weight.shape[1])
            quantized += layer.weight.numel()
            stored_bits += stored.nbits
            if stored.codebook is not None and (len(shapes) == 1 or not stored.shares_codebook):
                hashed.update(stored.codebook.cpu().numpy().astype("<f4").tobytes())
            undo.append(stored.pack(model, layer) if packed else stored.put(layer))
            del stored  # before the next one is made
    except BaseException:
        restore(undo)
        raise
    rest = BASELINE_BITS * (parameters - quantized)
    return QuantHandle(
        spec=spec,
        layers=shapes,
        bits_per_param=stored_bits / quantized if quantized else float(BASELINE_BITS),
        total_bits=stored_bits + rest,
        total_bits_nominal=quantized * spec.bits_per_param_nominal + rest,
        codebook_hash=hashed.hexdigest() if shapes else None,
        _undo=undo,
    )


def _parameters(model: nn.Module) -> int:
    """Parameters of the whole model, tied ones once."""
    return sum({key_of(p): p.numel() for p in model.parameters()}.values())
