"""Kept activations: what enters a transformer block for each batch of calibration windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockArguments:
    """Inputs of one block besides the hidden states: masks, positions, rotary embeddings.

    Attributes:
        rest: positional arguments after the hidden states.
        named: keyword arguments.
    """

    rest: tuple[Any, ...]
    named: Mapping[str, Any]

    def like(self, other: BlockArguments | None) -> BlockArguments:
        """Return the same with the other's tensors where they are equal, so that batches keep one mask between them."""
        if other is None:
            return self
        named = {name: _like(value, other.named.get(name)) for name, value in self.named.items()}
        return BlockArguments(rest=_like(self.rest, other.rest), named=named)


@dataclass(frozen=True, kw_only=True, eq=False)
class Activations:
    """Hidden states before a block.

    Attributes:
        hidden: [windows, length, hidden] of each batch; of a model on a GPU they lie on the host in between.
        arguments: of each block and batch. Models give each block its own, such as masks of sliding windows.
    """

    hidden: Sequence[Tensor]
    arguments: Sequence[Sequence[BlockArguments]]


def _like(value: Any, other: Any) -> Any:
    if isinstance(value, tuple) and isinstance(other, tuple) and len(value) == len(other):
        return tuple(_like(own, theirs) for own, theirs in zip(value, other, strict=True))
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return value
    same = (value.shape, value.dtype, value.device) == (other.shape, other.dtype, other.device)
    return other if same and torch.equal(value, other) else value
