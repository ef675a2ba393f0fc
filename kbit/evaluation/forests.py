"""Sequences that begin alike, laid out as forests: each shared prefix goes through the model once.

A row of a batch holds trees of tokens in preorder. A token sees its ancestors and itself; its position is its depth.
So one forward pass gives every sequence what it would have alone, up to float noise, wherever a model takes the mask
and the positions that it is given (``kbit.evaluation.sharing`` makes sure).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

ROW: Final = 256
"""Tokens in a row: attention's cost grows with it, and what doesn't fill it is padding."""
LEAST_SHARED: Final = 8
LEAST_SHARE: Final = 0.15
"""Fewer tokens in common, or a smaller part of a sequence, tie no two sequences to one row: large trees that save
little leave more of the rows empty.
"""

MASK_STEP: Final = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Forest:
    """What each token of a batch follows.

    Attributes:
        positions: int64 [rows, length], the depth of each token in its tree; 0 for padding.
        ends: int32 [rows, length]: the tokens of a row that follow token k are those from k + 1 to below ends[k].
            Padding is followed by nothing, and sees itself.
    """

    positions: NDArray[np.int64]
    ends: NDArray[np.int32]

    def row(self, row: int) -> Forest:
        """Return one row as a batch."""
        return Forest(positions=self.positions[row : row + 1], ends=self.ends[row : row + 1])


def forest_mask(ends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the additive attention mask of a forest: [rows, 1, length, length], 0 where a query sees a key.

    Args:
        ends: int32 [rows, length], as in ``Forest``.
        dtype: of attention.
    """
    place = torch.arange(ends.shape[1], device=ends.device)
    seen = (place[None, None, :] <= place[None, :, None]) & (place[None, :, None] < ends[:, None, :])
    mask = empty_mask(seen.shape, dtype, ends.device)
    return mask.fill_(torch.finfo(dtype).min).masked_fill_(seen, 0)[:, None]


def empty_mask(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return an uninitialised mask for attention, whose rows begin at multiples of ``MASK_STEP`` values.

    A GPU's attention copies one that lies otherwise into one that does, in every layer.
    """
    *outer, length = shape
    return torch.empty(*outer, -(-length // MASK_STEP) * MASK_STEP, dtype=dtype, device=device)[..., :length]


@dataclass(kw_only=True)
class Tree:
    """Sequences merged by their beginnings, in preorder.

    Attributes:
        tokens, positions, ends: of each token: its id, its depth, and where the tokens that follow it end.
        paths: for each sequence, where its tokens lie.
        members: the number of each sequence.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)
    members: list[int] = field(default_factory=list)

    def add(self, member: int, ids: Sequence[int], shared: int) -> None:
        """Add a sequence whose first ``shared`` tokens are those of the one added before."""
        here = len(self.tokens)
        before = self.paths[-1] if self.paths else []
        for left in before[shared:]:
            self.ends[left] = here
        self.tokens.extend(ids[shared:])
        self.positions.extend(range(shared, len(ids)))
        self.ends.extend([0] * (len(ids) - shared))
        self.paths.append([*before[:shared], *range(here, len(self.tokens))])
        self.members.append(member)

    def close(self) -> Tree:
        """Say where the last sequence ends."""
        for left in self.paths[-1]:
            self.ends[left] = len(self.tokens)
        return self


def grow_trees(sequences: Sequence[list[int]], *, row: int = ROW) -> Iterator[Tree]:
    """Yield trees that hold each of the distinct sequences once.

    Two neighbours in the order of their tokens share a tree where they have at least ``LEAST_SHARED`` tokens and
    ``LEAST_SHARE`` of the second in common. A tree has at most ``row`` tokens, or twice those of its first sequence, so
    that long ones share too.
    """
    tree, limit = Tree(), 0
    before: list[int] = []
    for member in sorted(range(len(sequences)), key=lambda index: sequences[index]):
        ids = sequences[member]
        shared = common_prefix(before, ids)
        is_close = shared >= max(LEAST_SHARED, LEAST_SHARE * len(ids))
        if tree.members and not (is_close and len(tree.tokens) + len(ids) - shared <= limit):
            yield tree.close()
            tree = Tree()
        if not tree.members:
            shared, limit = 0, max(row, 2 * len(ids))
        tree.add(member, ids, shared)
        before = ids
    if tree.members:
        yield tree.close()


def common_prefix(a: list[int], b: list[int]) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    low = 0
    while length - low > 1:  # the first `low` are equal, the first `length` are not
        middle = (low + length) // 2
        low, length = (middle, length) if a[low:middle] == b[low:middle] else (low, middle)
    return low


def size_of(row: Sequence[Tree]) -> int:
    """Return the tokens of a row."""
    return sum(len(tree.tokens) for tree in row)


def fill_rows(trees: Sequence[Tree], *, row: int = ROW) -> list[list[Tree]]:
    """Return trees by row, the fullest rows first: each tree where it leaves the least room (best fit, decreasing).

    A tree of more than ``row`` tokens has a row of its own.
    """
    rows: list[list[Tree]] = []
    room: list[tuple[int, int]] = []  # (tokens left, number of the row), sorted
    for tree in sorted(trees, key=lambda t: -len(t.tokens)):
        size = len(tree.tokens)
        found = bisect_left(room, (size, 0))
        if found < len(room):
            left, number = room.pop(found)
            rows[number].append(tree)
        else:
            left, number = max(row, size), len(rows)
            rows.append([tree])
        insort(room, (left - size, number))
    return sorted(rows, key=lambda of_row: -size_of(of_row))
