"""How models are told where tokens stand, and what they see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import torch

Arguments = dict[str, torch.Tensor]
Place = Callable[[Any, torch.Tensor, torch.Tensor], AbstractContextManager[Arguments]]


def placed(base: Any, positions: torch.Tensor, mask: torch.Tensor) -> AbstractContextManager[Arguments]:
    """Return the arguments of a forward pass whose tokens have positions and a mask of their own.

    Args:
        base: a transformers model without its head.
        positions: int64 [batch, length].
        mask: [batch, 1, length, length], added to attention's scores.
    """
    place: Place = PLACES.get(str(getattr(base.config, "model_type", "")), _by_position_ids)
    return place(base, positions, mask)


@contextmanager
def _by_position_ids(_: Any, positions: torch.Tensor, mask: torch.Tensor) -> Iterator[Arguments]:
    yield {"attention_mask": mask, "position_ids": positions}


@contextmanager
def _by_alibi(base: Any, positions: torch.Tensor, mask: torch.Tensor) -> Iterator[Arguments]:
    """BLOOM has no position ids: a method of the model makes its biases from a mask of one number a token."""

    def build(mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
        ones = torch.ones(1, 2, dtype=torch.int64, device=mask.device)
        slopes: torch.Tensor = plain(ones, num_heads, torch.float32)[:, 0, 1]  # a head's bias at position 1
        return (slopes[None, :, None] * positions[:, None, :]).reshape(-1, 1, positions.shape[1]).to(dtype)

    plain = base.build_alibi_tensor
    base.build_alibi_tensor = build
    try:
        yield {"attention_mask": mask}
    finally:
        del base.build_alibi_tensor


PLACES: Final[Mapping[str, Place]] = {"bloom": _by_alibi}
"""By model type, where a model is told otherwise than by ``position_ids``."""
