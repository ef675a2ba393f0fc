"""The fused matmul beside cuBLAS in 16 bits, bitsandbytes and the limit; ``python -m kbit.bench --matmul`` prints it.

Medians of CUDA-graph replays of many launches, each on another copy of the weight, so that none is read from the L2.
The limit is what memory allows: a product with few rows reads its weight and hardly anything else, so k bits and an
absmax of 16 bits a block can be 16 / (k + 16 / blocksize) times as fast as 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

import torch
from torch import Tensor

from kbit.blockwise import quantize
from kbit.kernels.matmul import matmul
from kbit.kernels.tiles import TiledWeight, tile
from kbit.spec import QuantSpec

SHAPES: Final = ((16384, 4096), (4096, 16384), (28672, 7168), (49152, 12288), (4096, 4096), (12288, 4096))
"""Rows and columns of W: feed-forward and fused attention layers of models of 7 to 175 billion parameters."""
_ROTATED_BYTES: Final = 200e6
"""Of weights in turn: several times the L2."""
_LEAST_LAUNCHES: Final = 20
_REPLAYS: Final = 15


@dataclass(frozen=True, kw_only=True)
class Row:
    """One product: seconds of ours, of cuBLAS in float16, and of bitsandbytes' nf4 (None where it isn't there)."""

    shape: tuple[int, int]
    bits: int
    rows: int
    seconds: float
    cublas_seconds: float
    peer_seconds: float | None
    nbytes: int

    @property
    def speedup(self) -> float:
        return self.cublas_seconds / self.seconds


def measure(
    shapes: Sequence[tuple[int, int]], bits: Sequence[int], rows: Sequence[int], blocksize: int
) -> Iterator[Row]:
    """Time every combination on the current GPU, float16."""
    for n, k in shapes:
        copies = _copies(2 * n * k)
        plain = [torch.randn(n, k, device="cuda", dtype=torch.float16) for _ in range(copies)]
        cublas = {m: graph_seconds(_plain_product(_x(m, k), plain), copies) for m in rows}
        del plain
        peer = {m: _peer_seconds(n, k, m, blocksize) for m in rows}
        for b in bits:
            weight = torch.randn(n, k, device="cuda", dtype=torch.float16)
            tiled = tile(quantize(weight, QuantSpec(bits=b, dtype="normal", blocksize=blocksize)), torch.float16)
            del weight
            count = _copies(tiled.nbytes)
            weights = [_copy(tiled) for _ in range(count)]
            for m in rows:
                seconds = graph_seconds(_product(_x(m, k), weights), count)
                yield Row(
                    shape=(n, k),
                    bits=b,
                    rows=m,
                    seconds=seconds,
                    cublas_seconds=cublas[m],
                    peer_seconds=peer[m],
                    nbytes=tiled.nbytes,
                )


def graph_seconds(launch: Callable[[int], object], copies: int) -> float:
    """Median seconds of one launch, of graphs that hold many; ``launch`` is told which copy of the weight to take."""
    count = max(copies, _LEAST_LAUNCHES)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for i in range(2):
            launch(i)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(count):
                launch(i % copies)
    times = []
    for _ in range(_REPLAYS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / count)
    return float(median(times[1:]))


def _copies(nbytes: int) -> int:
    return max(2, int(_ROTATED_BYTES // nbytes) + 1)


def _x(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device="cuda", dtype=torch.float16)


def _plain_product(x: Tensor, weights: Sequence[Tensor]) -> Callable[[int], object]:
    y = torch.empty(x.shape[0], weights[0].shape[0], device="cuda", dtype=torch.float16)
    return lambda i: torch.matmul(x, weights[i].T, out=y)


def _product(x: Tensor, weights: Sequence[TiledWeight]) -> Callable[[int], object]:
    return lambda i: matmul(x, weights[i])


def _copy(w: TiledWeight) -> TiledWeight:
    return replace(w, codes=w.codes.clone(), scales=w.scales.clone(), arrived=w.arrived.clone())


def _peer_seconds(n: int, k: int, rows: int, blocksize: int) -> float | None:
    try:
        from bitsandbytes import functional
        from bitsandbytes.autograd._functions import matmul_4bit
    except ImportError:
        return None
    packed, state = functional.quantize_nf4(torch.randn(n, k, device="cuda").half(), blocksize=blocksize)
    x, copies = _x(rows, k), _copies(packed.nbytes)
    weights = [packed.clone() for _ in range(copies)]
    return graph_seconds(lambda i: matmul_4bit(x, weights[i].t(), state), copies)
