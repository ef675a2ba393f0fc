"""Weights given other values in place, with the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kbit.models.architectures import Layer


def overwrite(layer: Layer, weight: Tensor) -> Callable[[], None]:
    """Give a layer a weight [out_features, in_features]. Returns the way back.

    The original is kept on the host, unless it is kept already (``Layer.original``).
    """
    return rewrite(layer, lambda working: working.copy_(weight))


def rewrite(layer: Layer, fill: Callable[[Tensor], object]) -> Callable[[], None]:
    """As ``overwrite``, with a function that writes the weight's values into the layer's own memory."""
    original = layer.original
    if original is not None:
        kept = original
        if is_same_memory(layer.parameter, kept):
            # A stack's other matrices keep their values until they are written, too.
            layer.parameter.data = torch.empty_like(kept) if layer.stack is None else kept.clone()
        fill(layer.working)
        return lambda: _copy(layer, layer.matrix(kept))
    before = layer.working.to("cpu", copy=True)
    fill(layer.working)
    return lambda: _copy(layer, before)


@contextmanager
def trying(layers: Sequence[Layer]) -> Iterator[None]:
    """Let layers have other weights for a while (``Layer.working``); then they have their own again, bit for bit.

    A copy of them is kept on their device.
    """
    for layer in layers:
        if layer.original is not None and is_same_memory(layer.parameter, layer.original):
            layer.parameter.data = layer.original.clone()
    before = [layer.working.clone() for layer in layers]
    try:
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.working.copy_(weight)


def is_same_memory(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors begin at the same address of a device."""
    return a.device == b.device and a.data_ptr() == b.data_ptr()


@torch.no_grad()
def restore(undo: list[Callable[[], None]]) -> None:
    """Go every step back, each dropped once it is done: what remains is what is still quantized."""
    while undo:
        undo[-1]()
        undo.pop()


def _copy(layer: Layer, values: Tensor) -> None:
    layer.working.copy_(values)
