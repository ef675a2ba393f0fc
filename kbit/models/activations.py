"""Kept activations: what enters a transformer block for each batch of calibration windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, kw_only=True, eq=False)
class Activations:
    """Hidden states before a block.

    Attributes:
        hidden: [windows, length, hidden] of each batch.
        arguments: of each block and batch. Models give each block its own, such as masks of sliding windows.
    """

    hidden: Sequence[Tensor]
    arguments: Sequence[Sequence[BlockArguments]]
