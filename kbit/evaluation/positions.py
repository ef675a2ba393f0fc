"""How models are told where tokens stand, and what they see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch.nn import functional

from kbit.evaluation.forests import empty_mask

Arguments = dict[str, torch.Tensor]
Place = Callable[[Any, torch.Tensor, torch.Tensor], AbstractContextManager[Arguments]]


def is_masked_anyway(base: Any) -> bool:
    """Tell whether a model's attention takes a tensor of biases also without a mask, so that one costs nothing more."""
    return _type_of(base) in PLACES


def placed(base: Any, positions: torch.Tensor, mask: torch.Tensor) -> AbstractContextManager[Arguments]:
    """Return the arguments of a forward pass whose tokens have positions and a mask of their own.

    Args:
        base: a transformers model without its head.
        positions: int64 [batch, length].
        mask: [batch, 1, length, length], added to attention's scores.
    """
    place: Place = PLACES.get(_type_of(base), _by_position_ids)
    return place(base, positions, mask)


def _type_of(base: Any) -> str:
    return str(getattr(base.config, "model_type", ""))


@contextmanager
def _by_position_ids(_: Any, positions: torch.Tensor, mask: torch.Tensor) -> Iterator[Arguments]:
    yield {"attention_mask": mask, "position_ids": positions}


@contextmanager
def _by_alibi(base: Any, positions: torch.Tensor, mask: torch.Tensor) -> Iterator[Arguments]:
    """BLOOM has no position ids: a method of the model makes attention's biases, one for each key.

    Biases and mask become one tensor, [batch, heads, length, length], once for all layers, and attention and GELU one
    fused operation each: the model's own write and read their operands several times.
    """

    def build(mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
        ones = torch.ones(1, 2, dtype=torch.int64, device=mask.device)
        slopes: torch.Tensor = plain(ones, num_heads, torch.float32)[:, 0, 1]  # a head's bias at position 1
        # As the model does, in its dtype: the product first, then the mask.
        bias = (slopes[None, :, None, None] * positions[:, None, None, :]).to(dtype)
        return torch.add(bias, mask, out=empty_mask((*bias.shape[:2], *mask.shape[2:]), dtype, mask.device))

    plain = base.build_alibi_tensor
    base.build_alibi_tensor = build
    parts = [part for block in base.h for part in (block.self_attention, block.mlp.gelu_impl)]
    for block in base.h:
        block.self_attention.forward = partial(_fused_bloom, block.self_attention)
        block.mlp.gelu_impl.forward = partial(functional.gelu, approximate="tanh")
    try:
        yield {"attention_mask": mask}
    finally:
        del base.build_alibi_tensor
        for part in parts:
            del part.forward


def _fused_bloom(
    attention: Any, hidden: torch.Tensor, residual: torch.Tensor, alibi: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, None]:
    """Compute a BLOOM attention layer on [batch, length, hidden], without a cache, in eval mode."""
    query, key, value = attention._reshape(attention.query_key_value(hidden))
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=alibi)
    return residual + attention.dense(mixed.transpose(1, 2).flatten(2)), None


PLACES: Final[Mapping[str, Place]] = {"bloom": _by_alibi}
"""By model type, where a model is told otherwise than by ``position_ids``."""
