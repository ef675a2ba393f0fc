"""llama.cpp's formats and recipes: each layer by itself, with a recipe also embedding and head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from kbit.errors import ArchitectureError
from kbit.ggml.formats import FORMATS
from kbit.ggml.quantize import ggml_dequantize, ggml_quantize
from kbit.ggml.recipes import RECIPES, About, Kind, fitting, format_for
from kbit.methods.protocol import ModelPass, Undo, naming
from kbit.models.architectures import Layer, decoder_blocks, text_config
from kbit.models.overwriting import rewrite
from kbit.models.roles import ATTENTION_OUT, FFN_2, KEY, QKV, VALUE, role_of
from kbit.quantizer.storage import storage_dtype_of
from kbit.specs.ggml import GgmlSpec

_KINDS: Final = {
    QKV: Kind.VALUE,
    VALUE: Kind.VALUE,
    KEY: Kind.KEY,
    ATTENTION_OUT: Kind.ATTENTION_OUT,
    FFN_2: Kind.FFN_DOWN,
}
_EXPERTS: Final = ("num_local_experts", "num_experts", "n_routed_experts")
BLOCKS_OF_70B: Final = 80


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredRows:
    """The bytes of one layer's rows.

    Attributes:
        format: their format; 'f16' are the 16-bit values themselves, for rows that fit no block.
        rows: uint8 [out_features, bytes of a row]; for 'f16' the values.
        storage_dtype: what dequantized values are rounded to.
    """

    format: str
    rows: Tensor
    storage_dtype: torch.dtype
    codebook: None = None  # codes are whole numbers
    shares_codebook: bool = True

    @property
    def nbits(self) -> int:
        return 8 * self.rows.nbytes

    def put(self, layer: Layer) -> Undo:
        return rewrite(layer, self._fill)

    def _fill(self, working: Tensor) -> None:
        if self.format == "f16":
            working.copy_(self.rows)
        else:
            ggml_dequantize(self.rows, self.format, out=working, dtype=self.storage_dtype)


def quantize_layers(
    model: ModelPass, spec: GgmlSpec, calibration: Tensor | None = None
) -> Iterator[tuple[Layer, StoredRows]]:
    """Yield the bytes of each layer of each block; with a recipe, of the embedding first and of the head last.

    Raises:
        ArchitectureError: a recipe that depends on what layers are, and a layer of a name that isn't known.
        LayeredError: a recipe, in a pass that has no embedding to quantize.
        WeightError: a weight with NaN or infinite values.
    """
    if spec.recipe is None:
        for block in model.blocks():
            for layer in block.layers:
                yield layer, _stored(layer, fitting(str(spec.ggml_type), layer.shape[1]), model)
        return
    recipe, about = RECIPES[spec.recipe], about_model(model.module)
    embedding, head = model.embedding, model.head
    if embedding is not None:
        kind = Kind.HEAD if head is None else Kind.EMBEDDING
        yield embedding, _stored(embedding, format_for(recipe, kind, 0, embedding.shape[1], about), model)
    for block in model.blocks():
        for layer in block.layers:
            kind = kind_of(layer, required=recipe.by_layer)
            yield layer, _stored(layer, format_for(recipe, kind, layer.block, layer.shape[1], about), model)
    if head is not None:
        yield head, _stored(head, format_for(recipe, Kind.HEAD, 0, head.shape[1], about), model)


def about_model(model: nn.Module) -> About:
    """Return what recipes ask about a model, by its configuration."""
    config: Any = text_config(model)
    blocks = len(decoder_blocks(model)[1])
    heads, kv_heads = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    experts = next((n for name in _EXPERTS if isinstance(n := getattr(config, name, None), int)), 0)
    return About(
        blocks=blocks,
        experts=experts,
        falcon=getattr(config, "model_type", "") == "falcon",
        many_queries=blocks == BLOCKS_OF_70B and kv_heads not in (None, heads),
    )


def kind_of(layer: Layer, *, required: bool) -> Kind:
    """Return what a layer of a block is to a recipe.

    Raises:
        ArchitectureError: required, and its name isn't known.
    """
    role = role_of(layer)
    if role is None and required:
        raise ArchitectureError(
            f"{layer.name} has a name whose role isn't known, and the recipe depends on it: ggml_type takes any layer, "
            "and recipe=Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q5_K_S or Q6_K any architecture"
        )
    return _KINDS.get(role or "", Kind.OTHER)


def _stored(layer: Layer, name: str, model: ModelPass) -> StoredRows:
    dtype = storage_dtype_of(layer.weight, model.storage_dtype)
    weight = layer.weight.to(dtype)
    if FORMATS[name].bits > 8:
        return StoredRows(format=name, rows=weight, storage_dtype=dtype)
    with naming(layer):
        return StoredRows(format=name, rows=ggml_quantize(weight, name), storage_dtype=dtype)
