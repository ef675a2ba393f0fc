"""What a k-bit layer stores of its weight: the kernels' tiles where it has that layout, else row-major order."""

from __future__ import annotations

import torch
from torch import Tensor

from kbit.blocks import Blocks, NestedAbsmax
from kbit.blockwise import QuantizedTensor
from kbit.kernels.tiles import LANES, TILE, full_codebook, tile, why_no_layout
from kbit.packing import packed_bytes
from kbit.spec import NESTED_BLOCKSIZE, QuantSpec


def is_tiled(rows: int, columns: int, spec: QuantSpec) -> bool:
    """Whether a weight [rows, columns], quantized so, lies in tiles: the same on every device."""
    return why_no_layout((rows, columns), spec) is None


def shapes(rows: int, columns: int, spec: QuantSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what ``lay_out`` gives, by name."""
    if is_tiled(rows, columns, spec):
        assert spec.blocksize is not None
        row_blocks = -(-rows // TILE)
        return {
            "codes": ((row_blocks * (columns // TILE), spec.bits, LANES, 4), torch.int32),
            "scales": ((row_blocks, columns // spec.blocksize, 8, 8), torch.float16),
            "codebook": ((1 << spec.bits,), torch.float32),
        }
    blocks = Blocks.of((rows, columns), spec)
    count = blocks.rows * blocks.per_row
    stored = {
        "codes": ((packed_bytes(rows * columns, spec.bits),), torch.uint8),
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
    """The codes, absmax and codebook of a quantized matrix as they are stored; its own tensors where they fit."""
    stored = {"codes": q.codes, "codebook": full_codebook(q.codebook, q.spec.bits)}
    if isinstance(q.absmax, NestedAbsmax):
        nested = {"absmax_scale": q.absmax.scale, "absmax_offset": q.absmax.offset}
        return {**stored, "absmax": q.absmax.codes, **nested}
    if is_tiled(q.shape[0], q.shape[1], q.spec):
        w = tile(q, q.storage_dtype)
        return {**stored, "codes": w.codes, "scales": w.scales}
    return {**stored, "absmax": q.absmax}
