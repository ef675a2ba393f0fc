"""x · dequantize(W)^T for k-bit weights as they are stored: ``matmul.cu``, its launcher and its choice of shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from kbit.kernels import dense
from kbit.kernels.nvrtc import Function, compile_cubin
from kbit.kernels.tiles import TILE, TiledWeight, check_tiles

MOST_ROWS: Final = 64
"""Rows of x that one launch of the fused kernel takes."""
_LANES: Final = 32
_PADDING: Final = 4
"""float32 values after a warp's sums for a row of x: fewer bank conflicts."""
_STATIC_SHARED: Final = 1024 + 16
"""Bytes of shared memory that the hardware takes of each CTA's, and some to spare."""
_FEWEST_CAPABILITY: Final = (8, 0)
_MOST_SPLIT: Final = 8
_EIGHTS: Final = (1, 2, 4, 8)
"""Rows of x, in eights, that a variant takes, and for which it exchanges sums."""
_MOST_OFFSET: Final = 2**31
_UNTILE_WARPS: Final = 8
_UNTILE_CTAS: Final = 6
_ENOUGH_COLUMNS: Final = 2560
_ENOUGH_FOR_TWO: Final = 2**24
_ENOUGH_FOR_THREE: Final = 5 * 2**23
"""Columns and values of W from which on two and three launches of the fused kernel are worth it."""
_BUSY: Final = 0.8
"""Least part of the CTAs that a GPU holds which a launch must have for three to be worth it."""
_PART_BYTES: Final = 1 << 30
"""About that much of a weight is dequantized at a time. Products with smaller parts are slower than with the whole."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a kernel is compiled for.

    Attributes:
        pair: the codebook is looked up by pairs of codes.
        tiles: rows of x it takes, in eights.
        wr, wk: tiles that a CTA works on at a time: groups of 64 rows of W, times splits of the columns.
        share: warps that share a tile: 2 with half of its rows each, or 1.
        stages: tiles of x in shared memory at a time.
        staged: codes take the same way, else through registers.
        sums: rows of x whose sums the warps exchange at a time, in eights.
        ctas: of a multiprocessor.
        split: CTAs that share a unit of rows, each with a part of the columns.
    """

    bits: int
    blocksize: int
    bfloat16: bool
    tiles: int
    pair: bool
    wr: int
    wk: int
    share: int
    stages: int
    staged: bool
    sums: int
    ctas: int
    split: int

    @property
    def warps(self) -> int:
        return self.wr * self.wk * self.share

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a CTA, asked for at launch: the table, x and codes in flight, sums over warps."""
        width = 2 * self.bits if self.pair else self.bits
        table = (1 << width) * (256 if width == 8 else _LANES * 4)
        x = self.wk * self.stages * self.tiles * 1024
        codes = self.wr * self.wk * self.stages * (self.bits * 512 + (256 if self.blocksize == 32 else 128))
        sums = self.warps * self.sums * 8 * (TILE // self.share + _PADDING) * 4
        return table + x + codes * self.staged + sums

    def options(self) -> tuple[str, ...]:
        values = {
            "BITS": self.bits,
            "PAIR": int(self.pair),
            "BLOCK": self.blocksize,
            "TILES": self.tiles,
            "BF16": int(self.bfloat16),
            "WR": self.wr,
            "WK": self.wk,
            "SHARE": self.share,
            "STAGES": self.stages,
            "STAGED": int(self.staged),
            "SUMS": self.sums,
            "MIN_CTAS": self.ctas,
            "SPLIT": self.split,
        }
        return tuple(f"-D{name}={value}" for name, value in values.items())


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What of a GPU decides: multiprocessors, and bytes of shared memory that a CTA may have."""

    processors: int
    shared: int

    @classmethod
    @cache
    def of(cls, index: int) -> Gpu:
        properties = torch.cuda.get_device_properties(index)
        shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        return cls(processors=properties.multi_processor_count, shared=shared)


