"""LLM.int8(): int8 weights, and layers that quantize what they are given (Dettmers et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from kbit.methods.protocol import ModelPass, Undo, naming
from kbit.models.architectures import Layer
from kbit.packed.int8 import Int8Linear, sequences_of
from kbit.packed.replacing import put_in_place
from kbit.quantizer.int8 import Int8Rows, quantize_rows
from kbit.specs.llm_int8 import LlmInt8Spec


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredInt8:
    """int8 codes and row scales of one layer. There is no codebook: codes are whole numbers."""

    rows: Int8Rows
    threshold: float
    codebook: None = None
    shares_codebook: bool = True

    @property
    def nbits(self) -> int:
        return self.rows.nbits

    def pack(self, model: nn.Module, layer: Layer) -> Undo:
        return put_in_place(model, layer, lambda bias: self._module(model, layer, bias))

    def _module(self, model: nn.Module, layer: Layer, bias: Tensor | None) -> Int8Linear:
        return Int8Linear(
            self.rows,
            bias=None if bias is None else bias.detach(),
            dtype=layer.parameter.dtype,
            threshold=self.threshold,
            sequences=sequences_of(model),
        )


def quantize_layers(
    model: ModelPass, spec: LlmInt8Spec, calibration: Tensor | None = None
) -> Iterator[tuple[Layer, StoredInt8]]:
    """Yield int8 codes and row scales of each layer of each block.

    Raises:
        WeightError: a weight with NaN or infinite values.
    """
    for block in model.blocks():
        for layer in block.layers:
            with naming(layer):
                rows = quantize_rows(layer.weight, storage_dtype=model.storage_dtype)
            yield layer, StoredInt8(rows=rows, threshold=spec.threshold)
