"""HQQ checkpoints, as transformers and the package hqq write them in safetensors.

A layer has W_q, its codes, cut into groups (axis 1: [groups, group_size]; axis 0: [group_size, groups]) and packed
along the first dimension, whose parts lie in one byte from the high bits on: 8bit_u8, 4bit_u8, 2bit_u8, 1bit_u8; and
3bit_32, ten in an int32. Beside it scale and zero by group, and each setting as a small tensor: shape, nbits, packing,
axis, compute_dtype. A weight is (code - zero) · scale, both steps rounded to compute_dtype, as the package computes.

Source: hqq 0.2, hqq/core/bitpack.py and hqq/core/quantize.py (Quantizer.dequantize, HQQLinear.state_dict).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Final

from kbit.errors import CheckpointError
from kbit.models.prequantized.layouts import (
    KEY,
    WEIGHT,
    Layout,
    QuantizedWeight,
    layers_with,
    number,
    numbers_in,
    raw_bytes,
    unfitting,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kbit.models.checkpoint import StoredTensor

_BITS: Final = (1, 2, 3, 4, 8)
_PACKINGS: Final = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "2bit_u8": (2, 4), "1bit_u8": (1, 8), "3bit_32": (3, 10)}
"""Bits, and codes in a byte or word."""
_SETTINGS: Final = (
    *("nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale"),
    *("quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise"),
    *("optimize", "round_zero"),
)
_DTYPES: Final = ("float16", "bfloat16", "float32")


class Hqq(Layout):
    """W_q, scale, zero, and settings."""

    quant_method: ClassVar[str] = "hqq"

    def bits(self, settings: Mapping[str, Any]) -> frozenset[int]:
        config = settings.get("quant_config", settings)
        own = config.get("weight_quant_params") if isinstance(config, Mapping) else None
        if own is not None:
            return frozenset({number(own, "nbits", _BITS)})
        layers = [c["weight_quant_params"] for c in _dicts(config) if isinstance(c.get("weight_quant_params"), Mapping)]
        if not layers:
            raise CheckpointError(f"{KEY}.quant_config has no weight_quant_params")
        return frozenset(number(layer, "nbits", _BITS) for layer in layers)  # bits by layer

    def weights(self, settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Iterator[QuantizedWeight]:  # noqa: ARG002  # the protocol's
        for layer, parts in layers_with("W_q", tensors, ("W_q", "scale", "zero", *_SETTINGS)):
            if not {"scale", "zero", "shape", "packing"} <= parts.keys():
                raise unfitting(layer, parts)
            if any(any(raw_bytes(parts[key])) for key in ("quant_scale", "quant_zero") if key in parts):
                raise CheckpointError(f"the scales of {layer} are quantized too, which the package hqq reads alone")
            shape = numbers_in(parts["shape"])
            packing = raw_bytes(parts["packing"]).decode()
            dtype = raw_bytes(parts["compute_dtype"]).decode() if "compute_dtype" in parts else "float16"
            dtype = dtype.removeprefix("torch.")
            if packing not in _PACKINGS or len(shape) != 2 or dtype not in _DTYPES:
                raise CheckpointError(f"{layer}: packing={packing!r}, shape={list(shape)}, compute_dtype={dtype!r}")
            bits, per = _PACKINGS[packing]
            codes = parts["W_q"]
            columns = (codes.stop - codes.start) // (4 if bits == 3 else 1) // max(1, codes.shape[0])
            if not 0 <= codes.shape[0] * per * columns - prod(shape) < per * columns:
                raise unfitting(layer, parts)
            yield QuantizedWeight(
                name=layer + WEIGHT,
                shape=(shape[0], shape[1]),
                parts=parts,
                settings={"packing": packing, "dtype": dtype},
                layout=self,
            )

    def read(self, weight: QuantizedWeight, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        import torch

        bits, per = _PACKINGS[weight.settings["packing"]]
        packed = parts["W_q"]
        if packed.is_floating_point():  # bytes, or words, under a float's name (view_as_float)
            packed = packed.view(torch.int32 if bits == 3 else torch.uint8)
        columns = packed.shape[1]
        shifts = [bits * (per - 1 - number) for number in range(per)]
        codes = torch.cat([(packed >> shift) & ((1 << bits) - 1) for shift in shifts])
        compute = getattr(torch, weight.settings["dtype"])
        values = codes[: prod(weight.shape) // columns].to(compute)
        return ((values - parts["zero"].to(compute)) * parts["scale"].to(compute)).reshape(weight.shape).to(dtype)


def _dicts(config: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(config, Mapping):
        yield from (value for value in config.values() if isinstance(value, Mapping))


LAYOUT: Final = Hqq()
