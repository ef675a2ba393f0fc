"""x · dequantize(W)^T for k-bit weights as they are stored: ``matmul.cu``, its launcher and its choice of shapes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from kbit.kernels.nvrtc import Function, compile_cubin
from kbit.kernels.tiles import TILE, TiledWeight

MOST_ROWS: Final = 64
"""Rows of x that one launch takes."""
_LANES: Final = 32
_STRIDE: Final = 68
_FEWEST_CAPABILITY: Final = (8, 0)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a kernel is compiled for.

    Attributes:
        pair: the codebook is looked up by pairs of codes.
        tiles: rows of x it takes, in eights.
        wr, wk: warps of a CTA: groups of 64 rows of W, times splits of the columns.
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
    ctas: int
    split: int

    @property
    def warps(self) -> int:
        return self.wr * self.wk

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a CTA: the table, the tiles of x in flight, sums over warps."""
        entries = 1 << (2 * self.bits if self.pair else self.bits)
        return entries * _LANES * 4 + self.warps * (2 * self.tiles * 1024 + 8 * _STRIDE * 4)

    def options(self) -> tuple[str, ...]:
        values = {
            "BITS": self.bits,
            "PAIR": int(self.pair),
            "BLOCK": self.blocksize,
            "TILES": self.tiles,
            "BF16": int(self.bfloat16),
            "WR": self.wr,
            "WK": self.wk,
            "DEPTH": 1,
            "MIN_CTAS": self.ctas,
            "SPLIT": self.split,
        }
        return tuple(f"-D{name}={value}" for name, value in values.items())


def choose(w: TiledWeight, rows: int, dtype: torch.dtype, processors: int) -> Variant:
    """The variant for a weight and so many rows of x: measured on an H100 over the shapes of large models."""
    tiles = next(t for t in (1, 2, 4, 8) if rows <= 8 * t)
    # Pairs halve the lookups; the table of 5-bit pairs fills a multiprocessor's shared memory but for small x.
    pair = w.bits <= 4 or (w.bits == 5 and tiles <= 2)
    if w.bits == 5 and pair:
        wr, wk, ctas = (1, 16, 1) if tiles == 1 else (2, 8, 1)
    elif tiles <= 2:
        wr, wk, ctas = 1, 8, 2
    elif tiles == 4:
        wr, wk, ctas = 2, 6, 1
    else:
        wr, wk, ctas = 2, 2, 1
    units = -(-w.rows // (TILE * wr))
    # Units that don't fill the GPU are shared by several CTAs, each with a part of the columns.
    split = max(1, min(8, ctas * processors // units, w.columns // TILE // wk))
    return Variant(
        bits=w.bits,
        blocksize=w.blocksize,
        bfloat16=dtype == torch.bfloat16,
        tiles=tiles,
        pair=pair,
        wr=wr,
        wk=wk,
        ctas=ctas,
        split=split,
    )


def matmul(x: Tensor, w: TiledWeight) -> Tensor:
    """x · W^T, summed in float32, the same bits each time.

    Args:
        x: float16 or bfloat16 [rows, columns], rows 1 to 64, contiguous, on the weight's device; the codebook's dtype.

    Returns:
        x's dtype [rows, W's rows]. A row's result does not depend on the other rows, only on how many eights they are.

    Raises:
        ValueError: x is something else; nothing was launched.
    """
    _check(x, w)
    rows = x.shape[0]
    index = x.device.index or 0
    properties = torch.cuda.get_device_properties(index)
    variant = choose(w, rows, x.dtype, properties.multi_processor_count)
    units = -(-w.rows // (TILE * variant.wr))
    y = torch.empty(rows, w.rows, dtype=x.dtype, device=x.device)
    # Sums of columns that several CTAs share; where none do, nothing is read or written there.
    shared_sums = units * variant.split * variant.tiles * 8 * TILE * variant.wr if variant.split > 1 else 1
    partial = torch.empty(shared_sums, device=x.device)
    groups = max(1, min(variant.ctas * properties.multi_processor_count // variant.split, units))
    # Equal shares: with as many rounds of units, no multiprocessor has more than it must.
    groups = -(-units // -(-units // groups))
    with torch.cuda.device(index):
        _function(variant, index).launch(
            groups * variant.split,
            variant.warps * _LANES,
            *(w.codes, w.scales, w.codebook, x, y, partial, w.arrived, rows, w.rows, w.columns, x.stride(0), w.unscale),
            overlap=(properties.major, properties.minor) >= (9, 0),
        )
    return y


def _check(x: Tensor, w: TiledWeight) -> None:
    if x.dim() != 2 or x.shape[1] != w.columns or not 1 <= x.shape[0] <= MOST_ROWS:
        raise ValueError(f"x is {list(x.shape)}: [1 to {MOST_ROWS}, {w.columns}] is needed")
    if x.dtype != w.codebook.dtype:
        raise ValueError(f"x is {x.dtype}, but the weight was laid out for {w.codebook.dtype}")
    if x.device != w.codes.device or x.device.type != "cuda":
        raise ValueError(f"x is on {x.device} and the weight on {w.codes.device}: both must be on one GPU")
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        raise ValueError("x must be contiguous, its rows at multiples of 16 bytes: call x.contiguous()")
    if torch.cuda.get_device_capability(x.device) < _FEWEST_CAPABILITY:
        raise ValueError("a GPU of compute capability 8.0 or later is needed")


@cache
def _function(variant: Variant, device: int) -> Function:
    source = Path(__file__).with_suffix(".cu").read_text()
    cubin = compile_cubin(source, variant.options(), torch.cuda.get_device_capability(device))
    return Function(cubin, "kbit_matmul", variant.shared)
