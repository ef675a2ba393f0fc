"""Proxy quantization (section 3): outlier dimensions by the spread of the previous layer's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kbit.errors import ArchitectureError, OrderError
from kbit.models.architectures import Layer, block_layers, has_parallel_residual, text_config
from kbit.models.roles import (
    ATTENTION_OUT,
    FFN_1,
    FFN_2,
    FFN_FUSED,
    FFN_GATE,
    KEY,
    QKV,
    QUERY,
    VALUE,
    block_roles,
    up_rows,
)
from kbit.quantizer.storage import chunk_length, storage_dtype_of


def outlier_columns(
    model: nn.Module,
    fraction: float,
    *,
    storage_dtype: torch.dtype | None = None,
    layers: Sequence[Layer] | None = None,
) -> dict[str, Tensor | None]:
    """Return the input dimensions of each layer that stay in 16 bits, from its predecessor's original weights.

    Predecessors: value rows of QKV -> attention output -> FFN 1 -> FFN 2 -> the next block's QKV. With grouped queries
    each value row counts for every query head that reads it; in a gated FFN the up projection is FFN 1, and the gate
    gets the same columns. With parallel residual branches FFN 1 follows the previous block's FFN 2, as QKV does. In a
    mixture of experts each expert's FFN 1 follows the attention output, and its FFN 2 its own FFN 1; all FFN 2 of a
    block, side by side as one matrix, are what the next block follows.

    Args:
        model: a causal language model of known layer names (GPT-NeoX, OPT, GPT-2, BLOOM, Llama and those named like
            them).
        fraction: of the input dimensions, above 0 and below 1.
        storage_dtype: 16-bit dtype the weights are cast to first; None is each weight's own, or float16.
        layers: the model's, with their original weights; None finds them.

    Returns:
        By layer name, in the order of ``block_layers``: int32 [max(1, round(fraction · in))] ascending (a half rounds
        to even), on the weight's device; None for a layer without a predecessor, in the first block.

    Raises:
        ArchitectureError: layers whose roles or shapes aren't known: outlier_fraction must then be 0.
    """
    layers = block_layers(model) if layers is None else layers
    columns: dict[str, Tensor | None] = {}
    leaving: Tensor | None = None
    for number in sorted({layer.block for layer in layers}):
        of_block = [layer for layer in layers if layer.block == number]
        spreads, leaving = block_spreads(model, of_block, leaving, storage_dtype=storage_dtype)
        columns |= largest_columns(spreads, of_block, fraction)
    return {layer.name: columns[layer.name] for layer in layers}


def block_spreads(
    model: nn.Module, layers: Sequence[Layer], entering: Tensor | None, *, storage_dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor | None], Tensor]:
    """Return the spread of what precedes each layer of one block, and that of the block's own FFN 2.

    Args:
        model: whose configuration says how layers follow one another; its weights are not read.
        layers: the block's, with their original weights.
        entering: float64 [hidden], the spread of the previous block's FFN 2; None for the first block.
        storage_dtype: as of ``outlier_columns``.

    Returns:
        By layer name, float64 [in_features] or None without a predecessor; and float64 [hidden].

    Raises:
        ArchitectureError: as ``outlier_columns``.
    """
    try:
        block = block_roles(layers)
    except ArchitectureError as error:
        raise OrderError(model, str(error)) from error
    attention = _spread(block.attention[ATTENTION_OUT].weight, storage_dtype)
    before = {
        **dict.fromkeys((QKV, QUERY, KEY, VALUE), entering),
        ATTENTION_OUT: _value_spread(model, block.attention, storage_dtype),
        **dict.fromkeys((FFN_1, FFN_GATE, FFN_FUSED), entering if has_parallel_residual(model) else attention),
    }
    spreads = {
        layer.name: _up_spread(roles, storage_dtype) if role == FFN_2 else before[role]
        for role, layer, roles in block.layers()
    }
    return spreads, _spread_beside([roles[FFN_2].weight for roles in block.feed_forwards], storage_dtype)


def largest_columns(
    spreads: Mapping[str, Tensor | None], layers: Sequence[Layer], fraction: float
) -> dict[str, Tensor | None]:
    """Return the columns of ``outlier_columns`` for the layers of one block, of ``block_spreads``."""
    return {layer.name: _largest(spreads[layer.name], layer, fraction) for layer in layers}


def _spread(weight: Tensor, storage_dtype: torch.dtype | None) -> Tensor:
    """Population standard deviation of each output row of [out, in], of the stored values: float64 [out]."""
    return _spread_beside([weight], storage_dtype)


def _spread_beside(weights: Sequence[Tensor], storage_dtype: torch.dtype | None) -> Tensor:
    """Spread of the rows of matrices [out, in] that stand side by side, as one [out, sum of in]: float64 [out]."""
    first = weights[0]
    dtype = storage_dtype_of(first, storage_dtype)
    rows = max(1, chunk_length(first.device) // sum(w.shape[1] for w in weights))
    parts = []
    for i in range(0, first.shape[0], rows):
        beside = [w[i : i + rows].to(dtype).double() for w in weights]
        # One matrix keeps its memory's order: sums in another order could change the last bit.
        values = beside[0] if len(beside) == 1 else torch.cat(beside, dim=1)
        parts.append(values.std(dim=1, correction=0))
    return torch.cat(parts)


def _up_spread(roles: dict[str, Layer], storage_dtype: torch.dtype | None) -> Tensor:
    """Spread of the rows of a feed-forward's FFN 1: float64 [FFN]."""
    if FFN_FUSED in roles:
        return up_rows(roles[FFN_FUSED], _spread(roles[FFN_FUSED].weight, storage_dtype))
    return _spread(roles[FFN_1].weight, storage_dtype)


