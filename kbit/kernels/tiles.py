"""The layout in which kernels read k-bit weights: tiles of 64 x 64, each as the lanes of a warp take it.

A warp multiplies a tile by tensor-core instructions (m16n8k16), whose operands are spread over its lanes: lane 4 g + t
has rows g and g + 8 of each 16, and of each 32 columns the eight from 8 t on (the instruction's own order of columns is
permuted, which changes no sum as long as x is read in the same order). A lane's 128 codes of a tile are one stream of
exactly k bits a code, so that it reads k times 16 bytes, and a warp 512 contiguous bytes at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kbit.blockwise import QuantizedTensor
from kbit.packing import unpack

TILE: Final = 64
BLOCKSIZES: Final = (32, 64, 128, 256)
_LANES: Final = 32
_CODES: Final = TILE * TILE // _LANES
_CHUNK_TILES: Final = 4096
_SCALE_STEPS: Final = 256
_SCALE: Final = 2.0**12
"""Codebook values are at most 1: times this, small ones of a dynamic map are normal numbers in float16."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TiledWeight:
    """A quantized weight [rows, columns] in the kernels' layout.

    Attributes:
        codes: int32 [row blocks · column tiles, bits, 32 lanes, 4].
        scales: float16 [row blocks, columns / blocksize, 8, 8]: absmax values, as lanes take them.
        codebook: 16-bit [2^bits], times ``1 / unscale``; unused entries are zero.
        unscale: what products with the codebook are multiplied by.
        arrived: int32 [row blocks], zero between launches: how many of the CTAs that share some rows are done. One
            launch at a time may use it, so a weight is for one stream at a time.
    """

    codes: Tensor
    scales: Tensor
    codebook: Tensor
    unscale: float
    arrived: Tensor
    rows: int
    columns: int
    bits: int
    blocksize: int

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.codes.nbytes + self.scales.nbytes + self.codebook.nbytes + self.arrived.nbytes


def why_not_tiled(q: QuantizedTensor) -> str | None:
    """Why a weight has no such layout, in words; None when it has."""
    if len(q.shape) != 2:
        return f"it has {len(q.shape)} dimensions, not 2"
    if q.shape[1] % TILE:
        return f"its {q.shape[1]} columns are no multiple of {TILE}"
    if q.spec.blocksize not in BLOCKSIZES:
        return f"its block size is {q.spec.blocksize}, not one of {', '.join(map(str, BLOCKSIZES))}"
    if q.shape[1] % q.spec.blocksize:
        return f"blocks of {q.spec.blocksize} don't divide its {q.shape[1]} columns"
    if not isinstance(q.absmax, Tensor) or q.absmax.dtype != torch.float16:
        return f"its absmax is {q.spec.absmax_dtype}, not float16"
    return None


