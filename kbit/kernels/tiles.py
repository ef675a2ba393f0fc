"""The layout in which kernels read k-bit weights: tiles of 64 x 64, each as the lanes of a warp take it.

A warp multiplies a tile by tensor-core instructions (m16n8k16), whose operands are spread over its lanes: lane 4 g + t
has rows g and g + 8 of each 16, and of each 32 columns the eight from 8 t on (the instruction's own order of columns is
permuted, which changes no sum as long as x is read in the same order). A lane's 128 codes of a tile are one stream of
exactly k bits per code (``kbit.quantizer.packing``), so that it reads k times 16 bytes, and a warp 512 contiguous bytes
at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kbit.kernels.availability import choose_blockwise
from kbit.kernels.launching import on
from kbit.quantizer.block_float import BlockFloatTensor, code_values
from kbit.quantizer.blockwise import QuantizedTensor, zeros_of
from kbit.quantizer.packing import pack, unpack
from kbit.quantizer.storage import chunk_length
from kbit.spec import QuantSpec
from kbit.specs.block_float import BlockFloatSpec

TILE: Final = 64
"""Rows, and columns, of W in a tile: four times the 16 rows, and four times the 16 columns, of an m16n8k16."""
BLOCKSIZES: Final = (32, 64, 128, 256)
"""Block sizes that divide a tile's columns, or that whole tiles divide."""
LANES: Final = 32
"""Threads of a warp."""
SCALE_BYTES: Final = (2 * TILE, 3 * TILE, 4 * TILE)
"""Of the absmax of a tile's rows in a block, and their zero points of 0, 1 or 2 bytes."""
E8M0: Final = 1
E4M3: Final = 2
E4M3_BLOCKSIZE: Final = 16
"""Values under an E4M3 scale: NVFP4's. A tensor core sums columns of several such blocks."""
SCALE_DTYPES: Final = {torch.float8_e8m0fnu: E8M0, torch.float8_e4m3fn: E4M3}
"""Scales of a byte for each block, and their numbers in the kernels."""
_SCALES: Final = {torch.float16, torch.uint8, *SCALE_DTYPES}
EXACT_BITS: Final = 4
"""Of block-scaled floats whose products with a scale have few enough bits for float16 and bfloat16."""
_E8M0_UNSCALE: Final = 4.0
"""What elements of 4 bits are divided by: the scales times that are float16 numbers where the weight was of these, but
for scales that were rounded up above 2^15 / 4: such a block is a 2,048th too small."""
_E4M3_FACTORS: Final = {torch.float16: 2.0**8, torch.bfloat16: 2.0**120}
"""What elements of 4 bits are multiplied by: the kernel reads a scale's bits as those of so much smaller a number."""
_SCALE_STEPS: Final = 256
"""Scales that are tried for a table, between ``_SCALE`` and twice that: powers of two apart, rounding is the same."""
_SCALE: Final = 2.0**12
"""Codebook values are at most 1: times this, small ones of a dynamic map are normal numbers in float16."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TiledWeight:
    """A quantized W [n, k] in the kernels' layout.

    Attributes:
        codes: int32 [row blocks · column tiles, bits, 32 lanes, 4]: ceil(n / 64) · k / 64 tiles.
        scales: float16 [row blocks, k / blocksize, 8, 8]: absmax values, as lanes take them. Of block-scaled floats
            E8M0 or E4M3 scales, likewise. With zero points uint8 [row blocks, k / blocksize, 192 or 256]: absmax as
            bytes, and behind those of each block its zero points in the same order, whole numbers of a byte or float16.
        tensor_scale: float32 [1], of E4M3 scales, which are multiplied by it; else None.
        codebook: float32 [2^bits], what codes stand for; a shorter one repeats its last value.
        table: the same in 16 bits, times ``1 / unscale``, for the tensor cores; less a zero point, which is not scaled,
            with `unscale` 1. Of block-scaled floats as ``element_table`` makes it.
        unscale: float32 [1], what products with the table are multiplied by.
        arrived: int32 [row blocks], zero between launches: how many of the CTAs that share some rows are done. One
            launch at a time may use it, so a weight is for one stream at a time.
    """

    codes: Tensor
    scales: Tensor
    codebook: Tensor
    table: Tensor
    unscale: Tensor
    arrived: Tensor
    n: int
    k: int
    bits: int
    blocksize: int
    tensor_scale: Tensor | None = None

    @property
    def row_blocks(self) -> int:
        return -(-self.n // TILE)

    @property
    def zero_bytes(self) -> int:
        """Bytes of a block's zero point: 0 for none, 1 for a whole number, 2 for float16."""
        return self.scales.shape[2] // TILE - 2 if self.scales.dtype == torch.uint8 else 0

    @property
    def scale_format(self) -> int:
        """What the values of a block share: 0 for a float16 absmax, else ``E8M0`` or ``E4M3``."""
        return SCALE_DTYPES.get(self.scales.dtype, 0)

    @property
    def block_bytes(self) -> int:
        """Bytes of a row's absmax, or scale, and zero point."""
        return (1 if self.scale_format else 2) + self.zero_bytes

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        some = (self.codes, self.scales, self.tensor_scale, self.codebook, self.table, self.unscale, self.arrived)
        return sum(t.nbytes for t in some if t is not None)


