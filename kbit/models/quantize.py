"""Quantize a whole model, in place or packed into k bits, count its bits, and take it back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType

import torch
from torch import Tensor, nn

from kbit.errors import ArchitectureError, SpecError
from kbit.methods.noise import keep_slopes
from kbit.methods.protocol import Allotted, HasCodes, HasTokens, Stored, method_of, write
from kbit.models.architectures import Layer, key_of
from kbit.models.originals import Originals
from kbit.models.overwriting import restore
from kbit.models.whole import WholeModel
from kbit.packed.base import PackedLinear
from kbit.packed.int8 import Int8Linear, outlier_share
from kbit.packed.replacing import check_replaceable
from kbit.spec import Spec
from kbit.specs.base import BASELINE_BITS


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
        bits_per_param_nominal: the paper's count of a quantized weight; of blocks of whole rows the layers' mean.
        codebook_hash: SHA-256 over the layers' codebooks (float32, little-endian), in their order; over the one
            codebook where all share it. None where there are none: the baseline, ggml.
        codes_hash: SHA-256 over those of the layers' codes, in their order, of a method that calibrates; None of
            others, whose codes are the same on every device.
        calibration_tokens: how many reached each layer, by name, of a method that looks at layers' inputs: of an
            expert those that are sent to it, 0 where it is quantized without; empty for other methods.
        allocation: bits of each layer's codes, by name, of a method that gives each its own; empty for others.
        predicted_change: nats by which that method predicts the loss on its calibration data to rise; None of others.
        outlier_share: tells the share of input dimensions that llm_int8 has multiplied in 16 bits since it was last
            asked, over layers and sequences; None of other methods.
    """

    spec: Spec
    layers: dict[str, tuple[int, int]]
    bits_per_param: float
    total_bits: int
    total_bits_nominal: float
    bits_per_param_nominal: float
    codebook_hash: str | None
    codes_hash: str | None = None
    calibration_tokens: dict[str, int] = field(default_factory=dict)
    allocation: dict[str, int] = field(default_factory=dict)
    predicted_change: float | None = None
    outlier_share: Callable[[], float | None] = field(default=lambda: None, repr=False)
    _undo: list[Callable[[], None]] = field(repr=False)

    @property
    def allocation_hash(self) -> str | None:
        """SHA-256 over the layers' names and bits, in their order; None where all have the same."""
        told = "".join(f"{name} {bits}\n" for name, bits in self.allocation.items())
        return hashlib.sha256(told.encode()).hexdigest() if told else None

    @property
    def least_tokens(self) -> int | None:
        """The fewest calibration tokens that reached a layer; None where they are not known."""
        return min(self.calibration_tokens.values(), default=None)

    @property
    def unseen_layers(self) -> int | None:
        """Layers that no calibration token reached, and that are quantized without; None where that is not known."""
        seen = self.calibration_tokens.values()
        return sum(not tokens for tokens in seen) if seen else None

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
        slopes: of each layer, what ``kbit.methods.noise.loss_slopes`` measured on these windows in this dtype; None
            leaves that to the method that needs them.
    """

    tokens: Tensor
    dtype: torch.dtype | None = None
    slopes: Sequence[float] | None = None


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    spec: Spec,
    *,
    storage_dtype: torch.dtype | None = None,
    packed: bool = False,
    calibration: Calibrated | None = None,
    originals: Originals | None = None,
) -> QuantHandle:
    """Quantize a model's attention and FFN layers: those that ``kbit.models.architectures.block_layers`` lists.

    Their weights are replaced by their quantized and dequantized values, in the model's dtype; or, with `packed`, the
    layers by ``PackedLinear`` modules, which hold k bits per weight. GPT-2's Conv1D weights are transposed to [out, in]
    first. The originals are kept on the host until ``restore``; on the device there are never more than the model and
    one layer's quantized and dequantized (packed: quantized and laid out) forms, besides what the method itself needs.

    A method that calibrates sees dequantized blocks in any case; with `packed` its layers are replaced once all are
    quantized, so that their k-bit forms lie beside the model until then.

    For many cells of one model, one after another, `originals` keeps the weights once. Then a cell need not be restored
    before the next one: it is quantized from them, and the results are the same to the bit.

    Args:
        model: a causal language model on any device, in its 16-bit dtype or one that was cast up from it.
        spec: how. With bits=16 nothing changes, and the handle works all the same.
        storage_dtype: the checkpoint's 16-bit dtype, float16 or bfloat16, for a model that was cast up; None takes the
            weights' own, or float16.
        packed: hold the layers in k bits. Such a model is for inference: call it under torch.no_grad(), without which
            torch.compile traces a backward that these layers don't have.
        calibration: for a method that calibrates.
        originals: ``Originals(model=model)``, the same for all cells. A handle then restores nothing once a later cell
            was begun.

    Raises:
        ArchitectureError: no layers to quantize, or they are quantized already; spec.outlier_fraction > 0 and the
            layers' order isn't known; packed, and a layer has hooks or a forward of its own, shares its weight with
            another, or is float64.
        SpecError: a method that calibrates without calibration; packed, and the method's layers can't be packed.
        ValueError: `originals`, or slopes, of another model.
        WeightError: a weight with NaN or infinite values. Whatever the error, the model has its original weights again.
    """
    if originals is not None and originals.model is not model:
        raise ValueError("originals are another model's: make them of this one, Originals(model=model)")
    packed = packed or spec.replaces_layers
    # What a calibrating method finds depends on the blocks before: it sees the same ones, whichever way it is held.
    packs_last = packed and spec.calibrates
    waiting: list[tuple[Layer, Stored]] = []
    tokens, compute_dtype = (None, None) if calibration is None else (calibration.tokens, calibration.dtype)
    model_pass = WholeModel(module=model, storage_dtype=storage_dtype, compute_dtype=compute_dtype, originals=originals)
    undo = [] if originals is None else [originals.way_back()]
    try:
        if originals is not None:
            originals.begin(spec, packed=packed and not packs_last)
        layers = check_quantizable(model_pass, spec, packed=packed, calibrated=calibration is not None)
        count = BitCount(parameters=count_parameters(model))
        if calibration is not None and calibration.slopes is not None:
            _keep_slopes(model_pass, calibration.tokens, calibration.slopes, len(layers))
        for layer, stored in () if not layers else method_of(spec)(model_pass, spec, tokens):
            count.add(layer, stored)
            if packs_last:
                waiting.append((layer, stored))
            _write(model, layer, stored, undo, originals, packed=packed and not packs_last)
            del stored  # before the next one is made
        if waiting:
            restore(undo) if originals is None else originals.restore()
        while waiting:
            _write(model, *waiting.pop(0), undo, originals, packed=True)
        if originals is not None:
            originals.finish()
    except BaseException:
        restore(undo)
        raise
    handle = count.handle(spec, undo)
    if spec.replaces_layers:
        handle.outlier_share = partial(outlier_share, model)
    return handle


@torch.no_grad()
def stored_layers(
    model: nn.Module, spec: Spec, *, storage_dtype: torch.dtype | None = None, calibration: Calibrated | None = None
) -> Iterator[tuple[Layer, Stored]]:
    """Yield what ``quantize_model`` would store of each layer; the model is in its 16-bit form at the end.

    Raises:
        As ``quantize_model``.
    """
    tokens, compute_dtype = (None, None) if calibration is None else (calibration.tokens, calibration.dtype)
    model_pass = WholeModel(module=model, storage_dtype=storage_dtype, compute_dtype=compute_dtype)
    layers = check_quantizable(model_pass, spec, packed=False, calibrated=calibration is not None)
    if calibration is not None and calibration.slopes is not None:
        _keep_slopes(model_pass, calibration.tokens, calibration.slopes, len(layers))
    undo: list[Callable[[], None]] = []
    try:
        for layer, stored in method_of(spec)(model_pass, spec, tokens):
            yield layer, stored
            undo.append(write(stored, model, layer, packed=False))
    finally:
        restore(undo)


def _keep_slopes(model: WholeModel, tokens: Tensor, slopes: Sequence[float], layers: int) -> None:
    if len(slopes) != layers:
        raise ValueError(
            f"slopes of {len(slopes)} layers are another model's: {type(model.module).__name__} has {layers}"
        )
    keep_slopes(model, tokens, slopes)


def _write(
    model: nn.Module,
    layer: Layer,
    stored: Stored,
    undo: list[Callable[[], None]],
    originals: Originals | None,
    *,
    packed: bool,
) -> None:
    """Put what is stored of a layer into the model, and its way back where the originals are."""
    step = partial(write, stored, model, layer, packed=packed)
    if originals is not None:
        originals.put(layer, step, packed=packed)
    else:
        undo.append(step())


def check_quantizable(model: WholeModel, spec: Spec, *, packed: bool, calibrated: bool) -> list[Layer]:
    """Return the layers to quantize, none for the baseline; raise where the method can't take this model."""
    name = type(model.module).__name__
    if any(isinstance(module, PackedLinear | Int8Linear) for module in model.module.modules()):
        raise ArchitectureError(f"{name} is packed in k bits already: restore or load the 16-bit model")
    if spec.is_baseline:
        return []
    if spec.calibrates and not calibrated:
        raise SpecError(*spec.calibrating, "one that does not calibrate, or give calibration=Calibrated(...)")
    layers = model.layers
    if spec.replaces_layers and any(layer.stack is not None for layer in layers):
        allowed = f"one that quantizes weights alone: the experts of {name} are no layers that could be replaced"
        raise SpecError("method", spec.method, allowed)
    if packed:
        if not spec.packs:
            raise SpecError("method", spec.method, "one whose layers can be held in k bits, or packed=False")
        if spec.why_not_packed is not None:
            raise SpecError("packed", True, f"false with {spec.label!r}: {spec.why_not_packed}")
        check_replaceable(model.module, layers)
    return layers


