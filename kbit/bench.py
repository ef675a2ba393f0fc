"""``python -m kbit.bench``: how fast the quantizers are here, beside bitsandbytes and the limit, all from one run.

With ``--matmul``, on an NVIDIA GPU, the fused product of k-bit weights instead (kbit.kernels).

The limit is what memory allows: a quantizer has to read 2 bytes a weight and write its codes and absmax, so it can't be
faster than a copy of as many bytes. Figures are medians; ratios are to the limit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from kbit import QuantSpec, dequantize, quantize
from kbit.blockwise import QuantizedTensor


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one operation on ``weights`` weights, which moves ``nbytes`` at least."""

    seconds: float
    weights: int
    nbytes: float

    @property
    def rate(self) -> float:
        """Million weights a second."""
        return self.weights / self.seconds / 1e6


def measure(operation: Callable[[], object], *, repeats: int, device: str) -> float:
    """Median seconds of ``repeats`` calls, after one that warms up."""
    operation()
    times = []
    for _ in range(repeats):
        _synchronize(device)
        began = time.perf_counter()
        operation()
        _synchronize(device)
        times.append(time.perf_counter() - began)
    return median(times)


def copy_rate(numel: int, *, repeats: int, device: str) -> float:
    """Bytes a second, read plus written, of copying ``numel`` float16 values: the limit."""
    source = torch.zeros(numel, dtype=torch.float16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure(lambda: target.copy_(source), repeats=repeats, device=device)


def bench(weight: torch.Tensor, spec: QuantSpec, *, repeats: int) -> tuple[Timing, Timing]:
    """Our quantize (with packing) and dequantize (with unpacking)."""
    device = weight.device.type
    packed: QuantizedTensor = quantize(weight, spec)
    nbytes = weight.nbytes + packed.nbits / 8
    seconds = (
        measure(partial(quantize, weight, spec), repeats=repeats, device=device),
        measure(partial(dequantize, packed), repeats=repeats, device=device),
    )
    first, second = (Timing(seconds=s, weights=weight.numel(), nbytes=nbytes) for s in seconds)
    return first, second


def bench_peer(weight: torch.Tensor, blocksize: int, *, repeats: int) -> tuple[Timing, Timing] | None:
    """bitsandbytes' 8-bit block-wise quantizer with its own map; None where it isn't installed."""
    try:
        from bitsandbytes import functional as bnb
    except ImportError:
        return None
    device = weight.device.type
    quantized, state = bnb.quantize_blockwise(weight, blocksize=blocksize)
    nbytes = weight.nbytes + quantized.nbytes + state.absmax.nbytes
    seconds = (
        measure(lambda: bnb.quantize_blockwise(weight, blocksize=blocksize), repeats=repeats, device=device),
        measure(lambda: bnb.dequantize_blockwise(quantized, state), repeats=repeats, device=device),
    )
    first, second = (Timing(seconds=s, weights=weight.numel(), nbytes=nbytes) for s in seconds)
    return first, second


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=4096, help="weight matrix of ROWS x 4096 (default 4096)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads on a CPU (default 1: a core's figure)")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 8])
    parser.add_argument("--dtypes", nargs="+", default=["int", "float", "quantile"])
    parser.add_argument("--blocksize", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--matmul", action="store_true", help="the fused product with 1, 16 and 32 rows of x, on a GPU")
    args = parser.parse_args()
    if args.matmul:
        _matmul(parser, args.bits, args.blocksize)
        return
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(args.rows, 4096, generator=generator).to(torch.float16).to(args.device)
    limit = copy_rate(weight.numel(), repeats=args.repeats, device=args.device)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} thread(s)"
    table = Table(
        title=f"million weights a second, {args.rows} x 4096 float16, block {args.blocksize}, on {where}; "
        f"limit: a copy at {limit / 1e9:.1f} GB/s read and written"
    )
    for name in ("", "quantize", "of the limit", "dequantize", "of the limit"):
        table.add_column(name, justify="left" if not name else "right")
    for dtype in args.dtypes:
        for bits in args.bits:
            spec = QuantSpec(bits=bits, dtype=dtype, blocksize=args.blocksize)
            _add(table, spec.label, bench(weight, spec, repeats=args.repeats), limit)
    peer = bench_peer(weight, args.blocksize, repeats=args.repeats)
    if peer is not None:
        _add(table, "bitsandbytes, 8 bits", peer, limit)
    Console().print(table)


def _matmul(parser: argparse.ArgumentParser, bits: list[int], blocksize: int) -> None:
    if not torch.cuda.is_available():
        parser.error("--matmul needs an NVIDIA GPU, and torch sees none here")
    from kbit.kernels.bench import SHAPES
    from kbit.kernels.bench import measure as measure_matmul

    table = Table(title=f"x W^T, float16 x, block {blocksize}, on {torch.cuda.get_device_name()}; speedups over cuBLAS")
    names = ("W", "bits", "rows of x", "us", "cuBLAS us", "speedup", "limit", "nf4 of bitsandbytes", "GB/s")
    for name in names:
        table.add_column(name, justify="right")
    with Console(stderr=True).status("measuring") as status:
        for row in measure_matmul(SHAPES, bits, (1, 16, 32), blocksize):
            n, k = row.shape
            status.update(f"measuring {n} x {k}, {row.bits} bits")
            peer = "-" if row.peer_seconds is None else f"{row.cublas_seconds / row.peer_seconds:.2f}"
            numbers = (f"{row.seconds * 1e6:.1f}", f"{row.cublas_seconds * 1e6:.1f}", f"{row.speedup:.2f}")
            limit = f"{16 / (row.bits + 16 / blocksize):.2f}"
            rate = f"{row.nbytes / row.seconds / 1e9:,.0f}"
            table.add_row(f"{n} x {k}", str(row.bits), str(row.rows), *numbers, limit, peer, rate)
    Console().print(table)


def _add(table: Table, name: str, timings: tuple[Timing, Timing], limit: float) -> None:
    cells = [name]
    for timing in timings:
        share = timing.nbytes / timing.seconds / limit
        cells += [f"{timing.rate:,.0f}", f"{share:.1%}"]
    table.add_row(*cells)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
