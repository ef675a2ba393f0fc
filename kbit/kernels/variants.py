"""Choose how the fused product runs: what its kernel is compiled for, and whether it is worth it.

y = x · W^T with x [m, k], W [n, k] and y [m, n], in tiles of 8 rows of x and of 64 rows by 64 columns of W
(``kbit.kernels.tiles``).

Choices were measured over the shapes of large models: those for up to 16 rows of x, and those with Hopper's own
instructions, on an H200; the others on an H100. On an H200, whose memory is nearly half as fast again, these are within
a few percent of the best as well; on other GPUs all are what fits, unmeasured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Final, NamedTuple

import torch

from kbit.kernels.tiles import E4M3, EXACT_BITS, LANES, TILE, TiledWeight

MOST_M: Final = 64
"""Rows of x that one launch of the fused kernel takes where each warp multiplies alone: 8 ``m_tiles`` of 8 rows."""
_MOST_M_WGMMA: Final = 128
"""The same where four warps multiply together."""
_M_TILES: Final = (1, 2, 4, 8, 16)
"""Tiles of 8 rows of x that a variant takes, and for which it exchanges sums. An m16n8k16 takes 8 of x and 16 of W."""
_PADDING: Final = 4
"""float32 values after a warp's sums for a row of x: fewer bank conflicts. The kernel's STRIDE has the same."""
_STATIC_SHARED: Final = 1024 + 16
"""Bytes of shared memory that the hardware takes of each CTA's, and some to spare."""
_MOST_SPLIT_K: Final = 8
"""CTAs that share a unit of rows of W at most: the last of them sums what all have, and holds that in registers."""
_MOST_LAUNCHES: Final = 3
"""Of more launches the kernel is not taken: dequantizing and cuBLAS are."""
_LARGE: Final = 2**25
_VERY_LARGE: Final = 2**27
"""Values of W from which four warps that multiply together are faster than each alone: measured on an H200."""
_ENOUGH_K: Final = 2560
_ENOUGH_VALUES: Final = 2**24
"""Columns of W, and values for each launch after the first, from which on several may be faster: seen on an H100."""
_MOST_M_FUSED: Final = ((2**26, 384), (3 * 2**24, 256), (_LARGE, 192), (_ENOUGH_VALUES, _MOST_M_WGMMA))
"""Values of W from which so many rows of x, 128 a launch, are faster than dequantizing it: measured on an H200."""
_MEASURED_WARPS: Final = 12
"""Of a multiprocessor, in all variants for 64 rows of x from whose speed ``_cycles`` comes."""
_DEQUANTIZING_SECONDS: Final = 7.3e-6
"""Time that dequantizing and cuBLAS take besides their work: measured on an H200, as are the next two."""
_REACHED: Final = 0.85
"""Part of a GPU's bandwidth at which a weight is dequantized, and read again."""
_ROW_SECONDS: Final = 1.25e-15
"""Time that a row of x adds for each value of W: less than its products take, since cuBLAS reads W meanwhile."""
_GAIN: Final = 1.03
"""Speedup that the fused kernel has to reach by this estimate."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The case that a kernel is compiled for; ``options`` names its macros.

    Attributes:
        bits, blocksize: of W.
        scale_format: what a block's values share: 0 a float16 absmax, 1 an E8M0 scale, 2 an E4M3 scale.
        zero_bytes: of each block's zero point: 0 for none, 1 for a whole number, 2 for float16.
        apart: these times the sums of x are subtracted from products, else they themselves from the values.
        bfloat16: x and y are bfloat16, else float16.
        pair: the codebook is looked up by pairs of codes.
        wgmma: four warps multiply together, as Hopper's tensor cores do: their tiles lie above each other.
        folded: what is multiplied are values times their absmax, in 16 bits; else products are scaled.
        m_tiles: tiles of 8 rows of x that a launch takes.
        n_tiles, k_tiles: tiles of W, 64 rows by 64 columns, that a CTA works on at a time: so many above each other,
            and so many next to each other, each of which has its own part of the columns.
        warps_per_tile: 2 that have half of a tile's rows each, or 1.
        stages: tiles of x in shared memory at a time.
        staged: codes go through shared memory too, else through registers.
        sum_tiles: tiles of 8 rows of x whose sums the warps exchange at a time.
        blocks_per_sm: CTAs that a multiprocessor holds.
        split_k: CTAs that share a unit of rows of W, each with a part of the columns.
    """

    bits: int
    blocksize: int
    scale_format: int
    zero_bytes: int
    apart: bool
    bfloat16: bool
    pair: bool
    wgmma: bool
    folded: bool
    m_tiles: int
    n_tiles: int
    k_tiles: int
    warps_per_tile: int
    stages: int
    staged: bool
    sum_tiles: int
    blocks_per_sm: int
    split_k: int

    @property
    def warps(self) -> int:
        return self.n_tiles * self.k_tiles * self.warps_per_tile

    @property
    def looks_up_floats(self) -> bool:
        """Whether the kernel takes the codebook itself: it folds what is not exact in 16 bits."""
        return self.folded and not (self.scale_format and self.bits == EXACT_BITS)

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a CTA, asked for at launch: the table, x and codes in flight, sums over warps."""
        width = 2 * self.bits if self.pair else self.bits
        table = (1 << width) * (256 if width == 8 or (self.pair and self.looks_up_floats) else LANES * 4)
        x = self.k_tiles * self.stages * self.m_tiles * 1024
        scale_bytes = ((1 if self.scale_format else 2) + self.zero_bytes) * TILE * max(1, TILE // self.blocksize)
        code_bytes = self.bits * 512 + (scale_bytes if self.wgmma else -(-scale_bytes // 128) * 128)
        codes = self.n_tiles * self.k_tiles * self.stages * code_bytes
        sums = self.warps * self.sum_tiles * 8 * (TILE // self.warps_per_tile + _PADDING) * 4
        barriers = 8 * self.k_tiles * self.stages * self.wgmma
        return table + x + codes * self.staged + sums + barriers

    def options(self) -> tuple[str, ...]:
        """Return the compiler's definitions, in the order of the kernel's own list."""
        values = {
            "BITS": self.bits,
            "BLOCKSIZE": self.blocksize,
            "SCALE": self.scale_format,
            "ZEROS": self.zero_bytes,
            "APART": int(self.apart),
            "BF16": int(self.bfloat16),
            "PAIR": int(self.pair),
            "WGMMA": int(self.wgmma),
            "FOLDED": int(self.folded),
            "M_TILES": self.m_tiles,
            "N_TILES": self.n_tiles,
            "K_TILES": self.k_tiles,
            "WARPS_PER_TILE": self.warps_per_tile,
            "STAGES": self.stages,
            "STAGED": int(self.staged),
            "SUM_TILES": self.sum_tiles,
            "BLOCKS_PER_SM": self.blocks_per_sm,
            "SPLIT_K": self.split_k,
        }
        return tuple(f"-D{name}={value}" for name, value in values.items())


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The properties of a GPU that decide a variant.

    Attributes:
        processors: multiprocessors.
        shared: bytes of shared memory that a CTA may have.
        clock: most cycles per second of a multiprocessor; 0 where the driver doesn't say it.
        bandwidth: bytes per second of its memory, by clock and width; likewise.
        wgmma: it has Hopper's instructions for four warps that multiply together; later ones don't.
    """

    processors: int
    shared: int
    clock: float
    bandwidth: float
    wgmma: bool

    @classmethod
    @cache
    def of(cls, index: int) -> Gpu:
        properties = torch.cuda.get_device_properties(index)
        return cls(
            processors=properties.multi_processor_count,
            shared=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
            clock=1e3 * properties.clock_rate,  # it is in kHz
            bandwidth=1e3 * properties.memory_clock_rate * 2 * properties.memory_bus_width / 8,
            wgmma=(properties.major, properties.minor) == (9, 0),
        )


