"""How the fused product runs: what its kernel is compiled for, the fastest choice for a weight, and whether it pays.

Choices were measured on an H100 over the shapes of large models. On an H200, whose memory is nearly half as fast again,
they are within a few percent of the best as well; on other GPUs they are what fits, unmeasured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Final, NamedTuple

import torch

from kbit.kernels.tiles import LANES, TILE, TiledWeight

MOST_ROWS: Final = 64
"""Rows of x that one launch of the fused kernel takes."""
_PADDING: Final = 4
"""float32 values after a warp's sums for a row of x: fewer bank conflicts."""
_STATIC_SHARED: Final = 1024 + 16
"""Bytes of shared memory that the hardware takes of each CTA's, and some to spare."""
_MOST_SPLIT: Final = 8
_EIGHTS: Final = (1, 2, 4, 8)
"""Rows of x, in eights, that a variant takes, and for which it exchanges sums."""
_MOST_LAUNCHES: Final = 3
_ENOUGH_COLUMNS: Final = 2560
_ENOUGH_VALUES: Final = 2**24
"""Columns of W, and values for each launch after the first, from which on several may be faster: seen on an H100."""
_MEASURED_WARPS: Final = 12
"""Of a multiprocessor, in all variants for 64 rows of x from whose speed ``_cycles`` comes."""
_DEQUANTIZING_SECONDS: Final = 7.3e-6
"""What dequantizing and cuBLAS take beside their work."""
_REACHED: Final = 0.85
"""Part of a GPU's bandwidth at which a weight is dequantized, and read again."""
_ROW_SECONDS: Final = 1.25e-15
"""What a row of x adds for each value of W: less than its products take, since cuBLAS reads W meanwhile."""
_GAIN: Final = 1.03
"""How much faster the fused kernel has to be by this reckoning."""


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
        table = (1 << width) * (256 if width == 8 else LANES * 4)
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
    """What of a GPU decides.

    Attributes:
        processors: multiprocessors.
        shared: bytes of shared memory that a CTA may have.
        clock: most cycles a second of a multiprocessor; 0 where the driver doesn't say it.
        bandwidth: bytes a second of its memory, by clock and width; likewise.
    """

    processors: int
    shared: int
    clock: float
    bandwidth: float

    @classmethod
    @cache
    def of(cls, index: int) -> Gpu:
        properties = torch.cuda.get_device_properties(index)
        return cls(
            processors=properties.multi_processor_count,
            shared=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
            clock=1e3 * properties.clock_rate,  # it is in kHz
            bandwidth=1e3 * properties.memory_clock_rate * 2 * properties.memory_bus_width / 8,
        )


def choose(w: TiledWeight, rows: int, dtype: torch.dtype, gpu: Gpu, *, batch_invariant: bool = False) -> Variant:
    """The variant for a weight and so many rows of x.

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


def launch_shape(variant: Variant, w: TiledWeight, gpu: Gpu) -> tuple[int, int]:
    """(CTAs of a launch, float32 values in which those that share a unit of rows leave their sums)."""
    units = -(-w.row_blocks // variant.wr)
    groups = max(1, min(variant.ctas * gpu.processors // variant.split, units))
    # Equal shares: with as many rounds of units, no multiprocessor has more than it must.
    groups = -(-units // -(-units // groups))
    # Where none share, nothing is read or written there.
    sums = units * variant.split * variant.tiles * 8 * TILE * variant.wr if variant.split > 1 else 1
    return groups * variant.split, sums


def fused_is_faster(w: TiledWeight, rows: int, gpu: Gpu) -> bool:
    """Whether launches of the fused kernel, one after another, are faster than dequantizing W and cuBLAS.

    The first is work of the multiprocessors, the second bytes: of the codes, and twice of W in 16 bits. So it depends
    on a GPU's memory. What either takes was measured on an H200. On an H100 the answers are those measured there, but
    where both are about as fast; on other GPUs they are a guess.
    """
    launches, values = -(-rows // MOST_ROWS), w.rows * w.columns
    if launches == 1:
        return True
    if launches > _MOST_LAUNCHES or w.columns < _ENOUGH_COLUMNS or values < _ENOUGH_VALUES * (launches - 1):
        return False
    if not (gpu.clock and gpu.bandwidth):
        return False
    variant = choose(w, MOST_ROWS, w.table.dtype, gpu)
    rounds = -(-w.row_blocks // (variant.wr * (launch_shape(variant, w, gpu)[0] // variant.split)))
    of_processor = rounds * variant.wr * TILE * w.columns / variant.split
    cycles = _cycles(w.bits) * _MEASURED_WARPS / variant.warps
    fused = launches * (_launch_seconds(w.bits) + of_processor * cycles / gpu.clock)
    nbytes = (w.bits + 16 / w.blocksize) / 8 + 4  # for each value
    each = nbytes / (_REACHED * gpu.bandwidth) + launches * MOST_ROWS * _ROW_SECONDS
    return _GAIN * fused < _DEQUANTIZING_SECONDS + values * each


def _launch_seconds(bits: int) -> float:
    """Of a launch for 64 rows of x, beside its work."""
    return 7e-6 if bits == 5 else 5.6e-6


def _cycles(bits: int) -> float:
    """Of a multiprocessor, for each value of W and 64 rows of x."""
    return 0.102 if bits <= 4 else 0.113 if bits == 5 else 0.127
