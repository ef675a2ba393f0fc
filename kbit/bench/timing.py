"""Seconds of operations, and what this machine can do at most: medians, on a GPU of CUDA-graph replays."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Final

import torch

_ROTATED_BYTES: Final = 200e6
"""Of weights in turn: several times the L2, so that none is read from there."""
_GRAPH_SECONDS: Final = 5e-3
_LAUNCHES: Final = (4, 100)
_REPLAYS: Final = 11
_CALLS: Final = 10
"""GPU calls between two events: what Python does for one is hidden behind the one before."""
_SLOW: Final = 0.05
"""Seconds of a call that is long enough to be timed alone."""
_WARM_SECONDS: Final = 0.25
"""Of calls before any is timed: Python's part of the first tens is slower."""
_LARGE: Final = 2**28
"""Values that are copied and read for the ceilings: 512 MB in float16."""
_SQUARE: Final = 8192
"""Side of the matrices whose product stands for the most that cuBLAS reaches."""
_CPU_SQUARE: Final = 2048


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The measured limits of a GPU.

    Attributes:
        copy: bytes per second of a copy on the device, read plus written.
        read: bytes per second of the faster of a sum and a matrix-vector product in cuBLAS, which hardly write.
        flops: floating-point operations per second of a large float16 product of cuBLAS.
    """

    copy: float
    read: float
    flops: float

    @property
    def bandwidth(self) -> float:
        """Bytes a second: the faster of the two, the memory roof."""
        return max(self.copy, self.read)


def measure_ceilings() -> Ceilings:
    """On the current GPU; takes 2 GB of its memory."""
    square = torch.randn(2, _SQUARE, _SQUARE, device="cuda", dtype=torch.float16)
    product = torch.empty(_SQUARE, _SQUARE, device="cuda", dtype=torch.float16)
    seconds = graph_seconds(lambda _: torch.matmul(square[0], square[1], out=product), 1)
    return Ceilings(copy=copy_rate(_LARGE, device="cuda"), read=read_rate(), flops=2 * _SQUARE**3 / seconds)


def cpu_flops() -> float:
    """Floating-point operations a second of a large float32 product on this CPU, with torch's threads."""
    square = torch.randn(2, _CPU_SQUARE, _CPU_SQUARE)
    seconds = call_seconds(lambda: square[0] @ square[1], device="cpu", repeats=_REPLAYS)
    return 2 * _CPU_SQUARE**3 / seconds


def read_rate() -> float:
    """Bytes a second that the current GPU reads."""
    values = torch.randn(_LARGE, device="cuda", dtype=torch.float16)
    matrix, vector = values.view(-1, _SQUARE), values[:_SQUARE]
    total, product = torch.empty((), device="cuda"), torch.empty(matrix.shape[0], device="cuda", dtype=torch.float16)
    terms = torch.randn(_LARGE // 2, device="cuda")
    seconds = min(
        graph_seconds(lambda _: torch.sum(terms, 0, out=total), 1),
        graph_seconds(lambda _: torch.mv(matrix, vector, out=product), 1),
    )
    return values.nbytes / seconds


def copy_rate(numel: int, *, device: str, repeats: int = _REPLAYS) -> float:
    """Bytes a second, read plus written, of copying ``numel`` float16 values.

    On a GPU by adding zero to them: in a graph a plain copy is slower than elsewhere, on an H200 2,700 of 4,200 GB/s.
    """
    source = torch.zeros(numel, dtype=torch.float16, device=device)
    target = torch.empty_like(source)
    if device == "cpu":
        seconds = call_seconds(lambda: target.copy_(source), device=device, repeats=repeats)
    else:
        seconds = graph_seconds(lambda _: torch.add(source, 0, out=target), 1)
    return 2 * source.nbytes / seconds


def call_seconds(operation: Callable[[], object], *, device: str, repeats: int) -> float:
    """Median seconds of a call over ``repeats`` turns, after others that warm up; on a GPU a turn is several calls."""
    began = time.perf_counter()
    while time.perf_counter() - began < _WARM_SECONDS:
        operation()
        if device != "cpu":
            torch.cuda.synchronize()
    times = []
    if device == "cpu":
        for _ in range(repeats):
            began = time.perf_counter()
            operation()
            times.append(time.perf_counter() - began)
        return float(median(times))
    calls = 1
    for _ in range(repeats + 1):
        with _Stopwatch() as watch:
            for _ in range(calls):
                operation()
        times.append(watch.seconds / calls)
        calls = _CALLS if times[0] < _SLOW else 1
    return float(median(times[1:]))


def graph_seconds(launch: Callable[[int], object], copies: int) -> float:
    """Median seconds of one launch, of graphs that hold many.

    Args:
        launch: is told which copy of the weight to take, 0 to ``copies`` - 1.
        copies: how many there are (``copies_of``); a graph takes each at least once.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch(0)
        with _Stopwatch() as watch:
            for i in range(3):
                launch(i % copies)
        fewest, most = _LAUNCHES
        count = max(copies, min(most, max(fewest, int(_GRAPH_SECONDS * 3 / watch.seconds))))
        with torch.cuda.graph(graph, stream=stream):
            for i in range(count):
                launch(i % copies)
    return replay_seconds(graph, _REPLAYS) / count


def replay_seconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Median seconds of a replay, after two that warm up."""
    times = []
    for _ in range(replays + 2):
        with _Stopwatch() as watch:
            graph.replay()
        times.append(watch.seconds)
    return float(median(times[2:]))


def copies_of(nbytes: int) -> int:
    """Return how many copies of a weight are taken in turn."""
    return max(2, int(_ROTATED_BYTES // nbytes) + 1)


class _Stopwatch:
    """Seconds that the current stream takes for what is launched within."""

    seconds = 0.0

    def __enter__(self) -> _Stopwatch:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._begin.record()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.record()
        self._end.synchronize()
        self.seconds = self._begin.elapsed_time(self._end) / 1e3