class _Product(NamedTuple):
    """The product that decides a variant, x [m, k] · W [n, k]^T; cheap to make and to look up."""

    bits: int
    blocksize: int
    scale_format: int
    zero_bytes: int
    n: int
    k: int
    m_tiles: int
    bfloat16: bool

    @property
    def row_blocks(self) -> int:
        return -(-self.n // TILE)


def most_rows(gpu: Gpu, *, batch_invariant: bool) -> int:
    """Return how many rows of x one launch takes at most; sums in one order are those of the smaller."""
    return _MOST_M_WGMMA if gpu.wgmma and not batch_invariant else MOST_M


def choose(w: TiledWeight, m: int, dtype: torch.dtype, gpu: Gpu, *, batch_invariant: bool = False) -> Variant:
    """Return the variant for a weight and an x of so many rows.

    Args:
        w: the weight, laid out.
        m: rows of x.
        dtype: of x.
        gpu: where it runs.
        batch_invariant: sums are taken in the same order for any m, at the cost of speed with few rows.
    """
    m_tiles = next(tiles for tiles in _M_TILES if m <= 8 * tiles)
    asked = _Product(w.bits, w.blocksize, w.scale_format, w.zero_bytes, w.n, w.k, m_tiles, dtype == torch.bfloat16)
    return _choose(asked, gpu, batch_invariant)


@cache  # 38 microseconds, which each call of a layer would take
def _choose(p: _Product, gpu: Gpu, batch_invariant: bool) -> Variant:
    if batch_invariant:
        measured = next(_fitting(p._replace(m_tiles=MOST_M // 8), replace(gpu, wgmma=False)))
    else:
        measured = next(_fitting(p, gpu))
    units = -(-p.row_blocks // measured.n_tiles)
    # Units that don't fill the GPU are shared by several CTAs, each with a part of the columns.
    at_once = measured.blocks_per_sm * gpu.processors
    split_k = max(1, min(_MOST_SPLIT_K, at_once // units, p.k // TILE // measured.k_tiles))
    # Each thread copies at least one piece of x.
    warps_per_tile = min(measured.warps_per_tile, max(1, 2 * p.m_tiles // measured.n_tiles))
    return replace(
        measured,
        m_tiles=p.m_tiles,
        # Of more rows that takes longer; and the two ways round differently.
        apart=p.zero_bytes > 0 and p.m_tiles == 1 and not batch_invariant,
        warps_per_tile=warps_per_tile,
        sum_tiles=min(measured.sum_tiles, p.m_tiles),
        split_k=split_k,
    )


def _fitting(p: _Product, gpu: Gpu) -> Iterator[Variant]:
    """Yield the fastest variant first, then what needs less shared memory: unmeasured on GPUs other than Hopper's."""
    if p.zero_bytes or p.scale_format:
        yield from _near_plain(p, gpu)
    first = _tiling(p, gpu)
    smaller = (
        first._replace(
            k_tiles=first.k_tiles // i,
            warps_per_tile=1,
            stages=2,
            staged=False,
            blocks_per_sm=1,
            wgmma=False,
            folded=False,
        )
        for i in (1, 2, 4)
    )
    tilings = [first, *(tiling for tiling in smaller if tiling.k_tiles)]
    for tiling, pair, sum_tiles in product(tilings, (True, False), reversed(_M_TILES)):
        variant = Variant(
            bits=p.bits,
            blocksize=p.blocksize,
            scale_format=p.scale_format,
            zero_bytes=p.zero_bytes,
            apart=False,
            bfloat16=p.bfloat16,
            m_tiles=p.m_tiles,
            # Halves the lookups; a table of larger pairs has no room.
            pair=pair and p.bits <= (4 if tiling.folded else 5),
            split_k=1,
            **tiling._replace(sum_tiles=sum_tiles)._asdict(),
        )
        if sum_tiles <= min(p.m_tiles, tiling.sum_tiles) and _fits(variant, gpu):
            yield variant


def _fits(variant: Variant, gpu: Gpu) -> bool:
    return variant.shared + _STATIC_SHARED <= gpu.shared // variant.blocks_per_sm


def _near_plain(p: _Product, gpu: Gpu) -> Iterator[Variant]:
    """Yield what is nearest to the fastest variant of a plain weight: what more a block has may take a stage's room."""
    blocksize = TILE if p.scale_format else p.blocksize
    plain = next(_fitting(p._replace(zero_bytes=0, scale_format=0, blocksize=blocksize), gpu))
    # Scales of few bits are multiplied into values of 4 bits exactly, and no block needs sums of its own.
    folds = p.scale_format > 0 and p.bits == EXACT_BITS and (p.scale_format == E4M3 or p.m_tiles > 1)
    same = replace(
        plain,
        blocksize=p.blocksize,
        scale_format=p.scale_format,
        zero_bytes=p.zero_bytes,
        folded=plain.folded or folds,
    )
    near = [same, replace(same, stages=max(2, same.stages - 1))]
    if p.scale_format and not same.staged and (same.blocks_per_sm == 1 or p.bits == EXACT_BITS):
        # Codes on their way take registers that scales need too. Of two CTAs of a multiprocessor one is made.
        staged = p.bits != EXACT_BITS or p.scale_format == E4M3 or p.m_tiles == 4
        near.insert(0, replace(same, staged=staged, n_tiles=same.n_tiles * same.blocks_per_sm, blocks_per_sm=1))
    if same.warps_per_tile == 1 and not same.wgmma:
        near.append(replace(same, stages=2, staged=False))
    for variant, sum_tiles in product(near, reversed(_M_TILES)):
        most = min(p.m_tiles, plain.sum_tiles * plain.blocks_per_sm // variant.blocks_per_sm)
        if sum_tiles <= most and _fits(found := replace(variant, sum_tiles=sum_tiles), gpu):
            yield found


class _Tiling(NamedTuple):
    """As in ``Variant``; `sum_tiles` is the most."""

    n_tiles: int
    k_tiles: int
    warps_per_tile: int = 1
    stages: int = 2
    staged: bool = True
    sum_tiles: int = 8
    blocks_per_sm: int = 1
    wgmma: bool = False
    folded: bool = False


def _tiling(p: _Product, gpu: Gpu) -> _Tiling:
    """Return the fastest measured."""
    together = _tiling_together(p, gpu) if gpu.wgmma else None
    if together is not None:
        return together
    processors = gpu.processors
    few = p.row_blocks <= processors // 2  # units of one row block leave half of the GPU free
    if p.m_tiles == 8:
        return _Tiling(1, 6, warps_per_tile=2) if few else _Tiling(2, 3, warps_per_tile=2)
    if few:
        return _tiling_for_few_row_blocks(p.bits, p.m_tiles, p.k)
    if p.m_tiles == 4:
        return _tiling_for_32_rows(p.bits, p.row_blocks > 4 * processors)
    if p.m_tiles == 2:
        return _tiling_for_16_rows(p.bits)
    halves = -(-p.row_blocks // 2) <= processors // 2  # units of two row blocks leave half of the GPU free
    return _tiling_for_8_rows(p.bits, halves)


def _tiling_together(p: _Product, gpu: Gpu) -> _Tiling | None:
    """Return the tiling in which four warps multiply together, or None where each alone is as fast."""
    values = p.n * p.k
    # Folded are float32 values: single ones from 5 bits on, and pairs of fewer, which take twice as long to look up.
    folded = p.bits >= 6 or p.m_tiles == 16
    stages = 2 if p.bits == 5 and not folded else 3  # a large table leaves no room for more
    if p.m_tiles == 16:
        return _Tiling(2, 2, warps_per_tile=2, stages=stages, wgmma=True, folded=folded)
    if p.m_tiles == 8 and folded and values >= _ENOUGH_VALUES:
        return _Tiling(2, 3 if p.bits == 8 else 4, warps_per_tile=2, stages=stages, wgmma=True, folded=True)
    if p.m_tiles == 8 and values >= _LARGE:
        return _Tiling(2, 3, warps_per_tile=2, stages=stages, wgmma=True)
    if p.m_tiles != 4 or p.row_blocks <= gpu.processors or values < (_VERY_LARGE if p.bits in (6, 7) else _LARGE):
        return None
    if p.bits == 8:
        return _Tiling(2, 3, warps_per_tile=2, stages=4, wgmma=True)
    return None if p.bits == 5 else _Tiling(2, 4, warps_per_tile=2, stages=3, wgmma=True)


def _tiling_for_few_row_blocks(bits: int, m_tiles: int, k: int) -> _Tiling:
    """Return what lets several CTAs share each row block of W, with a part of the columns."""
    if bits == 5 and k > 8192:
        return _Tiling(2, 4 if m_tiles == 4 else 8, staged=False)
    if m_tiles == 4:
        return _Tiling(1, 8, staged=bits >= 5)
    if bits == 5:  # two CTAs have no room for a table of pairs, which takes long to make
        return _Tiling(1, 8, staged=False, blocks_per_sm=2)
    if m_tiles == 2:
        return _Tiling(1, 12, staged=bits == 6) if bits <= 4 or bits == 6 else _Tiling(1, 8, staged=False)
    return _Tiling(2, 8, staged=False) if bits <= 5 else _Tiling(1, 12, staged=False)


def _tiling_for_32_rows(bits: int, many_row_blocks: bool) -> _Tiling:
    if bits <= 5:
        return _Tiling(2, 4, staged=False)
    if not many_row_blocks:
        return _Tiling(1, 4, staged=False, blocks_per_sm=2)
    return _Tiling(2, 3, warps_per_tile=2, stages=3) if bits == 8 else _Tiling(2, 6, sum_tiles=1)


def _tiling_for_16_rows(bits: int) -> _Tiling:
    match bits:
        case 4:
            return _Tiling(1, 6, staged=False, blocks_per_sm=2)
        case 7:
            return _Tiling(2, 8)
        case 8:
            return _Tiling(1, 4, staged=False, blocks_per_sm=2)
        case _:
            return _Tiling(2, 6, staged=False)


def _tiling_for_8_rows(bits: int, halves: bool) -> _Tiling:
    if bits in (5, 8):  # large tables leave no room for codes
        return _Tiling(2, 8, staged=False)
    if bits >= 6:
        return _Tiling(1, 8, blocks_per_sm=2) if halves else _Tiling(2, 8, staged=bits == 7)
    # Where several CTAs have a part of the columns each, a shorter way to the first is worth more than many in flight.
    return _Tiling(2, 8, staged=False) if halves else _Tiling(2, 8, stages=3)


def launch_shape(variant: Variant, w: TiledWeight, gpu: Gpu) -> tuple[int, int]:
    """Return (CTAs of a launch, float32 values in which those that share a unit of rows of W leave their sums)."""
    units = -(-w.row_blocks // variant.n_tiles)
    groups = max(1, min(variant.blocks_per_sm * gpu.processors // variant.split_k, units))
    # Equal shares: with as many rounds of units, no multiprocessor has more than it must.
    groups = -(-units // -(-units // groups))
    # Where none share, nothing is read or written there.
    unit_values = variant.m_tiles * 8 * variant.n_tiles * TILE
    sums = units * variant.split_k * unit_values if variant.split_k > 1 else 1
    return groups * variant.split_k, sums


def fused_is_faster(w: TiledWeight, m: int, gpu: Gpu) -> bool:
    """Return whether launches of the fused kernel, one after another, are faster than dequantizing W and cuBLAS.

    The first is work of the multiprocessors, the second bytes: of the codes, and twice of W in 16 bits. So it depends
    on a GPU's memory. What either takes was measured on an H200. On an H100 the answers are those measured there, but
    where both are about as fast; on other GPUs they are a guess.
    """
    if gpu.wgmma:
        return m <= next((rows for values, rows in _MOST_M_FUSED if w.n * w.k >= values), MOST_M)
    launches, values = -(-m // MOST_M), w.n * w.k
    if launches == 1:
        return True
    if launches > _MOST_LAUNCHES or w.k < _ENOUGH_K or values < _ENOUGH_VALUES * (launches - 1):
        return False
    if not (gpu.clock and gpu.bandwidth):
        return False
    variant = choose(w, MOST_M, w.table.dtype, gpu)
    rounds = -(-w.row_blocks // (variant.n_tiles * (launch_shape(variant, w, gpu)[0] // variant.split_k)))
    of_processor = rounds * variant.n_tiles * TILE * w.k / variant.split_k
    cycles = _cycles(w.bits) * _MEASURED_WARPS / variant.warps
    fused = launches * (_launch_seconds(w.bits) + of_processor * cycles / gpu.clock)
    nbytes = (w.bits + 8 * w.block_bytes / w.blocksize) / 8 + 4  # for each value
    each = nbytes / (_REACHED * gpu.bandwidth) + launches * MOST_M * _ROW_SECONDS
    return _GAIN * fused < _DEQUANTIZING_SECONDS + values * each


def _launch_seconds(bits: int) -> float:
    """Return what a launch for 64 rows of x takes besides its work: measured on an H200."""
    return 7e-6 if bits == 5 else 5.6e-6


def _cycles(bits: int) -> float:
    """Return a multiprocessor's cycles for each value of W and 64 rows of x: measured on an H200."""
    return 0.102 if bits <= 4 else 0.113 if bits == 5 else 0.127
