"""x · dequantize(W)^T for k-bit weights as they are stored: the launcher of ``matmul.cu``, and what comes instead."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from kbit.kernels import dense
from kbit.kernels.nvrtc import Function, compile_cubin
from kbit.kernels.tiles import LANES, TILE, TiledWeight, check_tiles
from kbit.kernels.variants import MOST_M, Gpu, Variant, choose, fused_is_faster, launch_shape, most_rows

_FEWEST_CAPABILITY: Final = (8, 0)
"""Asynchronous copies to shared memory, and tensor cores' bfloat16, begin with it."""
_MOST_OFFSET: Final = 2**31
"""Offsets of the fused kernel have 32 bits: in values of x that it reads itself, and in 16 bytes of codes."""
_HEADERS: Final = ("instructions.cuh", "rounding.cuh")
_ARRANGE_THREADS: Final = 256
"""Of a CTA that arranges x, each of which moves 8 values; the kernel has as many."""
_UNTILE_WARPS: Final = 8
"""Warps of a CTA that dequantizes tiles, each a tile at a time; the kernel's launch bound has as many."""
_UNTILE_BLOCKS_PER_SM: Final = 6
"""CTAs of a multiprocessor that dequantize tiles, at most: a warp takes one tile after another."""
_PART_BYTES: Final = 1 << 30
"""About that much of a weight is dequantized at a time. Products with smaller parts are slower than with the whole."""


