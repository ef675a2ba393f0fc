"""k-bit codes in exactly k bits: one little-endian bit stream, so that 8 codes fill k bytes."""

from __future__ import annotations

import torch
from torch import Tensor

_GROUP = 8


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [n], each below 2^bits, into uint8 [ceil(n bits / 8)].

    Bit j of code i is bit i·bits + j of the stream; bit m of the stream is bit m % 8 of byte m // 8. The bits behind
    the last code are zero. `bits` is 1 to 8.
    """
    count = codes.numel()
    if bits == 8 or count == 0:
        return codes.clone()
    padding = -count % _GROUP
    if padding:
        codes = torch.cat([codes, codes.new_zeros(padding)])
    words = codes.view(torch.int64)
    # Eight codes are one 64-bit word. Fields move together: codes to pairs, pairs to quads, quads to one run.
    for width in (1, 2, 4):
        low = _fields(bits, width)
        words = (words & low) | ((words >> (width * (8 - bits))) & (low << (width * bits)))
    return words.view(torch.uint8).view(-1, _GROUP)[:, :bits].reshape(-1)[: packed_bytes(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the inverse of ``pack``: uint8 codes [count].

    Raises:
        ValueError: `packed` isn't of the length that `count` codes take.
    """
    if packed.numel() != packed_bytes(count, bits):
        raise ValueError(f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, not {packed.numel()}")
    if bits == 8 or count == 0:
        return packed.clone()
    padding = -packed.numel() % bits
    if padding:
        packed = torch.cat([packed, packed.new_zeros(padding)])
    spread = packed.new_zeros(packed.numel() // bits, _GROUP)
    spread[:, :bits] = packed.view(-1, bits)
    words = spread.view(torch.int64).view(-1)
    for width in (4, 2, 1):
        low = _fields(bits, width)
        words = (words & low) | ((words & (low << (width * bits))) << (width * (8 - bits)))
    return words.view(torch.uint8)[:count]


def _fields(bits: int, width: int) -> int:
    """Return a mask of the even fields of a 64-bit word, each `width` bytes wide and `width` codes full."""
    return int(sum(((1 << (bits * width)) - 1) << (16 * width * i) for i in range(4 // width)))