@dataclass(kw_only=True, eq=False)
class BitCount:
    """What is counted of a model's layers while they are quantized.

    Attributes:
        parameters: of the whole model.
        shapes: [out_features, in_features] of the layers so far.
        stored_bits, quantized: bits that are stored of them, and their weights.
        codebooks: the values of their codebooks, float32, little-endian; of one codebook where all share it.
        code_hashes: SHA-256 of each layer's codes, of a method that calibrates.
        tokens: calibration tokens that reached each layer, of a method that looks at layers' inputs.
        allocation, predicted: bits of each layer and nats that it is predicted to add, of a method that allots them.
    """

    parameters: int
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    stored_bits: int = 0
    quantized: int = 0
    codebooks: bytearray = field(default_factory=bytearray)
    code_hashes: bytearray = field(default_factory=bytearray)
    tokens: dict[str, int] = field(default_factory=dict)
    allocation: dict[str, int] = field(default_factory=dict)
    predicted: list[float] = field(default_factory=list)

    def add(self, layer: Layer, stored: Stored) -> None:
        """Count a layer; they come in the model's order."""
        weight = layer.working
        self.shapes[layer.name] = (weight.shape[0], weight.shape[1])
        self.quantized += weight.numel()
        self.stored_bits += stored.nbits
        if stored.codebook is not None and (len(self.shapes) == 1 or not stored.shares_codebook):
            self.codebooks += stored.codebook.cpu().numpy().astype("<f4").tobytes()
        if isinstance(stored, Allotted):
            self.allocation[layer.name] = stored.bits
            self.predicted.append(stored.predicted)
        if isinstance(stored, HasTokens) and stored.tokens is not None:
            self.tokens[layer.name] = stored.tokens
        if isinstance(stored, HasCodes):
            parts = [t.cpu().contiguous().view(torch.uint8).numpy().tobytes() for t in stored.code_tensors()]
            self.code_hashes += hashlib.sha256(b"".join(parts)).digest()

    def handle(self, spec: Spec, undo: list[Callable[[], None]]) -> QuantHandle:
        """Return the handle of a model whose layers are all counted."""
        rest = BASELINE_BITS * (self.parameters - self.quantized)
        nominal = self.quantized * spec.bits_per_param_nominal
        if spec.nominal_by_layer:
            nominal = sum(rows * columns * spec.nominal_bits(columns) for rows, columns in self.shapes.values())
        return QuantHandle(
            spec=spec,
            layers=self.shapes,
            bits_per_param=self.stored_bits / self.quantized if self.quantized else float(BASELINE_BITS),
            total_bits=self.stored_bits + rest,
            total_bits_nominal=nominal + rest,
            bits_per_param_nominal=(
                nominal / self.quantized if spec.nominal_by_layer and self.quantized else spec.bits_per_param_nominal
            ),
            codebook_hash=hashlib.sha256(self.codebooks).hexdigest() if self.codebooks else None,
            codes_hash=hashlib.sha256(self.code_hashes).hexdigest() if self.code_hashes else None,
            calibration_tokens=self.tokens,
            allocation=self.allocation,
            predicted_change=math.fsum(self.predicted) if self.predicted else None,
            _undo=undo,
        )


def count_parameters(model: nn.Module) -> int:
    """Return the parameters of the whole model, tied ones once."""
    return sum({key_of(p): p.numel() for p in model.parameters()}.values())
