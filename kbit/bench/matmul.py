"""The product x · W^T: ours of k-bit weights as they are stored, cuBLAS in float16, bitsandbytes, and the limit.

The limit is what memory allows: a product with few rows reads its weight and hardly anything else, so k bits and an
absmax of 16 bits per block can be 16 / (k + 16 / blocksize) times as fast as 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from kbit.bench.report import Record, Table
from kbit.bench.timing import call_seconds, copies_of, graph_seconds
from kbit.kernels.matmul import matmul
from kbit.kernels.tiles import BLOCKSIZES, TILE, TiledWeight, tile
from kbit.quantizer.block_float import BlockFloatTensor, quantize_block_float
from kbit.quantizer.blockwise import QuantizedTensor, quantize
from kbit.quantizer.hqq import as_blockwise, quantize_hqq
from kbit.spec import QuantSpec
from kbit.specs.base import BASELINE_BITS
from kbit.specs.block_float import FORMATS, SCALE_BITS, BlockFloatSpec
from kbit.specs.hqq import HqqSpec

Shape = tuple[int, int]

SHAPES: Final[tuple[Shape, ...]] = (
    (16384, 4096),
    (4096, 16384),
    (28672, 7168),
    (49152, 12288),
    (4096, 4096),
    (12288, 4096),
)
"""Rows and columns of W: feed-forward and fused attention layers of models of 7 to 175 billion parameters."""
DTYPE: Final = "normal"
"""Data type of the codes. Which one doesn't matter to the kernel: it looks every value up."""
_STRIP_ROWS: Final = 1024
_LAYOUTS: Final = 5
OURS: Final = "kbit"
ZEROS: Final = {"zero points": 8, "HQQ": 16}
"""Ours of weights with zero points, and the bits of one as it is read."""
FLOATS: Final = tuple(FORMATS)
"""Ours of block-scaled floats, each of its own bits."""
CUBLAS: Final = "cuBLAS"
PEERS: Final = {"bnb nf4": 4, "bnb fp4": 4, "bnb 8-bit": 8}


@dataclass(frozen=True, kw_only=True)
class Product:
    """One product, measured: ``rows`` rows of x, ``shape`` [N, K] of W, whose ``nbytes`` are read."""

    kernel: str
    bits: int
    shape: Shape
    rows: int
    seconds: float
    nbytes: int

    @property
    def flops(self) -> float:
        """Floating-point operations a second."""
        return 2 * self.rows * self.shape[0] * self.shape[1] / self.seconds

    @property
    def moved(self) -> int:
        """Bytes that must be moved: the weight as it is stored, x and the product."""
        return self.nbytes + 2 * self.rows * sum(self.shape)

    @property
    def intensity(self) -> float:
        """Floating-point operations a byte moved."""
        return 2 * self.rows * self.shape[0] * self.shape[1] / self.moved

    @property
    def label(self) -> str:
        of_kernel = {OURS: f"k={self.bits}"} | {name: f"k={self.bits}, {name}" for name in (*ZEROS, *FLOATS)}
        return of_kernel.get(self.kernel, self.kernel)

    def record(self) -> dict[str, str | int | float | None]:
        n, k = self.shape
        return {
            **{"kernel": self.kernel, "bits": self.bits, "n": n, "k": k, "rows": self.rows, "seconds": self.seconds},
            **{"weight_bytes": self.nbytes, "moved_bytes": self.moved, "flop_per_byte": self.intensity},
            **{"flops": self.flops, "bytes_per_second": self.moved / self.seconds},
        }


@dataclass(frozen=True, kw_only=True)
class _Contender:
    """A kernel with the copies of a weight that it takes in turn; ``nbytes`` of one."""

    kernel: str
    bits: int
    weights: Sequence[Any]
    nbytes: int
    product: Callable[[Tensor, Any], object]


def check_shape(shape: Shape, blocksize: int) -> None:
    """
    Raises:
        ValueError: the fused kernel takes no such weight or block size.
    """
    n, k = shape
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"--blocksize {blocksize}: the fused kernel takes {', '.join(map(str, BLOCKSIZES))}")
    if n < 1 or k < 1 or k % math.lcm(TILE, blocksize):
        raise ValueError(
            f"--shapes {n}x{k}: W is ROWSxCOLUMNS, its columns a multiple of {math.lcm(TILE, blocksize)} "
            f"(tiles of {TILE}, blocks of {blocksize}), such as 16384x4096"
        )