def _value_spread(model: nn.Module, roles: dict[str, Layer], storage_dtype: torch.dtype | None) -> Tensor:
    """Spread of the value rows, as the attention output reads them: float64 [heads · head dimension]."""
    read = roles[ATTENTION_OUT].weight.shape[1]
    heads = _heads(model, read)
    if VALUE in roles:
        spread = _spread(roles[VALUE].weight, storage_dtype)
        head_dim = read // heads
        if spread.numel() % head_dim or read % spread.numel():
            raise OrderError(
                model, f"{roles[VALUE].name} has {spread.numel()} rows, which {heads} heads of {head_dim} can't share"
            )
        return spread.view(-1, 1, head_dim).expand(-1, read // spread.numel(), head_dim).reshape(-1)
    layer = roles[QKV]
    spread = _spread(layer.weight, storage_dtype)
    gpt2 = layer.name.endswith(".c_attn")
    # GPTBigCode's c_attn is an nn.Linear and lies in another order than GPT-2's Conv1D.
    if spread.numel() != 3 * read or gpt2 != isinstance(layer.module, Conv1D):
        raise OrderError(
            model,
            f"{layer.name} ({type(layer.module).__name__}, {spread.numel()} rows) isn't Q, K and V of {read} rows each",
        )
    if gpt2:
        return spread[2 * read :]
    return spread.view(heads, 3, -1)[:, 2].reshape(-1)


def _heads(model: nn.Module, read: int) -> int:
    config = text_config(model)
    for key in ("num_attention_heads", "n_head", "num_heads"):
        heads = getattr(config, key, None)
        if isinstance(heads, int) and heads > 0 and read % heads == 0:
            return heads
    raise OrderError(model, f"its configuration names no number of attention heads that divides {read}")


def _largest(spread: Tensor | None, layer: Layer, fraction: float) -> Tensor | None:
    """Indices of the largest values, ties to the lower index: int32 [m], ascending."""
    if spread is None:
        return None
    inputs = layer.weight.shape[1]
    if spread.numel() != inputs:
        raise ArchitectureError(
            f"outlier_fraction: {layer.name} has {inputs} inputs, and its predecessor {spread.numel()} outputs. "
            "Use outlier_fraction=0 with this model"
        )
    count = max(1, round(fraction * inputs))
    chosen = spread.sort(descending=True, stable=True).indices[:count].sort().values
    # A model may be spread over GPUs, and the predecessor lie on another.
    return chosen.to(layer.weight.device, torch.int32)