def choose(w: TiledWeight, rows: int, dtype: torch.dtype, gpu: Gpu, *, batch_invariant: bool = False) -> Variant:
    """The variant for a weight and so many rows of x: measured on an H100 over the shapes of large models.

    Args:
        batch_invariant: sums are taken in the same order for any number of rows, at the cost of speed with few.
    """
    tiles = next(t for t in _EIGHTS if rows <= 8 * t)
    measured = next(_fitting(w, _EIGHTS[-1] if batch_invariant else tiles, dtype, gpu))
    units = -(-w.row_blocks // measured.wr)
    # Units that don't fill the GPU are shared by several CTAs, each with a part of the columns.
    split = max(1, min(_MOST_SPLIT, measured.ctas * gpu.processors // units, w.columns // TILE // measured.wk))
    # Each thread copies at least one piece of x.
    share = min(measured.share, max(1, 2 * tiles // measured.wr))
    return replace(measured, tiles=tiles, share=share, sums=min(measured.sums, tiles), split=split)


def _fitting(w: TiledWeight, tiles: int, dtype: torch.dtype, gpu: Gpu) -> Iterator[Variant]:
    """The fastest variant first, then what needs less shared memory: not measured on GPUs other than Hopper's."""
    first = _shape(w.bits, tiles, w.row_blocks, w.columns, gpu.processors)
    smaller = (first._replace(wk=first.wk // i, share=1, stages=2, staged=False, ctas=1) for i in (1, 2, 4))
    shapes = [first, *(shape for shape in smaller if shape.wk)]
    for shape, pair, sums in product(shapes, (True, False), reversed(_EIGHTS)):
        variant = Variant(
            bits=w.bits,
            blocksize=w.blocksize,
            bfloat16=dtype == torch.bfloat16,
            tiles=tiles,
            # Halves the lookups; a table of larger pairs has no room.
            pair=pair and w.bits <= 5,
            split=1,
            **shape._replace(sums=sums)._asdict(),
        )
        if sums <= min(tiles, shape.sums) and variant.shared + _STATIC_SHARED <= gpu.shared // variant.ctas:
            yield variant


class _Shape(NamedTuple):
    """As in ``Variant``; `sums` is the most."""

    wr: int
    wk: int
    share: int = 1
    stages: int = 2
    staged: bool = True
    sums: int = 8
    ctas: int = 1


def _shape(bits: int, tiles: int, row_blocks: int, columns: int, processors: int) -> _Shape:
    """The fastest measured on an H100."""
    few = row_blocks <= processors // 2  # units of one row block leave half of the GPU free
    if tiles == 8:
        return _Shape(1, 6, share=2) if few else _Shape(2, 3, share=2)
    if few:
        return _shape_for_few_row_blocks(bits, tiles, columns)
    if tiles == 4:
        return _shape_for_32_rows(bits, row_blocks > 4 * processors)
    if tiles == 2:
        return _shape_for_16_rows(bits)
    halves = -(-row_blocks // 2) <= processors // 2  # units of two row blocks leave half of the GPU free
    return _shape_for_8_rows(bits, halves)


def _shape_for_few_row_blocks(bits: int, tiles: int, columns: int) -> _Shape:
    """Several CTAs share each row block of W, with a part of the columns."""
    if bits == 5 and columns > 8192:
        return _Shape(2, 4 if tiles == 4 else 8, staged=False)
    if tiles == 4:
        return _Shape(1, 8, staged=bits >= 5)
    if bits == 5:  # two CTAs have no room for a table of pairs, which takes long to make
        return _Shape(1, 8, staged=False, ctas=2)
    if tiles == 2:
        if bits == 6:
            return _Shape(1, 8, ctas=2)
        return _Shape(1, 12 if bits <= 4 else 8, staged=False)
    return _Shape(2, 8, staged=False) if bits <= 5 else _Shape(1, 12, staged=False)


def _shape_for_32_rows(bits: int, many_row_blocks: bool) -> _Shape:
    if bits <= 5:
        return _Shape(2, 4, staged=False)
    if not many_row_blocks:
        return _Shape(1, 4, staged=False, ctas=2)
    return _Shape(2, 3, share=2, stages=3) if bits == 8 else _Shape(2, 6, sums=1)


def _shape_for_16_rows(bits: int) -> _Shape:
    match bits:
        case 4:
            return _Shape(2, 6, stages=3)
        case 6:
            return _Shape(1, 8, ctas=2)
        case 7:
            return _Shape(2, 8)
        case 8:
            return _Shape(1, 4, staged=False, ctas=2)
        case _:
            return _Shape(2, 8 if bits == 5 else 6, staged=False)


def _shape_for_8_rows(bits: int, halves: bool) -> _Shape:
    if bits in (5, 8):  # large tables leave no room for codes
        return _Shape(2, 8, staged=False)
    if bits >= 6:
        return _Shape(1, 8, ctas=2) if halves else _Shape(2, 8)
    # Where several CTAs have a part of the columns each, a shorter way to the first is worth more than many in flight.
    return _Shape(2, 8, staged=False) if halves else _Shape(2, 8, stages=3)


def matmul(
    x: Tensor,
    w: TiledWeight,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """x · W^T (+ bias + addend), summed in float32, the same bits each time.

    Up to 64 rows of x, for a large W up to 128 or 192, are multiplied with the codes as they are stored, 64 at a time.
    For more, W is dequantized to x's dtype, about 1 GiB at a time, and multiplied by cuBLAS.

    Args:
        x: float16 or bfloat16 [rows, columns], at least one row, contiguous, on the weight's GPU; the table's dtype.
        bias: of x's dtype [W's rows], contiguous, on the same GPU.
        addend: float32 [rows, W's rows], likewise; added before the only rounding.
        batch_invariant: a row's result depends on no other row, nor on how many there are. Else it may depend on how
            many rows there are.

    Returns:
        x's dtype [rows, W's rows].

    Raises:
        ValueError: x, bias or addend is something else; nothing was launched.
    """
    check_tiles(w)
    _check(x, w)
    _check_added("bias", bias, x, (w.rows,), x.dtype)
    _check_added("addend", addend, x, (x.shape[0], w.rows), torch.float32)
    y = torch.empty(x.shape[0], w.rows, dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        if batch_invariant or _is_fused(w, x.shape[0]):
            for start in range(0, x.shape[0], MOST_ROWS):
                some = slice(start, start + MOST_ROWS)
                _fused(x[some], w, bias, None if addend is None else addend[some], y[some], batch_invariant)
        else:
            _by_parts(x, w, bias, addend, y)
    return y


def _is_fused(w: TiledWeight, rows: int) -> bool:
    """Whether launches of the fused kernel, one after another, are faster than dequantizing and cuBLAS: measured."""
    launches, values = -(-rows // MOST_ROWS), w.rows * w.columns
    if launches == 1:
        return True
    if launches > 3 or w.columns < _ENOUGH_COLUMNS:
        return False
    if launches == 2:
        return values >= _ENOUGH_FOR_TWO
    gpu = Gpu.of(w.codes.device.index)
    variant = choose(w, MOST_ROWS, w.table.dtype, gpu)
    is_busy = launch_shape(variant, w, gpu)[0] >= _BUSY * variant.ctas * gpu.processors
    return values >= _ENOUGH_FOR_THREE and is_busy


def _fused(
    x: Tensor, w: TiledWeight, bias: Tensor | None, addend: Tensor | None, y: Tensor, batch_invariant: bool
) -> None:
    index, rows = x.device.index, x.shape[0]
    gpu = Gpu.of(index)
    variant = choose(w, rows, x.dtype, gpu, batch_invariant=batch_invariant)
    ctas, sums = launch_shape(variant, w, gpu)
    partial = torch.empty(sums, dtype=torch.float32, device=x.device)
    _function(variant, index).launch(
        ctas,
        variant.warps * _LANES,
        *(w.codes, w.scales, w.table, x, bias, addend, y, partial, w.arrived, w.unscale),
        *(rows, w.rows, w.columns, x.stride(0) if rows > 1 else w.columns),
        overlap=torch.cuda.get_device_capability(index) >= (9, 0),
    )


def launch_shape(variant: Variant, w: TiledWeight, gpu: Gpu) -> tuple[int, int]:
    """(CTAs of a launch, float32 values in which those that share a unit of rows leave their sums)."""
    units = -(-w.row_blocks // variant.wr)
    groups = max(1, min(variant.ctas * gpu.processors // variant.split, units))
    # Equal shares: with as many rounds of units, no multiprocessor has more than it must.
    groups = -(-units // -(-units // groups))
    # Where none share, nothing is read or written there.
    sums = units * variant.split * variant.tiles * 8 * TILE * variant.wr if variant.split > 1 else 1
    return groups * variant.split, sums


def _by_parts(x: Tensor, w: TiledWeight, bias: Tensor | None, addend: Tensor | None, y: Tensor) -> None:
    parts = -(-2 * w.rows * w.columns // _PART_BYTES)
    step = -(-w.row_blocks // parts)
    part = torch.empty(min(step * TILE, w.rows), w.columns, dtype=x.dtype, device=x.device)
    for first in range(0, w.row_blocks, step):
        start, stop = first * TILE, min((first + step) * TILE, w.rows)
        dequantize_rows(w, first, part[: stop - start])
        added = None if bias is None else bias[start:stop]
        dense.product(
            x, part[: stop - start], added, None if addend is None else addend[:, start:stop], y[:, start:stop]
        )


def dequantize_rows(w: TiledWeight, first: int, out: Tensor) -> None:
    """Fill out, 16-bit [rows, columns] on the weight's GPU, with the rows of W from row block `first` on.

    Codebook value times absmax in float32, rounded once: to the bit what ``kbit.dequantize`` gives.
    """
    index = out.device.index
    tiles = -(-out.shape[0] // TILE) * (w.columns // TILE)
    grid = min(-(-tiles // _UNTILE_WARPS), Gpu.of(index).processors * _UNTILE_CTAS)
    # The kernel leaves out rows beyond the last of the weight, not of `out`: that ends with it, or at a row block.
    _untile(w.bits, w.blocksize, out.dtype == torch.bfloat16, index).launch(
        grid, _UNTILE_WARPS * _LANES, *(w.codes, w.scales, w.codebook, out, first, tiles, w.rows, w.columns)
    )


def _check(x: Tensor, w: TiledWeight) -> None:
    if x.dim() != 2 or x.shape[1] != w.columns or x.shape[0] < 1:
        raise ValueError(f"x is {list(x.shape)}: [at least 1, {w.columns}] is needed")
    if x.dtype != w.table.dtype:
        raise ValueError(f"x is {x.dtype}, but the weight was laid out for {w.table.dtype}")
    apart = x.stride(0) if x.shape[0] > 1 else x.shape[1]
    if MOST_ROWS * apart > _MOST_OFFSET or w.codes.numel() // 4 > _MOST_OFFSET:
        raise ValueError(
            f"x's rows are {apart:,} values apart, and the codes take {w.codes.nbytes:,} bytes: the kernel has "
            f"offsets for {_MOST_OFFSET // MOST_ROWS:,} and {16 * _MOST_OFFSET:,}; x.contiguous() brings rows together"
        )
    if x.device != w.codes.device or x.device.type != "cuda":
        raise ValueError(f"x is on {x.device} and the weight on {w.codes.device}: both must be on one GPU")
    if x.stride(1) != 1 or (x.shape[0] > 1 and x.stride(0) % 8) or x.data_ptr() % 16:
        raise ValueError("x must be contiguous, its rows at multiples of 16 bytes: call x.contiguous(), or x.clone()")
    if torch.cuda.get_device_capability(x.device) < _FEWEST_CAPABILITY:
        raise ValueError("a GPU of compute capability 8.0 or later is needed")


def _check_added(name: str, added: Tensor | None, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if added is None:
        return
    if added.shape != shape or added.dtype != dtype or added.device != x.device or not added.is_contiguous():
        raise ValueError(
            f"{name} is {added.dtype} {list(added.shape)} on {added.device}: contiguous {dtype} {list(shape)} on "
            f"{x.device} is needed"
        )


@cache
def _function(variant: Variant, device: int) -> Function:
    return Function(_compiled("matmul.cu", variant.options(), device), "kbit_matmul", variant.shared, device)


@cache
def _untile(bits: int, blocksize: int, bfloat16: bool, device: int) -> Function:
    options = (f"-DBITS={bits}", f"-DBLOCK={blocksize}", f"-DBF16={int(bfloat16)}")
    return Function(_compiled("untile.cu", options, device), "kbit_untile", 0, device)


def _compiled(name: str, options: tuple[str, ...], device: int) -> bytes:
    source = Path(__file__).with_name(name).read_text()
    return compile_cubin(source, options, torch.cuda.get_device_capability(device))