def measure(
    shapes: Sequence[Shape],
    bits: Sequence[int],
    rows: Sequence[int],
    blocksize: int,
    *,
    also: Collection[str] = (),
    say: Callable[[str], None],
) -> list[Product]:
    """Time every combination on the current GPU, float16: ours, cuBLAS, and those of other names that `also` has."""
    kinds = (OURS, *(name for name in (*ZEROS, *FLOATS) if name in also))
    found: list[Product] = []
    for shape in shapes:
        makers: list[Callable[[], _Contender | None]] = [partial(_cublas, shape)]
        makers += [
            partial(_ours, shape, b, blocksize, kind)
            for b in bits
            for kind in kinds
            if kind not in FLOATS or FORMATS[kind].bits == b
        ]
        makers += [partial(_peer, shape, name, blocksize) for name in PEERS if name in also]
        for make in makers:
            try:
                contender = make()
            except ValueError as error:  # bitsandbytes takes few block sizes
                say(f"{shape[0]}x{shape[1]}: a peer is left out: {error}")
                continue
            if contender is not None:
                say(f"{shape[0]}x{shape[1]}: {contender.kernel}, {contender.bits} bits")
                found += _products(contender, shape, rows)
            del contender  # its weights, before the next ones are made
        torch.cuda.empty_cache()
    return found


def _products(contender: _Contender, shape: Shape, rows: Sequence[int]) -> Iterator[Product]:
    for m in rows:
        x = torch.randn(m, shape[1], device="cuda", dtype=torch.float16)
        seconds = graph_seconds(
            lambda i, x=x: contender.product(x, contender.weights[i]),  # type: ignore[misc]
            len(contender.weights),
        )
        yield Product(
            kernel=contender.kernel,
            bits=contender.bits,
            shape=shape,
            rows=m,
            seconds=seconds,
            nbytes=contender.nbytes,
        )


def _random(n: int, k: int) -> Tensor:
    return torch.randn(n, k, device="cuda", dtype=torch.float16)


def _cublas(shape: Shape) -> _Contender:
    nbytes = 2 * shape[0] * shape[1]
    weights = [_random(*shape) for _ in range(copies_of(nbytes))]
    return _Contender(
        kernel=CUBLAS, bits=BASELINE_BITS, weights=weights, nbytes=nbytes, product=lambda x, w: torch.matmul(x, w.T)
    )


