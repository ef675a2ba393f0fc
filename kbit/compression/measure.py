"""Measure each layer of a quantized model: its bits, and the relative errors of its weight and of its outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from kbit.methods.protocol import Stored, method_of, write
from kbit.models.architectures import Layer, key_of
from kbit.models.overwriting import restore
from kbit.models.quantize import BitCount, Calibrated, QuantHandle, check_quantizable, count_parameters
from kbit.models.whole import WholeModel
from kbit.spec import Spec
from kbit.specs.base import BASELINE_BITS

_VALUES_AT_ONCE: Final = 1 << 24
VECTORS: Final = "norms and biases"
_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """What is stored of one tensor, and what it lost.

    Attributes:
        name: in the model.
        block: its block's number; None outside the blocks.
        shape: the weight's, [out_features, in_features] of a layer.
        bits: stored, all overhead counted; 16 per value where it isn't quantized.
        quantized: by the method.
        weight_error: ‖Ŵ - W‖ / ‖W‖, Frobenius; None where it isn't quantized.
        output_error: ‖(Ŵ - W) Xᵀ‖ / ‖W Xᵀ‖ on the 16-bit model's own inputs X; None without them.
    """

    name: str
    block: int | None
    shape: tuple[int, ...]
    bits: int
    quantized: bool
    weight_error: float | None = None
    output_error: float | None = None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def kind(self) -> str:
        """The name without numbers: what tensors of all blocks have in common; one for all vectors."""
        if not self.quantized and len(self.shape) < 2:
            return VECTORS
        return _NUMBER.sub("*", self.name)


@dataclass(frozen=True, kw_only=True)
class Compression:
    """A model under one spec.

    Attributes:
        label: the spec's.
        tensors: of the whole model, tied ones once: the quantized ones in the model's order, then the others.
        bits_per_param: of the quantized weights, as cells have it.
        total_bits: of the whole model, as cells have it.
    """

    label: str
    tensors: list[TensorReport]
    bits_per_param: float
    total_bits: int

    def by_kind(self) -> dict[str, list[TensorReport]]:
        """Return the tensors by kind, those with the most bits first."""
        kinds: dict[str, list[TensorReport]] = {}
        for tensor in self.tensors:
            kinds.setdefault(tensor.kind, []).append(tensor)
        return dict(sorted(kinds.items(), key=lambda kind: -sum(t.bits for t in kind[1])))


@torch.no_grad()
def measure(
    model: nn.Module,
    spec: Spec,
    *,
    tokens: Tensor | None = None,
    storage_dtype: torch.dtype | None = None,
    calibration: Calibrated | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Compression:
    """Quantize a model, measure each layer as it is quantized, and take the model back, bit for bit.

    Args:
        model: a causal language model on any device; it comes back as it was.
        spec: how.
        tokens: windows, int64 [windows, length], on which outputs are compared; None compares weights alone. The host
            holds each layer's inputs for them: 2 bytes per token and input dimension of the model's layers in 16 bits.
        storage_dtype: as in ``kbit.quantize_model``.
        calibration: as there.
        say: told what is being done.

    Raises:
        As ``quantize_model``.
    """
    compute = None if calibration is None else calibration.dtype
    model_pass = WholeModel(module=model, storage_dtype=storage_dtype, compute_dtype=compute)
    check_quantizable(model_pass, spec, packed=spec.replaces_layers, calibrated=calibration is not None)
    inputs = {} if tokens is None else _inputs(WholeModel(module=model), tokens, say)
    count = BitCount(parameters=count_parameters(model))
    undo: list[Callable[[], None]] = []
    found, keys = [], set()
    others = {name: (p, key_of(p)) for name, p in model.named_parameters()}
    try:
        layers = (
            ()
            if spec.is_baseline
            else method_of(spec)(model_pass, spec, None if calibration is None else calibration.tokens)
        )
        for layer, stored in layers:
            say(f"{layer.name}")
            keys.add(key_of(layer.parameter))
            count.add(layer, stored)
            found.append(_layer(model, layer, stored, spec, inputs.get(layer.name), undo))
        handle: QuantHandle = count.handle(spec, [])
    finally:
        restore(undo)
    seen = set(keys)
    for name, (parameter, key) in others.items():
        if key not in seen:
            seen.add(key)
            found.append(_kept(name, parameter))
    return Compression(
        label=spec.label, tensors=found, bits_per_param=handle.bits_per_param, total_bits=handle.total_bits
    )


def _layer(
    model: nn.Module, layer: Layer, stored: Stored, spec: Spec, x: Tensor | None, undo: list[Callable[[], None]]
) -> TensorReport:
    """Quantize one layer, and compare it with what it was."""
    before = layer.weight.detach().clone()
    undo.append(write(stored, model, layer, packed=spec.replaces_layers))
    if spec.replaces_layers:
        module = model.get_submodule(layer.name)
        after, run = module.dequantize(), module  # type: ignore[operator]
    else:
        after, run = layer.working, None
    return TensorReport(
        name=layer.name,
        block=layer.block if layer.block >= 0 else None,
        shape=tuple(before.shape),
        bits=stored.nbits,
        quantized=True,
        weight_error=relative_error(before, after),
        output_error=None if x is None else _output_error(before, after, x.to(before.device), run),
    )


def relative_error(before: Tensor, after: Tensor) -> float:
    """Return ‖after - before‖ / ‖before‖ in float32, some rows at a time; 0 where both are zero."""
    error = total = 0.0
    for first in range(0, before.shape[0], step := max(1, _VALUES_AT_ONCE // before.shape[1])):
        exact = before[first : first + step].float()
        error += float((after[first : first + step].float() - exact).square().sum(dtype=torch.float64))
        total += float(exact.square().sum(dtype=torch.float64))
    return (error / total) ** 0.5 if total else float("inf" if error else 0)


def _output_error(before: Tensor, after: Tensor, x: Tensor, module: nn.Module | None) -> float:
    """Return the relative error of a layer's outputs for x [tokens, in_features], without its bias.

    A module that quantizes what it is given (llm_int8) is run itself, on x as one sequence.
    """
    x = x.float()
    given = None if module is None else _without_bias(module, x)
    error = total = 0.0
    for first in range(0, before.shape[0], step := max(1, _VALUES_AT_ONCE // max(before.shape[1], len(x)))):
        rows = slice(first, first + step)
        exact = x @ before[rows].float().t()
        changed = x @ after[rows].float().t() if given is None else given[:, rows]
        error += float((changed - exact).square().sum(dtype=torch.float64))
        total += float(exact.square().sum(dtype=torch.float64))
    return (error / total) ** 0.5 if total else float("inf" if error else 0)


def _without_bias(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = module(x[None])[0]
    return y if module.bias is None else y - module.bias.float()  # type: ignore[operator]


def _kept(name: str, parameter: Tensor) -> TensorReport:
    block = re.search(r"\.(\d+)\.", name)
    return TensorReport(
        name=name,
        block=int(block[1]) if block else None,
        shape=tuple(parameter.shape),
        bits=BASELINE_BITS * parameter.numel(),
        quantized=False,
    )


def _inputs(model: WholeModel, tokens: Tensor, say: Callable[[str], None]) -> Mapping[str, Tensor]:
    """Return the inputs of each layer in the 16-bit model, [tokens, in_features] on the host."""
    kept: dict[str, list[Tensor]] = {}
    shared: dict[tuple[int, torch.Size], Tensor] = {}

    def watch(layer: Layer, x: Tensor) -> None:
        # Layers that share an input are given the same memory, one after another.
        key = (x.data_ptr(), x.shape)
        if key not in shared or not torch.equal(shared[key].to(x.device), x):
            shared[key] = x.detach().to("cpu", copy=True)
        kept.setdefault(layer.name, []).append(shared[key])

    states = model.start(tokens)
    for block in model.blocks():
        say(f"inputs of block {block.number}")
        states = block.run(states, watch=watch)
        shared.clear()
    return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in kept.items()}