def scale_dtype(spec: BlockFloatSpec) -> torch.dtype:
    """Return the dtype of a format's scales."""
    return torch.float8_e4m3fn if spec.element.tensor_scaled else torch.float8_e8m0fnu


def check_tiles(w: TiledWeight) -> None:
    """Refuse tensors that are not the layout of such a weight.

    Raises:
        ValueError: they are of another size, or don't lie in order.
    """
    tiles = w.row_blocks * w.k // TILE
    scales = tuple(w.scales.shape)
    of_block = {torch.uint8: ((SCALE_BYTES[1],), (SCALE_BYTES[2],))}.get(w.scales.dtype, ((8, 8),))
    is_whole = w.codes.shape == (tiles, w.bits, LANES, 4) and w.scales.dtype in _SCALES
    is_whole &= scales in [(w.row_blocks, w.k // w.blocksize, *shape) for shape in of_block]
    is_e4m3 = w.scale_format == E4M3
    is_whole &= is_e4m3 == (w.tensor_scale is not None) == (w.blocksize == E4M3_BLOCKSIZE)
    is_whole &= w.bits == EXACT_BITS or not is_e4m3
    if not (is_whole and w.codes.is_contiguous() and w.scales.is_contiguous()):
        raise ValueError(
            f"{w.bits}-bit tiles of shape {list(w.codes.shape)} with {w.scales.dtype} scales {list(scales)} of blocks "
            f"of {w.blocksize} are not those of a weight "
            f"[{w.n}, {w.k}], or don't lie in order"
        )


def why_not_tiled(q: QuantizedTensor | BlockFloatTensor) -> str | None:
    """Say in words why a weight has no such layout; None when it has."""
    return why_no_layout(q.shape, q.spec)


def why_no_layout(shape: tuple[int, ...], spec: QuantSpec | BlockFloatSpec) -> str | None:
    """Say the same of a weight of this shape, quantized so."""
    if len(shape) != 2:
        return f"it has {len(shape)} dimensions, not 2"
    if shape[1] % TILE:
        return f"its {shape[1]} columns are no multiple of {TILE}"
    if isinstance(spec, BlockFloatSpec):
        return None
    if spec.blocksize not in BLOCKSIZES:
        return f"its block size is {spec.blocksize}, not one of {', '.join(map(str, BLOCKSIZES))}"
    if shape[1] % spec.blocksize:
        return f"blocks of {spec.blocksize} don't divide its {shape[1]} columns"
    if spec.absmax_dtype != "float16":
        return f"its absmax is {spec.absmax_dtype}, not float16"
    return None


@torch.no_grad()
def tile(q: QuantizedTensor | BlockFloatTensor, dtype: torch.dtype) -> TiledWeight:
    """Lay a quantized weight out for the kernels; mean and kept columns are the caller's.

    Besides the weight and its layout about 8 bytes per value are at work, for a chunk of some row blocks: 16 MB on a
    GPU, more only where 64 rows have more than two million values.

    Args:
        q: the quantized weight.
        dtype: float16 or bfloat16, of the table: that of the x it will be multiplied with.

    Raises:
        ValueError: it has no such layout, or another dtype.
    """
    why = why_not_tiled(q)
    if why is not None:
        raise ValueError(f"this weight has no tiled layout: {why}")
    codes, scales, tensor_scale = tiled_codes(q), tiled_scales(q), None
    if isinstance(q, BlockFloatTensor):
        codebook, blocksize = code_values(q.spec.element, q.codes.device), q.spec.element.block
        tensor_scale = None if q.tensor_scale is None else q.tensor_scale.view(1)
        table, unscale = element_table(codebook, dtype, tensor_scale)
    else:
        assert q.spec.blocksize is not None
        codebook, blocksize = full_codebook(q.codebook, q.spec.bits), q.spec.blocksize
        table, unscale = lookup_table(codebook, dtype, whole=q.zero_points is not None)
    return TiledWeight(
        codes=codes,
        scales=scales,
        codebook=codebook,
        table=table,
        unscale=unscale,
        arrived=torch.zeros(scales.shape[0], dtype=torch.int32, device=codes.device),
        n=q.shape[0],
        k=q.shape[1],
        bits=q.spec.bits,
        blocksize=blocksize,
        tensor_scale=tensor_scale,
    )


@torch.no_grad()
def tiled_codes(q: QuantizedTensor | BlockFloatTensor, *, impl: str = "auto") -> Tensor:
    """Return the codes of ``TiledWeight``, for a weight that has this layout; `impl` as in ``kbit.quantize``."""
    (rows, columns), bits = q.shape, q.spec.bits
    row_blocks, column_tiles = -(-rows // TILE), columns // TILE
    codes = torch.empty(row_blocks * column_tiles, bits, LANES, 4, dtype=torch.int32, device=q.codes.device)
    if choose_blockwise(impl, q.codes.device) == "triton":
        from kbit.kernels.tiles_jit import tile_codes  # triton may be absent

        with on(q.codes.device):
            tile_codes[(len(codes),)](q.codes, codes, rows, columns, q.codes.numel(), BITS=bits, TILE=TILE, LANES=LANES)
        return codes
    for first, last in row_block_chunks(row_blocks, columns, q.codes.device):
        start, stop = first * TILE, min(last * TILE, rows)
        part = unpack(q.codes[start * columns * bits // 8 : stop * columns * bits // 8], bits, (stop - start) * columns)
        lanes = _by_lane(_padded(part.view(-1, columns), (last - first) * TILE))
        codes[first * column_tiles : last * column_tiles] = _pack(lanes, bits)
    return codes


@torch.no_grad()
def tiled_scales(q: QuantizedTensor | BlockFloatTensor) -> Tensor:
    """Return the scales of ``TiledWeight``, for a weight that has this layout."""
    if isinstance(q, BlockFloatTensor):
        return _by_group(q.scales, q.shape[0]).view(scale_dtype(q.spec))
    assert isinstance(q.absmax, Tensor)
    absmax = _by_group(q.absmax, q.shape[0])
    if q.zero_points is None:
        return absmax
    parts = (absmax, _by_group(zeros_of(q), q.shape[0]))
    return torch.cat([part.flatten(2).view(torch.uint8) for part in parts], 2)


@torch.no_grad()
def untile(w: TiledWeight, first: int = 0, last: int | None = None) -> Tensor:
    """Return the float32 weight that the layout stands for, on any device, unrounded.

    It is codebook value times absmax or scale, or that value less the zero point times absmax.

    Args:
        w: the weight, laid out.
        first: the first row block; the result begins at row 64 · first.
        last: the row block before which it ends; None is the end.
    """
    codes = untile_codes(w, first, last)
    values = w.codebook.index_select(0, codes.view(-1).int())
    scales, zeros = untile_scales(w, first, last)
    blocks = values.view(codes.shape[0], -1, w.blocksize)
    if zeros is not None:
        blocks.sub_(zeros.float().unsqueeze(-1))
    factors = scales.float() if w.tensor_scale is None else scales.float() * w.tensor_scale
    blocks.mul_(factors.unsqueeze(-1))
    return values.view(codes.shape)


def untile_codes(w: TiledWeight, first: int = 0, last: int | None = None) -> Tensor:
    """Return uint8 codes [rows of W, k] of row blocks [first, last): exactly those that were laid out."""
    last = w.row_blocks if last is None else last
    tiles = w.k // TILE
    lanes = _unpack(w.codes[first * tiles : last * tiles], w.bits)
    # Columns in pairs move as one 16-bit number. Lanes hold g  t  r  kh kl j1 j0 (e) -> r, j0, g; kh, t, kl, j1 (, e)
    pairs = lanes.view(torch.int16).view(last - first, tiles, 8, 4, 4, 2, 2, 2, 2)
    codes = pairs.permute(0, 4, 8, 2, 1, 5, 3, 6, 7).contiguous().view(torch.uint8)
    return codes.view(-1, w.k)[: w.n - first * TILE]


def untile_scales(w: TiledWeight, first: int = 0, last: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Return absmax or scales, of their dtype, and zero points, uint8 or float16 or None, of row blocks [first, last).

    Each is [rows of W, k / blocksize].
    """
    last = w.row_blocks if last is None else last
    scales = w.scales[first:last]
    if not w.zero_bytes:
        stored = _by_row(scales.view(torch.uint8) if w.scale_format else scales)[: w.n - first * TILE]
        return stored.contiguous().view(scales.dtype), None
    absmax = _by_row(scales[..., : SCALE_BYTES[0]].contiguous().view(torch.float16))
    kind = torch.uint8 if w.zero_bytes == 1 else torch.float16
    zeros = _by_row(scales[..., SCALE_BYTES[0] :].contiguous().view(kind))
    return absmax[: w.n - first * TILE], zeros[: w.n - first * TILE]


def row_block_chunks(row_blocks: int, columns: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yield [first, last) of runs of row blocks small enough to work on: ``chunk_length`` values, or one block."""
    step = max(1, chunk_length(device) // (TILE * columns))
    for first in range(0, row_blocks, step):
        yield first, min(first + step, row_blocks)


def full_codebook(codebook: Tensor, bits: int) -> Tensor:
    """Return float32 [2^bits]. A shorter one repeats its last value: every weight of a spec has the same shapes."""
    return torch.cat([codebook, codebook[-1:].expand((1 << bits) - codebook.numel())])


def lookup_table(codebook: Tensor, dtype: torch.dtype, *, whole: bool = False) -> tuple[Tensor, Tensor]:
    """Return a layout's (table, unscale): the codebook's values in 16 bits, scaled so that they are rounded least.

    A scale is free, since sums are multiplied in float32 anyway; a good one rounds the values several times less than
    rounding each weight would.

    Args:
        codebook: float32.
        dtype: of the table.
        whole: the values are whole numbers up to 255, exact as they are, from which zero points are subtracted.

    Raises:
        ValueError: dtype is not float16 or bfloat16.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"dtype={dtype} is not torch.float16 or torch.bfloat16")
    if whole:
        return codebook.to(dtype), torch.ones(1, dtype=torch.float32, device=codebook.device)
    steps = torch.arange(_SCALE_STEPS, dtype=torch.float64, device=codebook.device)
    scales = _SCALE * (1 + steps / _SCALE_STEPS)
    exact = codebook.double() * scales.unsqueeze(1)
    errors = ((exact.to(dtype).double() - exact) / scales.unsqueeze(1)).square().sum(1)
    best = errors.argmin(0, keepdim=True)  # not read back from a GPU
    return exact.index_select(0, best).squeeze(0).to(dtype), scales.index_select(0, best).reciprocal().float()


def element_table(codebook: Tensor, dtype: torch.dtype, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a layout's (table, unscale) for block-scaled floats: their elements in 16 bits, exactly.

    Args:
        codebook: float32 [2^bits], elements by code.
        dtype: float16 or bfloat16, of the table.
        tensor_scale: float32 [1], of NVFP4; None of MX formats.
    """
    if tensor_scale is not None:
        return (codebook * _E4M3_FACTORS[dtype]).to(dtype), tensor_scale.clone()
    unscale = _E8M0_UNSCALE if codebook.numel() == 1 << EXACT_BITS else 1.0
    return (codebook / unscale).to(dtype), codebook.new_full((1,), unscale)


def _padded(rows: Tensor, count: int) -> Tensor:
    return rows if rows.shape[0] == count else torch.nn.functional.pad(rows, (0, 0, 0, count - rows.shape[0]))


def _by_group(of_blocks: Tensor, rows: int) -> Tensor:
    """Return [row blocks, blocks of a row, 8, 8] of numbers of blocks, row by row."""
    padded = _padded(of_blocks.view(rows, -1), -(-rows // TILE) * TILE)
    # Lane (g, t) takes those of rows 16 r + g and 16 r + g + 8 for r = 0..3: of absmax sixteen bytes.
    split = padded.view(-1, 4, 2, 8, padded.shape[1]).permute(0, 4, 3, 1, 2)
    return split.reshape(split.shape[0], -1, 8, 8).contiguous()


def _by_row(scales: Tensor) -> Tensor:
    """Return [rows, blocks of a row]: the inverse of ``_by_group``, with the rows that fill the last tile."""
    split = scales.view(scales.shape[0], -1, 8, 4, 2).permute(0, 3, 4, 2, 1)
    return split.reshape(scales.shape[0] * TILE, -1)


def _by_lane(codes: Tensor) -> Tensor:
    """Return uint8, flat, lane by lane, of uint8 [rows, columns], rows in whole blocks of 64."""
    row_blocks, column_tiles = codes.shape[0] // TILE, codes.shape[1] // TILE
    # row = 16 r + 8 j0 + g; column = 32 kh + 8 t + 4 kl + 2 j1 + e, and e moves with j1 as one 16-bit number
    split = codes.view(torch.int16).view(row_blocks, 4, 2, 8, column_tiles, 2, 4, 2, 2)
    return split.permute(0, 4, 3, 6, 1, 5, 7, 8, 2).contiguous().view(torch.uint8).view(-1)


def _pack(lanes: Tensor, bits: int) -> Tensor:
    """Return int32 [tiles, bits, 32, 4]: each lane's stream of codes, in pieces of sixteen bytes."""
    return pack(lanes, bits).view(torch.int32).view(-1, LANES, bits, 4).transpose(1, 2)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Return uint8, flat: the inverse of ``_pack``."""
    streams = packed.transpose(1, 2).contiguous().view(torch.uint8).view(-1)
    return unpack(streams, bits, packed.shape[0] * TILE * TILE)
