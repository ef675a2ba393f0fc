"""Checkpoints of bitsandbytes in 4 bits (nf4, fp4, nested absmax or not) and 8 bits, as transformers writes them.

4 bits: weight uint8 [values / 2, 1], two codes a byte of the flattened tensor, the first in the high half; absmax
float32, one per block; quant_map float32 [16], the codes' values; quant_state, JSON in bytes: shape, block size, dtype.
Nested: absmax uint8, of which the values are nested_quant_map's times nested_absmax of its block, plus nested_offset.
A weight is quant_map[code] · absmax.

8 bits: weight int8 [out, in] and SCB float32 [out], each row's absmax: a weight is code · SCB / 127. Activations stay
in 16 bits here, which the library quantizes too.

Source: bitsandbytes 0.50, functional.py (QuantState.as_dict, dequantize_4bit, int8_vectorwise_dequant).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Final

from kbit.errors import CheckpointError
from kbit.models.prequantized.layouts import KEY, WEIGHT, Layout, QuantizedWeight, raw_bytes, unfitting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kbit.models.checkpoint import StoredTensor

_STATE: Final = "quant_state.bitsandbytes__"
_TYPES: Final = ("nf4", "fp4")
_MAPS: Final = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_INVERSE_127: Final = 7.874015718698502e-3
"""1 / 127 as the library multiplies with it, in float32."""


class BitsAndBytes(Layout):
    """4-bit and 8-bit weights."""

    quant_method: ClassVar[str] = "bitsandbytes"

    def bits(self, settings: Mapping[str, Any]) -> frozenset[int]:
        if settings.get("load_in_8bit"):
            return frozenset({8})
        kind = settings.get("bnb_4bit_quant_type")
        if not settings.get("load_in_4bit") or kind not in _TYPES:
            raise CheckpointError(
                f"{KEY} says neither load_in_8bit nor load_in_4bit with bnb_4bit_quant_type (nf4 or fp4; it is "
                f"{kind!r})"
            )
        return frozenset({4})

    def weights(self, settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Iterator[QuantizedWeight]:  # noqa: ARG002  # the protocol's
        for name in tensors:
            if f"{name}.absmax" in tensors:
                yield self._four(name, tensors)
            elif name.endswith(".SCB"):
                yield self._eight(name.removesuffix(".SCB"), tensors)

    def _four(self, name: str, tensors: Mapping[str, StoredTensor]) -> QuantizedWeight:
        parts = {"weight": tensors[name]} | {r: tensors[t] for r in _MAPS if (t := f"{name}.{r}") in tensors}
        states = [f"{_STATE}{kind}" for kind in _TYPES if f"{name}.{_STATE}{kind}" in tensors]
        if not states or "quant_map" not in parts:
            raise unfitting(name, parts)
        parts["quant_state"] = tensors[f"{name}.{states[0]}"]
        state = json.loads(raw_bytes(parts["quant_state"]))
        shape, weight = tuple(state["shape"]), parts["weight"]
        blocks = -(-prod(shape) // state["blocksize"])
        nested = "nested_blocksize" in state
        fits = weight.stop - weight.start == -(-prod(shape) // 2) and prod(parts["absmax"].shape) == blocks
        if len(shape) != 2 or not fits or nested != ("nested_absmax" in parts):
            raise unfitting(name, parts)
        settings = {key: state.get(key) for key in ("blocksize", "nested_blocksize", "nested_offset")}
        return QuantizedWeight(name=name, shape=(shape[0], shape[1]), parts=parts, settings=settings, layout=self)

    def _eight(self, layer: str, tensors: Mapping[str, StoredTensor]) -> QuantizedWeight:
        roles = {"weight": WEIGHT, "SCB": ".SCB", "weight_format": ".weight_format"}
        parts = {role: tensors[t] for role, end in roles.items() if (t := layer + end) in tensors}
        weight = parts.get("weight")
        if weight is None or weight.dtype != "I8" or (prod(parts["SCB"].shape),) != weight.shape[:1]:
            raise unfitting(layer, parts)
        if "weight_format" in parts and any(raw_bytes(parts["weight_format"])):
            raise CheckpointError(
                f"{layer}.weight is in an order of a GPU's kernel (weight_format): rows are read here"
            )
        return QuantizedWeight(
            name=layer + WEIGHT, shape=(weight.shape[0], weight.shape[1]), parts=parts, settings={}, layout=self
        )

    def read(self, weight: QuantizedWeight, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        if "SCB" in parts:
            wide = parts["weight"].float() * parts["SCB"].float().view(-1, 1)
            return (wide * _INVERSE_127).to(dtype)
        return _four_bits(weight, parts, dtype)


def _four_bits(weight: QuantizedWeight, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    import torch

    from kbit.models.prequantized.words import AT_ONCE

    absmax, size = parts["absmax"].flatten(), int(weight.settings["blocksize"])
    if "nested_absmax" in parts:
        outer = parts["nested_absmax"].repeat_interleave(int(weight.settings["nested_blocksize"]))
        absmax = parts["nested_quant_map"][absmax.int()] * outer[: absmax.numel()] + weight.settings["nested_offset"]
    packed = parts["weight"].contiguous().view(torch.uint8).flatten()
    values = torch.empty(prod(weight.shape), dtype=dtype, device=packed.device)
    step = max(1, AT_ONCE // size) * size  # whole blocks, of an even number of values
    for first in range(0, values.numel(), step):
        own = packed[first // 2 : (first + step) // 2]
        codes = torch.stack((own >> 4, own & 0xF), dim=-1).flatten()
        wide = parts["quant_map"][codes.int()]
        scale = absmax[first // size : (first + step) // size].repeat_interleave(size)[: wide.numel()]
        piece = values[first : first + step]
        piece.copy_((wide * scale)[: piece.numel()])
    return values.view(weight.shape)


LAYOUT: Final = BitsAndBytes()
