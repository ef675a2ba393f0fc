"""Weights given other values in place, with the way back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kbit.models.architectures import Layer


def overwrite(layer: Layer, weight: Tensor) -> Callable[[], None]:
    """Give a layer a weight [out_features, in_features], and keep the original on the host. Returns the way back."""
    original = layer.weight.to("cpu", copy=True)
    layer.weight.copy_(weight)

    def undo() -> None:
        layer.weight.copy_(original)

    return undo


@torch.no_grad()
def restore(undo: list[Callable[[], None]]) -> None:
    """Go every step back, each dropped once it is done: what remains is what is still quantized."""
    while undo:
        undo[-1]()
        undo.pop()
