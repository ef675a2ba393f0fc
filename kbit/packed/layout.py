"""Layouts of a k-bit layer's stored weight: the kernels' tiles where it has that layout, else row-major order."""

from __future__ import annotations

import torch
from torch import Tensor

from kbit.kernels.tiles import (
    LANES,
    TILE,
    TiledWeight,
    full_codebook,
    row_block_chunks,
    tiled_absmax,
    tiled_codes,
    untile_absmax,
    untile_codes,
    why_no_layout,
    why_not_tiled,
)
from kbit.quantizer.absmax import NestedAbsmax
from kbit.quantizer.blocks import Blocks
from kbit.quantizer.blockwise import QuantizedTensor
from kbit.quantizer.packing import pack, packed_bytes
from kbit.spec import QuantSpec
from kbit.specs.blockwise import NESTED_BLOCKSIZE


def shapes(n: int, k: int, spec: QuantSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of what ``lay_out`` gives of a W [n, k], by name; "scales" are there where it is tiled."""
    if why_no_layout((n, k), spec) is None:
        assert spec.blocksize is not None
        row_blocks = -(-n // TILE)
        return {
            "codes": ((row_blocks * (k // TILE), spec.bits, LANES, 4), torch.int32),
            "scales": ((row_blocks, k // spec.blocksize, 8, 8), torch.float16),
            "codebook": ((1 << spec.bits,), torch.float32),
        }
    blocks = Blocks.of((n, k), spec)
    count = blocks.rows * blocks.per_row
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
    return {**stored, "absmax": ((count,), getattr(torch, spec.absmax_dtype))}


def lay_out(q: QuantizedTensor) -> dict[str, Tensor]:
    """Return a quantized matrix's codes, absmax and codebook as they are stored; its own tensors where they fit."""
    stored = {"codes": q.codes, "codebook": full_codebook(q.codebook, q.spec.bits)}
    if isinstance(q.absmax, NestedAbsmax):
        nested = {"absmax_scale": q.absmax.scale, "absmax_offset": q.absmax.offset}
        return {**stored, "absmax": q.absmax.codes, **nested}
    if why_not_tiled(q) is None:
        return {**stored, "codes": tiled_codes(q), "scales": tiled_absmax(q)}
    return {**stored, "absmax": q.absmax}


def row_major(w: TiledWeight) -> tuple[Tensor, Tensor]:
    """Return the codes and absmax of a weight in tiles, as ``QuantizedTensor`` has them."""
    chunks = row_block_chunks(w.row_blocks, w.k, w.codes.device)
    codes = torch.cat([pack(untile_codes(w, *chunk).reshape(-1), w.bits) for chunk in chunks])
    return codes, untile_absmax(w).reshape(-1)


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