def matmul(
    x: Tensor,
    w: TiledWeight,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """Return y = x · W^T (+ bias + addend), summed in float32, the same bits each time.

    Up to 64 rows of x, on Hopper 128, are multiplied with the codes as they are stored, and up to 384, some at a time,
    where that is faster (``fused_is_faster``). Else W is dequantized to x's dtype, about 1 GiB at a time, and cuBLAS
    multiplies.

    Args:
        x: float16 or bfloat16 [m, k], m at least 1, contiguous, on the weight's GPU; the table's dtype.
        w: W [n, k].
        bias: of x's dtype [n], contiguous, on the same GPU.
        addend: float32 [m, n], likewise; added before the only rounding.
        batch_invariant: a row of y depends on no other row of x, nor on m. Else it may depend on m.

    Returns:
        y: x's dtype [m, n].

    Raises:
        ValueError: x, bias or addend is something else; nothing was launched.
    """
    check_tiles(w)
    _check(x, w)
    _check_added("bias", bias, x, (w.n,), x.dtype)
    _check_added("addend", addend, x, (x.shape[0], w.n), torch.float32)
    y = torch.empty(x.shape[0], w.n, dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        gpu = Gpu.of(x.device.index)
        if batch_invariant or fused_is_faster(w, x.shape[0], gpu):
            step = most_rows(gpu, batch_invariant=batch_invariant)
            for start in range(0, x.shape[0], step):
                some = slice(start, start + step)
                _fused(x[some], w, bias, None if addend is None else addend[some], y[some], batch_invariant)
        else:
            _by_parts(x, w, bias, addend, y)
    return y


def _fused(
    x: Tensor, w: TiledWeight, bias: Tensor | None, addend: Tensor | None, y: Tensor, batch_invariant: bool
) -> None:
    index, m = x.device.index, x.shape[0]
    gpu = Gpu.of(index)
    variant = choose(w, m, x.dtype, gpu, batch_invariant=batch_invariant)
    ctas, sums = launch_shape(variant, w, gpu)
    partial = torch.empty(sums, dtype=torch.float32, device=x.device)
    overlap = torch.cuda.get_device_capability(index) >= (9, 0)
    stride = x.stride(0) if m > 1 else w.k
    if variant.wgmma:
        arranged = torch.empty(variant.m_tiles * 8 * w.k, dtype=x.dtype, device=x.device)
        ctas_to_arrange = -(-arranged.numel() // (8 * _ARRANGE_THREADS))
        _function("kbit_arrange", variant, index).launch(
            ctas_to_arrange, _ARRANGE_THREADS, x, arranged, m, w.k, stride, overlap=overlap
        )
        x = arranged
    _function("kbit_matmul", variant, index).launch(
        ctas,
        variant.warps * LANES,
        *(
            w.codes,
            w.scales,
            w.codebook if variant.looks_up_floats else w.table,
            x,
            bias,
            addend,
            y,
            partial,
            w.arrived,
            w.unscale,
        ),
        *(m, w.n, w.k, stride),
        overlap=overlap,
    )


def _by_parts(x: Tensor, w: TiledWeight, bias: Tensor | None, addend: Tensor | None, y: Tensor) -> None:
    parts = -(-2 * w.n * w.k // _PART_BYTES)
    step = -(-w.row_blocks // parts)
    part = torch.empty(min(step * TILE, w.n), w.k, dtype=x.dtype, device=x.device)
    for first in range(0, w.row_blocks, step):
        start, stop = first * TILE, min((first + step) * TILE, w.n)
        dequantize_rows(w, first, part[: stop - start])
        added = None if bias is None else bias[start:stop]
        dense.product(
            x, part[: stop - start], added, None if addend is None else addend[:, start:stop], y[:, start:stop]
        )


def dequantize_rows(w: TiledWeight, first: int, out: Tensor) -> None:
    """Fill out, 16-bit [some of n, k] on the weight's GPU, with the rows of W from row block `first` on.

    Codebook value (less the zero point) times absmax in float32, rounded once: to the bit what ``kbit.dequantize``
    gives.
    """
    index = out.device.index
    tiles = -(-out.shape[0] // TILE) * (w.k // TILE)
    grid = min(-(-tiles // _UNTILE_WARPS), Gpu.of(index).processors * _UNTILE_BLOCKS_PER_SM)
    # The kernel leaves out rows beyond the last of the weight, not of `out`: that ends with it, or at a row block.
    _untile(w.bits, w.blocksize, w.scale_format, w.zero_bytes, out.dtype == torch.bfloat16, index).launch(
        *(grid, _UNTILE_WARPS * LANES, w.codes, w.scales, w.tensor_scale, w.codebook),
        *(out, first, tiles, w.n, w.k),
    )


def _check(x: Tensor, w: TiledWeight) -> None:
    if x.dim() != 2 or x.shape[1] != w.k or x.shape[0] < 1:
        raise ValueError(f"x is {list(x.shape)}: [at least 1, {w.k}] is needed")
    if x.dtype != w.table.dtype:
        raise ValueError(f"x is {x.dtype}, but the weight was laid out for {w.table.dtype}")
    apart = x.stride(0) if x.shape[0] > 1 else x.shape[1]
    if MOST_M * apart > _MOST_OFFSET or w.codes.numel() // 4 > _MOST_OFFSET:
        raise ValueError(
            f"x's rows are {apart:,} values apart, and the codes take {w.codes.nbytes:,} bytes: the kernel has "
            f"offsets for {_MOST_OFFSET // MOST_M:,} and {16 * _MOST_OFFSET:,}; x.contiguous() brings rows together"
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
def _function(name: str, variant: Variant, device: int) -> Function:
    return Function(_cubin(variant, device), name, variant.shared if name == "kbit_matmul" else 0, device)


@cache
def _cubin(variant: Variant, device: int) -> bytes:
    return _compiled("matmul.cu", variant.options(), device)


@cache
def _untile(bits: int, blocksize: int, scale_format: int, zero_bytes: int, bfloat16: bool, device: int) -> Function:
    values = {
        "BITS": bits,
        "BLOCKSIZE": blocksize,
        "SCALE": scale_format,
        "ZEROS": zero_bytes,
        "BF16": int(bfloat16),
    }
    options = tuple(f"-D{name}={value}" for name, value in values.items())
    return Function(_compiled("untile.cu", options, device), "kbit_untile", 0, device)


def _compiled(name: str, options: tuple[str, ...], device: int) -> bytes:
    source, *headers = (Path(__file__).with_name(file).read_text() for file in (name, *_HEADERS))
    capability = torch.cuda.get_device_capability(device)
    return compile_cubin(source, options, capability, dict(zip(_HEADERS, headers, strict=True)))
