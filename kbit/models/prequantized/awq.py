"""AWQ checkpoints, as AutoAWQ writes them (version gemm).

A layer [out, in] is qweight int32 [in, out/8], codes of 4 bits along out_features; qzeros int32 [groups, out/8], zero
points alike; scales float16 [groups, out]. Within a word, from the lowest bits on, lie the columns 0, 2, 4, 6, 1, 3, 5,
7 of its eight. A weight is (code - zero) · scale of its group of input dimensions.

Source: AutoAWQ 0.2, awq/modules/linear/gemm.py and awq/utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from kbit.errors import CheckpointError
from kbit.models.prequantized.layouts import (
    KEY,
    WEIGHT,
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

_BITS: Final = 4
_PER_WORD: Final = 8
_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place in its word of each of eight columns."""


class Awq(Layout):
    """qweight, qzeros, scales, interleaved."""

    quant_method: ClassVar[str] = "awq"

    def bits(self, settings: Mapping[str, Any]) -> frozenset[int]:
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm":
            raise CheckpointError(
                f"{KEY}.version={version!r} is an order of its own, which the package autoawq reads; gemm is read here"
            )
        key = "w_bit" if "w_bit" in settings else "bits"
        return frozenset({number(settings, key, (_BITS,))})

    def weights(self, settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Iterator[QuantizedWeight]:
        declared = settings.get("q_group_size" if "q_group_size" in settings else "group_size")
        for layer, parts in layers_with("qweight", tensors, ("qweight", "qzeros", "scales")):
            if len(parts) < 3:
                raise unfitting(layer, parts)
            inputs, words = parts["qweight"].shape
            groups, out = parts["scales"].shape
            size = size_of_groups(declared, inputs, groups)
            if out != words * _PER_WORD or parts["qzeros"].shape != (groups, words) or size is None:
                raise unfitting(layer, parts)
            own = {"size": size}
            yield QuantizedWeight(name=layer + WEIGHT, shape=(out, inputs), parts=parts, settings=own, layout=self)

    def read(self, weight: QuantizedWeight, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        from kbit.models.prequantized.words import affine, groups_of, unpack_words

        out, inputs = weight.shape

        def in_order(words: Tensor) -> Tensor:
            codes = unpack_words(words, _BITS, out).reshape(len(words), -1, _PER_WORD)
            return codes[..., _PLACES].reshape(len(words), out).t()

        scale = parts["scales"].t()
        group = groups_of(inputs, weight.settings["size"], scale.device)
        return affine(in_order(parts["qweight"]), scale, in_order(parts["qzeros"]), group, dtype)


LAYOUT: Final = Awq()
