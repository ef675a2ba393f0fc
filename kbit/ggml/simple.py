"""q4_0, q4_1, q5_0, q5_1, q8_0: blocks of 32 values under one scale, and an offset where the name ends in _1.

What decides a code to the last bit is the reference implementation in Python (PyPI ``gguf``): each product and each sum
is rounded to float32. C code may fuse the two, so that one code in many thousands differs there by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbit.quantizer.storage import divided

BELOW_HALF = 0.49999997
"""The float32 before 1/2: what is added before truncation, so that halves go away from 0 and nothing else does."""
GATHER = 0x0102040810204080
"""Times eight bytes of 0 or 1, in a word: its highest byte has byte i as bit i."""


def quantize_symmetric(x: Tensor, out: Tensor, bits: int) -> Tensor:
    """Write q4_0 or q5_0: codes around 2^(bits-1); the scale takes the value of the largest magnitude to code 0.

    Args:
        x: float32 [blocks, 32].
        out: uint8 [blocks, bytes of a block].
        bits: of a code.

    Returns:
        float16 [blocks]: not finite where a value isn't, or the scale is too large for float16.
    """
    half = 1 << (bits - 1)
    scale = _largest(x) / -half
    codes = _whole((x * _inverse(scale)[:, None]).add_(half + 0.5)).clamp_(max=2 * half - 1)
    stored = scale.half()
    pairs = out.view(torch.int16)
    pairs[:, 0] = stored.view(torch.int16)
    _write_codes(codes, pairs[:, 1:], bits)
    return stored


def quantize_offset(x: Tensor, out: Tensor, bits: int) -> Tensor:
    """Write q4_1 or q5_1: codes from the block's least value, 0, to its largest. As ``quantize_symmetric``."""
    low, high = x.amin(-1), x.amax(-1)  # aminmax takes ten times as long
    scale = divided(high - low, 2**bits - 1)
    codes = _whole((x - low[:, None]).mul_(_inverse(scale)[:, None]).add_(0.5)).clamp_(max=2**bits - 1)
    stored, offset = scale.half(), low.half()
    pairs = out.view(torch.int16)
    pairs[:, 0], pairs[:, 1] = stored.view(torch.int16), offset.view(torch.int16)
    _write_codes(codes, pairs[:, 2:], bits)
    check: Tensor = stored + offset.abs()
    return check


def quantize_8bit(x: Tensor, out: Tensor, bits: int) -> Tensor:
    """Write q8_0: signed codes, ±127 for the largest magnitude; halves go away from 0. As ``quantize_symmetric``."""
    low, high = x.amin(-1), x.amax(-1)  # aminmax takes ten times as long
    scale = divided(torch.maximum(high, -low).abs_(), (1 << (bits - 1)) - 1)
    y = x * _inverse(scale)[:, None]
    codes = y.add_(torch.copysign(y.new_tensor(BELOW_HALF), y)).to(torch.int8)
    stored = scale.half()
    pairs = out.view(torch.int16)
    pairs[:, 0], pairs[:, 1:] = stored.view(torch.int16), codes.view(torch.int16)
    return stored


def dequantize_symmetric(blocks: Tensor, bits: int) -> Tensor:
    """Return float32 [blocks, 32] of uint8 [blocks, bytes of a block]."""
    codes = _read_codes(blocks[:, 2:], bits).sub_(1 << (bits - 1))
    return codes.mul_(as_float(blocks[:, :2]))


def dequantize_offset(blocks: Tensor, bits: int) -> Tensor:
    """As ``dequantize_symmetric``."""
    return _read_codes(blocks[:, 4:], bits).mul_(as_float(blocks[:, :2])).add_(as_float(blocks[:, 2:4]))


def dequantize_8bit(blocks: Tensor, bits: int) -> Tensor:
    """As ``dequantize_symmetric``."""
    del bits
    codes: Tensor = blocks[:, 2:].view(torch.int8).float()
    return codes.mul_(as_float(blocks[:, :2]))


def as_bytes(scale: Tensor) -> Tensor:
    """Return float16 [blocks] as uint8 [blocks, 2]."""
    return scale.contiguous().view(torch.uint8).view(-1, 2)


def as_float(stored: Tensor) -> Tensor:
    """Return the inverse of ``as_bytes`` as float32 [blocks, 1]."""
    return stored.contiguous().view(torch.float16).float()


def _largest(x: Tensor) -> Tensor:
    """Return the value of the largest magnitude of each row, the first of several."""
    low, high = x.amin(-1), x.amax(-1)  # aminmax takes ten times as long
    largest = torch.where(high >= -low, high, low)
    tied = (high == -low).nonzero()[:, 0]
    if len(tied):
        rows = x[tied]
        largest[tied] = rows.gather(1, rows.abs().argmax(1, keepdim=True))[:, 0]
    return largest


def _whole(x: Tensor) -> Tensor:
    """Truncate values of 0 to 32 to uint8: by int16, which on a CPU takes a third of the direct way's time."""
    return x.to(torch.int16).to(torch.uint8)


def _inverse(scale: Tensor) -> Tensor:
    return scale.reciprocal().nan_to_num_(nan=torch.nan, posinf=0, neginf=0)


def _write_codes(codes: Tensor, out: Tensor, bits: int) -> None:
    """Put the low four bits of value i and i + 16 into byte i; a fifth bit of value i is bit i of four bytes before.

    Args:
        codes: uint8 [blocks, 32].
        out: int16 [blocks, 8 or 10].
        bits: 4 or 5.
    """
    if bits == 5:
        # The product has the lowest bits of a word's eight bytes side by side in its highest byte.
        fifth = ((codes >> 4).view(torch.int64) * GATHER).view(torch.uint8).view(-1, 4, 8)[:, :, 7]
        out[:, :2] = fifth.contiguous().view(torch.int16)
        codes, out = codes & 15, out[:, 2:]
    # 16 codes at once: rows of two words would be walked word by word.
    halves = codes.view(torch.complex128)
    low, high = (halves[:, i].contiguous().view(torch.int64) for i in (0, 1))
    out[:, :] = high.bitwise_left_shift_(4).bitwise_or_(low).view(torch.int16).view(-1, 8)


def _read_codes(stored: Tensor, bits: int) -> Tensor:
    """Return the inverse of ``_write_codes``, float32 [blocks, 32]."""
    high, low = (stored[:, :4], stored[:, 4:]) if bits == 5 else (None, stored)
    codes = torch.cat([low & 15, low >> 4], dim=1)
    if high is not None:
        bit = torch.arange(8, dtype=torch.uint8, device=stored.device)
        codes |= ((high[:, :, None] >> bit) & 1).reshape(-1, 32) << 4
    return codes.float()
