"""A weight in row-major order, dequantized some rows at a time: to the bit what ``kbit.dequantize`` gives.

Nothing is read back from a GPU, so that a CUDA graph can hold it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from math import lcm

import torch
from torch import Tensor

from kbit.kernels.availability import choose_blockwise
from kbit.quantizer.blocks import Blocks, Piece
from kbit.quantizer.packed import Packed
from kbit.quantizer.storage import chunk_length


def dequantized_rows(w: Packed, k: int, storage: torch.dtype) -> Iterator[Tensor]:
    """Yield the rows of W [n, k] in order: `storage` [some of n, k], one run of rows after another.

    Kept columns have the mean alone, which the caller makes up for.
    """
    n = w.blocks.rows * w.blocks.length // k
    step, whole_blocks = _rows_at_a_time(w.blocks, k, chunk_length(w.codes.device))
    triton = whole_blocks and w.zero is None and _runs_triton(w.codes.device)
    limit = torch.finfo(storage).max
    for first in range(0, n, step):
        piece = Piece(blocks=w.blocks, start=first * k, stop=min(first + step, n) * k)
        if triton:
            yield _from_triton(w, piece, storage).view(-1, k)
        else:
            yield w.values(piece).clamp_(-limit, limit).to(storage).view(-1, k)


def _rows_at_a_time(blocks: Blocks, k: int, length: int) -> tuple[int, bool]:
    """Return (rows of about `length` values, whether each such run begins with a block). All begin at a whole byte."""
    single = blocks.size >= blocks.length or blocks.rows > 1
    unit = 8 if single else lcm(8, lcm(blocks.size, k) // k)
    if unit * k > max(length, 8 * k):
        return max(1, length // (8 * k)) * 8, False
    return max(1, length // (unit * k)) * unit, True


@cache
def _runs_triton(device: torch.device) -> bool:
    return choose_blockwise("auto", device) == "triton"


def _from_triton(w: Packed, piece: Piece, storage: torch.dtype) -> Tensor:
    """Return the values of a piece that begins with a block, flat."""
    from kbit.kernels.blockwise import dequantize_values  # triton may be absent

    whole, count = w.blocks, piece.stop - piece.start
    if whole.rows > 1:
        blocks = Blocks(rows=count // whole.length, length=whole.length, size=whole.size)
        absmax = w.absmax.view(whole.rows, -1)[piece.start // whole.length : piece.stop // whole.length].view(-1)
    else:
        blocks = Blocks(rows=1, length=count, size=min(whole.size, count))
        absmax = w.absmax[piece.start // whole.size : -(-piece.stop // whole.size)]
    out = torch.empty(count, dtype=storage, device=w.codes.device)
    dequantize_values(replace(w, codes=w.codes_of(piece), absmax=absmax, blocks=blocks), out, dtype=storage)
    return out
