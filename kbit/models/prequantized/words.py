"""Codes in 32-bit words, and codes with a scale and a zero point by column as weights."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kbit.models.prequantized.layouts import WORD

AT_ONCE: Final = 1 << 22
"""Values that are computed at once: their float32 forms take a few of 16 MB."""


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the codes in words: code i is bits i·k to (i+1)·k - 1 of the last dimension, from the lowest bit on.

    Args:
        words: int32 [..., words].
        bits: k, 1 to 8.
        count: codes of each row.

    Returns:
        uint8 [..., count].
    """
    lacking = -words.shape[-1] % bits
    if lacking:  # whole groups of 32 codes
        words = torch.nn.functional.pad(words, (0, lacking))
    groups = words.reshape(*words.shape[:-1], -1, bits)
    codes = torch.empty((*groups.shape[:-1], WORD), dtype=torch.uint8, device=words.device)
    for number in range(WORD):
        word, shift = divmod(number * bits, WORD)
        held = WORD - shift
        value = (groups[..., word] >> shift) & ((1 << min(bits, held)) - 1)
        if held < bits:  # the rest lies in the next word
            value |= groups[..., word + 1] << held
        codes[..., number] = value & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count]


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Return codes, uint8 [..., codes], in words: the inverse of ``unpack_words``, int32 [..., ceil(codes·k / 32)]."""
    count = codes.shape[-1]
    padded = torch.nn.functional.pad(codes, (0, -count % WORD)).reshape(*codes.shape[:-1], -1, WORD)
    # 64 bits, of which a word's 32 are taken: shifts of int32 would run into its sign.
    words = torch.zeros((*padded.shape[:-1], bits), dtype=torch.int64, device=codes.device)
    for number in range(WORD):
        word, shift = divmod(number * bits, WORD)
        value = padded[..., number].long() << shift
        words[..., word] |= value & 0xFFFFFFFF
        if shift + bits > WORD:
            words[..., word + 1] |= value >> WORD
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return signed.flatten(-2)[..., : -(-count * bits // WORD)].contiguous()


def affine(codes: Tensor, scale: Tensor, zero: Tensor | None, group: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (code - zero) · scale, each with its column's group: float32, rounded once.

    Args:
        codes: any dtype [rows, columns].
        scale: [rows, groups].
        zero: [rows, groups], or None.
        group: int64 [columns].
        dtype: of the result.
    """
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    step = max(1, AT_ONCE // max(1, codes.shape[1]))
    for first in range(0, codes.shape[0], step):
        rows = slice(first, first + step)
        wide = codes[rows].float()
        if zero is not None:
            wide -= zero[rows].float().index_select(1, group)
        wide *= scale[rows].float().index_select(1, group)
        values[rows] = wide
    return values


def groups_of(columns: int, size: int, device: torch.device) -> Tensor:
    """Return the group of each column where each `size` columns are one: int64 [columns]."""
    return torch.arange(columns, device=device) // size