def _ours(shape: Shape, bits: int, blocksize: int, kind: str) -> _Contender:
    n, k = shape
    strip = math.gcd(n, _STRIP_ROWS)
    strip = n if strip % TILE else strip
    spec = QuantSpec(bits=bits, dtype=DTYPE, blocksize=blocksize)
    q: QuantizedTensor | BlockFloatTensor
    if kind == OURS:
        q = quantize(_random(strip, k), spec)
    elif kind in FLOATS:
        q = quantize_block_float(_random(strip, k), BlockFloatSpec(format=kind))
    elif kind == "HQQ":
        q = as_blockwise(quantize_hqq(_random(strip, k), HqqSpec(bits=bits, blocksize=blocksize)))
    else:
        q = quantize(_random(strip, k), replace(spec, dtype="int", zero_point=True))
    weight = repeated(tile(q, torch.float16), n // strip)
    weights = [repeated(weight, 1) for _ in range(copies_of(weight.nbytes))]
    return _Contender(kernel=kind, bits=bits, weights=weights, nbytes=weight.nbytes, product=matmul)


def repeated(w: TiledWeight, times: int) -> TiledWeight:
    """Return the weight ``times`` below itself, in fresh memory: a large one costs no more to make than a small one."""
    return replace(
        w,
        codes=w.codes.repeat(times, 1, 1, 1),
        scales=torch.cat([w.scales.view(torch.uint8)] * times).view(w.scales.dtype),
        arrived=w.arrived.repeat(times),
        n=w.n * times,
    )


def _peer(shape: Shape, name: str, blocksize: int) -> _Contender | None:
    """bitsandbytes. Its 8-bit codebook has no product of its own: it is dequantized, and cuBLAS does the rest."""
    try:
        from bitsandbytes import functional as bnb
        from bitsandbytes.autograd._functions import matmul_4bit
    except ImportError:
        return None
    if PEERS[name] == 4:
        packed, state = bnb.quantize_4bit(_random(*shape), blocksize=blocksize, quant_type=name.split()[-1])
    else:
        packed, state = bnb.quantize_blockwise(_random(*shape), blocksize=blocksize)
    weights = []
    nbytes = packed.nbytes + state.absmax.nbytes
    for _ in range(copies_of(nbytes)):
        own = copy(state)
        own.absmax = state.absmax.clone()
        weights.append((packed.clone(), own))

    def product(x: Tensor, weight: tuple[Tensor, Any]) -> object:
        if PEERS[name] == 4:
            return matmul_4bit(x, weight[0].t(), weight[1])
        return torch.matmul(x, bnb.dequantize_blockwise(*weight).T)

    return _Contender(kernel=name, bits=PEERS[name], weights=weights, nbytes=nbytes, product=product)


def layout_cost(shape: Shape, bits: int, blocksize: int) -> str:
    """Return what laying a quantized weight out for the kernel costs, once, in words."""
    q = quantize(_random(*shape), QuantSpec(bits=bits, dtype=DTYPE, blocksize=blocksize))
    seconds = call_seconds(lambda: tile(q, torch.float16), repeats=_LAYOUTS, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    nbytes = tile(q, torch.float16).nbytes
    work = torch.cuda.max_memory_allocated() - before - nbytes
    return (
        f"Laying out a {shape[0]} x {shape[1]} weight of {bits} bits, once: {seconds * 1e3:.1f} ms; "
        f"{nbytes / 1e6:.1f} MB, and {work / 1e6:.1f} MB while at it."
    )


def table(found: Sequence[Product], blocksize: int, device: str, notes: Sequence[str] = ()) -> Table:
    """Return one row per shape and number of rows of x: microseconds, and the speedup over cuBLAS in float16."""
    by_place = {(p.shape, p.rows, p.label): p for p in found}
    labels = list(dict.fromkeys(p.label for p in found if p.kernel != CUBLAS))
    limits = {p.label: _limit(p, blocksize) for p in found}
    body = [["limit", "", "", *(f"{at_most:.2f}x" if (at_most := limits[name]) else "" for name in labels)]]
    for shape, rows in dict.fromkeys((p.shape, p.rows) for p in found):
        base = by_place[shape, rows, CUBLAS]
        cells = [f"{shape[0]} x {shape[1]}", str(rows), f"{base.seconds * 1e6:,.1f}"]
        body.append(cells + [_cell(by_place.get((shape, rows, name)), base) for name in labels])
    return Table(
        name="matmul",
        title=f"x W^T in us, and times as fast as cuBLAS float16; block {blocksize}, on {device}",
        header=("W (N x K)", "rows of x", CUBLAS, *labels),
        body=body,
        notes=[
            f"limit: 16 / (k + 16/{blocksize}), of bytes alone; zero points are more, MX formats and NVFP4 have blocks "
            "of their own. bnb: bitsandbytes; its 8-bit codebook has no fused product: dequantized, then cuBLAS. "
            "Medians of CUDA-graph replays; every launch reads another copy of W.",
            *notes,
        ],
        records=[_record(p, by_place[p.shape, p.rows, CUBLAS], blocksize) for p in found],
    )


def limit(bits: int, blocksize: int, zero_bits: int = 0) -> float:
    """Return how many times as fast as 16 bits the bytes of a weight alone allow, with zero points of so many bits."""
    return BASELINE_BITS / (bits if bits == BASELINE_BITS else bits + (16 + zero_bits) / blocksize)


def _limit(product: Product, blocksize: int) -> float | None:
    """Return that of one of our kernels, None for others."""
    if product.kernel in FLOATS:
        return BASELINE_BITS / (product.bits + SCALE_BITS / FORMATS[product.kernel].block)
    zero_bits = {OURS: 0, **ZEROS}.get(product.kernel)
    return None if zero_bits is None else limit(product.bits, blocksize, zero_bits)


def _cell(product: Product | None, base: Product) -> str:
    if product is None:
        return "-"
    return f"{product.seconds * 1e6:,.1f}\n{base.seconds / product.seconds:.2f}x"


def _record(p: Product, base: Product, blocksize: int) -> Record:
    ratios = {"speedup": base.seconds / p.seconds, "limit": _limit(p, blocksize)}
    own = FORMATS[p.kernel].block if p.kernel in FLOATS else blocksize
    return {**p.record(), **ratios, "blocksize": None if p.kernel == CUBLAS else own}
