"""Checkpoints of compressed-tensors: pack-quantized, int-quantized, naive-quantized and float-quantized.

pack-quantized: weight_packed int32 [out, ceil(in·k/32)], codes + 2^(k-1) of k bits from the lowest bit of a word on;
weight_scale by tensor, row or group; weight_zero_point int32 [ceil(out·k/32), groups], packed alike down the rows;
weight_shape; weight_g_idx, the group of each column, where columns were reordered. The others have weight itself, int8
or float8 (E4M3), with weight_scale, which may be by blocks [rows, columns], and weight_zero_point int8. A weight is
(code - zero) · scale. Activations stay in 16 bits here, also where config.json quantizes them.

Source: compressed-tensors 0.20, compressors/pack_quantized and naive_quantized, quantization/lifecycle/forward.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Final

from kbit.errors import CheckpointError
from kbit.models.prequantized.layouts import (
    KEY,
    WEIGHT,
    WORD,
    Layout,
    QuantizedWeight,
    layers_with,
    number,
    numbers_in,
    size_of_groups,
    unfitting,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kbit.models.checkpoint import StoredTensor

_FORMATS: Final = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "mixed-precision")
_BITS: Final = tuple(range(1, 9))
_ROLES: Final = (
    *("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),
)
_ANY: Final = "Linear"
"""What most groups target: every linear layer."""


class CompressedTensors(Layout):
    """Weights packed, or in int8 or float8, with scales."""

    quant_method: ClassVar[str] = "compressed-tensors"

    def bits(self, settings: Mapping[str, Any]) -> frozenset[int]:
        groups = _groups(settings)
        for key in ("sparsity_config", "transform_config"):
            own = settings.get(key) or {}
            if own.get("format", "dense") != "dense" or own.get("config_groups"):
                raise CheckpointError(f"{KEY}.{key} is set, which the package compressed-tensors applies alone")
        for form in [settings.get("format"), *(group.get("format") for group in groups)]:
            if form is not None and form not in _FORMATS:
                raise CheckpointError(
                    f"{KEY}.format={form!r} is not read here ({', '.join(_FORMATS)} are); the package "
                    "compressed-tensors reads it"
                )
        return frozenset(number(group["weights"], "num_bits", _BITS) for group in groups)

    def weights(self, settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Iterator[QuantizedWeight]:
        groups = _groups(settings)
        for layer, parts in layers_with("weight_scale", tensors, _ROLES):
            group = _group_of(layer, groups)
            own = {"bits": group["weights"]["num_bits"], "block": group["weights"].get("block_structure")}
            shape = _shape(layer, parts, own["bits"])
            own["size"] = own["block"][1] if own["block"] else _size(layer, parts, shape, group["weights"])
            yield QuantizedWeight(name=layer + WEIGHT, shape=shape, parts=parts, settings=own, layout=self)

    def read(self, weight: QuantizedWeight, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        from kbit.models.prequantized.words import affine, groups_of, unpack_words

        (out, inputs), bits = weight.shape, int(weight.settings["bits"])
        scale, zero = parts["weight_scale"], parts.get("weight_zero_point")
        if "weight_packed" in parts:
            codes = unpack_words(parts["weight_packed"], bits, inputs)
            # Of codes and packed zero points alike 2^(k-1) is taken away.
            if zero is not None and zero.dtype == parts["weight_packed"].dtype:
                zero = unpack_words(zero.t(), bits, out).t()
            else:
                zero = (scale.new_zeros(()) if zero is None else zero.float()) + (1 << (bits - 1))
        else:
            codes = parts["weight"]
        block = weight.settings["block"]
        scale = _by_row(scale, weight.shape, block)
        zero = None if zero is None else _by_row(zero, weight.shape, block).expand(scale.shape)
        if "weight_g_idx" in parts:
            group = parts["weight_g_idx"].long()
        else:
            group = groups_of(inputs, weight.settings["size"], scale.device)
        return affine(codes, scale, zero, group, dtype)


def _by_row(values: Tensor, shape: tuple[int, int], block: list[int] | None) -> Tensor:
    """Return scales or zero points by row and group, [out, groups], of those by tensor, row, group or block."""
    if block:
        return values.repeat_interleave(block[0], dim=0)[: shape[0]]
    if values.numel() == 1:
        return values.reshape(1, 1).expand(shape[0], 1)
    return values.reshape(shape[0], -1)


def _shape(layer: str, parts: Mapping[str, StoredTensor], bits: int) -> tuple[int, int]:
    """Return a layer's shape (out_features, in_features).

    Raises:
        CheckpointError: the tensors do not fit together, or are not compressed.
    """
    packed, plain, stored = parts.get("weight_packed"), parts.get("weight"), parts.get("weight_shape")
    if packed is not None and stored is not None:
        shape = numbers_in(stored)
        words = -(-shape[-1] * bits // WORD)
        if len(shape) == 2 and packed.dtype == "I32" and packed.shape == (shape[0], words):
            return shape[0], shape[1]
        raise unfitting(layer, parts)
    if plain is None or plain.dtype not in ("I8", "F8_E4M3") or len(plain.shape) != 2:
        raise unfitting(layer, parts)
    return plain.shape[0], plain.shape[1]


def _size(layer: str, parts: Mapping[str, StoredTensor], shape: tuple[int, int], declared: Mapping[str, Any]) -> int:
    """Return the columns that share a scale, where columns are in order.

    Raises:
        CheckpointError: there are not as many scales as group_size says, or more than one per row without it.
    """
    out, inputs = shape
    scales = prod(parts["weight_scale"].shape)
    by_row = 1 if scales == 1 else scales // out  # one may be of the whole tensor
    size = declared.get("group_size")
    found = size_of_groups(-1 if size is None else size, inputs, by_row)
    if "weight_g_idx" not in parts and (found is None or scales not in (1, by_row * out)):
        raise unfitting(layer, parts)
    return found or inputs


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the groups of layers whose weights are quantized."""
    groups = [g for g in (settings.get("config_groups") or {}).values() if isinstance(g, Mapping) and g.get("weights")]
    if not groups:
        raise CheckpointError(f"{KEY}.config_groups has no group with weights")
    return groups


def _group_of(layer: str, groups: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the group of a layer: by its name, by a pattern of names, or that of all linear layers, in this order."""
    if len(groups) == 1:
        return groups[0]
    targets = [(str(target), group) for group in groups for target in group.get("targets") or ()]
    named = [group for target, group in targets if target == layer]
    matched = [g for target, g in targets if target.startswith("re:") and re.match(target[3:], layer)]
    found = [*named, *matched, *(group for target, group in targets if target == _ANY)]
    if not found:
        raise CheckpointError(f"{KEY}.config_groups has no group for {layer}")
    return found[0]


LAYOUT: Final = CompressedTensors()
