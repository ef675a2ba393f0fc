"""GPTQ checkpoints, as AutoGPTQ, GPTQModel and transformers write them (checkpoint_format gptq and gptq_v2).

A layer [out, in] is qweight int32 [in·k/32, out], codes of k bits along in_features from the lowest bit of a word on;
qzeros int32 [groups, out·k/32], zero points alike along out_features; scales float16 [groups, out]; g_idx int32 [in],
the group of each column (left out by some tools where the columns are in order, group_size to a group). Codes run on
from word to word, also at 3 bits. A weight is (code - zero) · scale of its column's group. Version 1 stores zero - 1,
modulo 2^k.

Source: AutoGPTQ 0.7, nn_modules/qlinear/qlinear_cuda.py; GPTQModel's documentation of the two formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    size_of_groups,
    unfitting,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kbit.models.checkpoint import StoredTensor

_FORMATS: Final = ("gptq", "gptq_v2")
_ROLES: Final = ("qweight", "qzeros", "scales", "g_idx")
_BITS: Final = (2, 3, 4, 8)


class Gptq(Layout):
    """qweight, qzeros, scales, g_idx."""

    quant_method: ClassVar[str] = "gptq"

    def bits(self, settings: Mapping[str, Any]) -> frozenset[int]:
        found = settings.get("checkpoint_format", "gptq")
        if found not in _FORMATS or settings.get("is_marlin_format"):
            allowed = " and ".join(_FORMATS)
            raise CheckpointError(
                f"{KEY}.checkpoint_format={found!r} is a kernel's own order, which the package gptqmodel reads; "
                f"{allowed} are read here"
            )
        return frozenset({number(settings, "bits", _BITS)})

    def weights(self, settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Iterator[QuantizedWeight]:
        own = {"v2": settings.get("checkpoint_format") == "gptq_v2"}
        for layer, parts in layers_with("qweight", tensors, _ROLES):
            if not {"qzeros", "scales"} <= parts.keys():
                raise unfitting(layer, parts)
            packed, out = parts["qweight"].shape
            inputs = parts["g_idx"].shape[0] if "g_idx" in parts else packed * WORD // int(settings["bits"])
            bits = packed * WORD // inputs  # of this layer: tools may vary them
            groups = parts["scales"].shape[0]
            fits = packed * WORD == bits * inputs and parts["qzeros"].shape == (groups, out * bits // WORD)
            size = None if "g_idx" in parts else size_of_groups(settings.get("group_size"), inputs, groups)
            in_groups = "g_idx" in parts or size is not None
            if bits not in _BITS or not fits or parts["scales"].shape[1] != out or not in_groups:
                raise unfitting(layer, parts)
            of_layer = {"bits": bits, "size": size, **own}
            yield QuantizedWeight(name=layer + WEIGHT, shape=(out, inputs), parts=parts, settings=of_layer, layout=self)

    def read(self, weight: QuantizedWeight, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        from kbit.models.prequantized.words import affine, groups_of, unpack_words

        bits, (out, inputs) = weight.settings["bits"], weight.shape
        codes = unpack_words(parts["qweight"].t(), bits, inputs)
        zero = unpack_words(parts["qzeros"], bits, out)
        if not weight.settings["v2"]:
            zero = (zero + 1) & ((1 << bits) - 1)
        scale = parts["scales"]
        size = weight.settings["size"]
        group = parts["g_idx"].long() if size is None else groups_of(inputs, size, scale.device)
        return affine(codes, scale.t(), zero.t(), group, dtype)


LAYOUT: Final = Gptq()