@torch.no_grad()
def tile(q: QuantizedTensor, dtype: torch.dtype) -> TiledWeight:
    """Lay a quantized weight out for the kernels; mean and kept columns are the caller's.

    Args:
        dtype: float16 or bfloat16, of the codebook: that of the x it will be multiplied with.

    Raises:
        ValueError: it has no such layout, or another dtype.
    """
    why = why_not_tiled(q)
    if why is not None:
        raise ValueError(f"this weight has no tiled layout: {why}")
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"dtype={dtype} is not torch.float16 or torch.bfloat16")
    assert isinstance(q.absmax, Tensor)
    assert q.spec.blocksize is not None
    (rows, columns), bits, blocksize = q.shape, q.spec.bits, q.spec.blocksize
    row_blocks = -(-rows // TILE)
    padding = row_blocks * TILE - rows
    codes = torch.nn.functional.pad(unpack(q.codes, bits, q.numel).view(rows, columns), (0, 0, 0, padding))
    absmax = torch.nn.functional.pad(q.absmax.view(rows, columns // blocksize), (0, 0, 0, padding))
    values, unscale = _scaled(q.codebook, dtype)
    codebook = torch.zeros(1 << bits, dtype=dtype, device=q.codes.device)
    codebook[: values.numel()] = values
    return TiledWeight(
        codes=_pack(_by_lane(codes), bits),
        # Lane (g, t) takes the absmax of rows 16 r + g and 16 r + g + 8 for r = 0..3: sixteen bytes.
        scales=absmax.view(row_blocks, 4, 2, 8, -1).permute(0, 4, 3, 1, 2).reshape(row_blocks, -1, 8, 8).contiguous(),
        codebook=codebook,
        unscale=unscale,
        arrived=torch.zeros(row_blocks, dtype=torch.int32, device=q.codes.device),
        rows=rows,
        columns=columns,
        bits=bits,
        blocksize=blocksize,
    )


@torch.no_grad()
def untile(w: TiledWeight) -> Tensor:
    """The float32 weight [rows, columns] that the layout stands for, unrounded but for the codebook; on any device."""
    row_blocks, column_tiles = -(-w.rows // TILE), w.columns // TILE
    lanes = _unpack(w.codes, w.bits).view(row_blocks, column_tiles, 8, 4, 4, 2, 2, 2, 2, 2)
    #                                 g  t  r  kh kl j1 j0 e -> r, j0, g; kh, t, kl, j1, e
    codes = lanes.permute(0, 4, 8, 2, 1, 5, 3, 6, 7, 9).reshape(row_blocks * TILE, w.columns)
    scales = w.scales.view(row_blocks, -1, 8, 4, 2).permute(0, 3, 4, 2, 1).reshape(row_blocks * TILE, -1)
    values = w.codebook.float()[codes.int()] * w.unscale
    return (values * scales.float().repeat_interleave(w.blocksize, 1))[: w.rows]


def _by_lane(codes: Tensor) -> Tensor:
    """uint8 [tiles, 32 lanes, 128] of uint8 [rows, columns], rows in whole blocks of 64."""
    row_blocks, column_tiles = codes.shape[0] // TILE, codes.shape[1] // TILE
    # row = 16 r + 8 j0 + g; column = 32 kh + 8 t + 4 kl + 2 j1 + e
    split = codes.view(row_blocks, 4, 2, 8, column_tiles, 2, 4, 2, 2, 2)
    return split.permute(0, 4, 3, 6, 1, 5, 7, 8, 2, 9).reshape(row_blocks * column_tiles, _LANES, _CODES)


def _pack(lanes: Tensor, bits: int) -> Tensor:
    """int32 [tiles, bits, 32, 4]: each lane's stream of codes, in pieces of sixteen bytes."""
    packed = torch.empty(lanes.shape[0], bits, _LANES, 4, dtype=torch.int32, device=lanes.device)
    for start in range(0, lanes.shape[0], _CHUNK_TILES):
        part = lanes[start : start + _CHUNK_TILES].long()
        words = part.new_zeros(part.shape[0], _LANES, 4 * bits + 1)
        for i in range(_CODES):
            word, offset = divmod(i * bits, 32)
            value = part[:, :, i] << offset
            words[:, :, word] |= value & 0xFFFFFFFF
            words[:, :, word + 1] |= value >> 32
        pieces = words[:, :, :-1].view(-1, _LANES, bits, 4).permute(0, 2, 1, 3)
        packed[start : start + _CHUNK_TILES] = pieces.to(torch.int32)
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """uint8 [tiles, 32, 128], the inverse of ``_pack``."""
    words = packed.permute(0, 2, 1, 3).reshape(packed.shape[0], _LANES, 4 * bits).long() & 0xFFFFFFFF
    words = torch.nn.functional.pad(words, (0, 1))
    codes = torch.empty(packed.shape[0], _LANES, _CODES, dtype=torch.uint8, device=packed.device)
    for i in range(_CODES):
        word, offset = divmod(i * bits, 32)
        both = (words[:, :, word] >> offset) | (words[:, :, word + 1] << (32 - offset))
        codes[:, :, i] = (both & ((1 << bits) - 1)).to(torch.uint8)
    return codes


def _scaled(codebook: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """(codebook in 16 bits, what to multiply products by): scaled so that its values are rounded least.

    A scale is free, since sums are multiplied in float32 anyway; a good one rounds the values several times less than
    rounding each weight would.
    """
    steps = torch.arange(_SCALE_STEPS, dtype=torch.float64, device=codebook.device)
    scales = _SCALE * (1 + steps / _SCALE_STEPS)
    exact = codebook.double() * scales.unsqueeze(1)
    errors = ((exact.to(dtype).double() - exact) / scales.unsqueeze(1)).square().sum(1)
    best = int(errors.argmin())
    return exact[best].to(dtype), 1.0 / float(scales[best])
