"""Layouts of a k-bit layer's stored weight: the kernels' tiles where it has that layout, else row-major order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kbit.kernels.tiles import (
    LANES,
    SCALE_BYTES,
    TILE,
    TiledWeight,
    full_codebook,
    row_block_chunks,
    tiled_codes,
    tiled_scales,
    untile_codes,
    untile_scales,
    why_no_layout,
    why_not_tiled,
)
from kbit.quantizer.absmax import NestedAbsmax
from kbit.quantizer.blocks import Blocks
from kbit.quantizer.blockwise import QuantizedTensor
from kbit.quantizer.packing import pack, packed_bytes
from kbit.spec import QuantSpec
from kbit.specs.blockwise import NESTED_BLOCKSIZE

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of buffers, by name."""


def shapes(n: int, k: int, spec: QuantSpec, *, float_zeros: bool = False) -> Shapes:
    """Return shape and dtype of what ``lay_out`` gives of a W [n, k], by name; "scales" are there where it is tiled.

    Args:
        n: rows of W.
        k: columns of W.
        spec: how it is quantized.
        float_zeros: its zero points are float16.
    """
    if why_no_layout((n, k), spec) is None:
        assert spec.blocksize is not None
        blocks = -(-n // TILE), k // spec.blocksize
        with_zeros = (*blocks, SCALE_BYTES[2 if float_zeros else 1]), torch.uint8
        return {
            "codes": ((blocks[0] * (k // TILE), spec.bits, LANES, 4), torch.int32),
            "scales": with_zeros if spec.zero_point else ((*blocks, 8, 8), torch.float16),
            "codebook": ((1 << spec.bits,), torch.float32),
        }
    cut = Blocks.of((n, k), spec)
    count = cut.rows * cut.per_row
    stored = {
        "codes": ((packed_bytes(n * k, spec.bits),), torch.uint8),
        "codebook": ((1 << spec.bits,), torch.float32),
    }
    if spec.absmax_dtype == "nested":
        nested = {
            "absmax_scale": ((-(-count // NESTED_BLOCKSIZE),), torch.float32),
            "absmax_offset": ((), torch.float32),
        }
        return {**stored, "absmax": ((count,), torch.uint8), **nested}
    if spec.zero_point:
        packed = (packed_bytes(count, spec.bits),), torch.uint8
        stored["zero_points"] = ((count,), torch.float16) if float_zeros else packed
    return {**stored, "absmax": ((count,), getattr(torch, spec.absmax_dtype))}


def lay_out(q: QuantizedTensor) -> dict[str, Tensor]:
    """Return a quantized matrix's codes, absmax, zero points and codebook as they are stored.

    They are its own tensors where these fit.
    """
    stored = {"codes": q.codes, "codebook": full_codebook(q.codebook, q.spec.bits)}
    if isinstance(q.absmax, NestedAbsmax):
        nested = {"absmax_scale": q.absmax.scale, "absmax_offset": q.absmax.offset}
        return {**stored, "absmax": q.absmax.codes, **nested}
    if why_not_tiled(q) is None:
        return {**stored, "codes": tiled_codes(q), "scales": tiled_scales(q)}
    zeros = {} if q.zero_points is None else {"zero_points": q.zero_points}
    return {**stored, "absmax": q.absmax, **zeros}


def row_major(w: TiledWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the codes, absmax and zero points of a weight in tiles, as ``QuantizedTensor`` has them."""
    chunks = row_block_chunks(w.row_blocks, w.k, w.codes.device)
    codes = torch.cat([pack(untile_codes(w, *chunk).reshape(-1), w.bits) for chunk in chunks])
    absmax, zeros = (None if part is None else part.reshape(-1) for part in untile_scales(w))
    assert absmax is not None
    return codes, absmax, zeros if zeros is None or w.zero_bytes == 2 else pack(zeros, w.bits)


def check_stored(name: str, found: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse a tensor that is not what a layer stores under this name.

    Raises:
        ValueError: it has another shape or dtype, or does not lie in order.
    """
    if found.shape != shape or found.dtype != dtype or not found.is_contiguous():
        order = "" if found.is_contiguous() else ", not contiguous"
        raise ValueError(
            f"{name} is {found.dtype} {list(found.shape)}{order}; this layer's is contiguous {dtype} {list(shape)}"
        )
