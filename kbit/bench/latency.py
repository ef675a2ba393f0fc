"""Time a decode step of an OPT-shaped model by precision: milliseconds per token, memory, size, limit of its bytes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from kbit.bench.decode import Architecture, Compiler, Decoder, plain_linear, random_source
from kbit.bench.matmul import DTYPE
from kbit.bench.report import Record, Table
from kbit.bench.timing import Ceilings, replay_seconds
from kbit.evaluation.decoding import capture
from kbit.packed.linear import KBitLinear
from kbit.quantizer.blockwise import quantize
from kbit.spec import QuantSpec
from kbit.specs.base import BASELINE_BITS

BITS: Final = (8, 6, 5, 4, 3)
COMPILE_MODES: Final = ("default", "max-autotune-no-cudagraphs", "none")
_REPLAYS: Final = 30
_SPARE_BYTES: Final = 3e9
"""Beside the model: torch's context, a layer in 16 bits while it is quantized or checked, workspaces."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The model that is decoded, at every precision.

    Attributes:
        batch: sequences.
        context: tokens in the cache, the step's own included.
    """

    model: Architecture
    blocksize: int
    batch: int
    context: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One precision's decode step.

    Attributes:
        seconds: median of CUDA-graph replays.
        read_bytes: what a step must read: every weight but the position embeddings, and the cache.
        model_bytes: the model without the cache.
        peak_bytes: most that was allocated on the GPU, the cache and the graph's own memory included.
        error: relative Frobenius error of the logits against the same weights dequantized, uncompiled.
    """

    bits: int
    seconds: float
    read_bytes: int
    model_bytes: int
    peak_bytes: int
    error: float


def measure(setting: Setting, bits: Sequence[int], *, compile_mode: str, say: Callable[[str], None]) -> list[Step]:
    """Time 16 bits and ``bits`` on the current GPU; what would not fit its memory is left out, and said."""
    steps, a = [], setting.model
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    for b in (BASELINE_BITS, *bits):
        needed = needed_bytes(setting, b)
        if needed > free:
            say(
                f"{b} bits left out: about {needed / 1e9:.0f} GB of GPU memory are needed, {free / 1e9:.0f} GB are free"
            )
            continue
        say(f"{a.name}, {b} bits: making it")
        model = Decoder(
            a,
            random_source("cuda", torch.float16),
            _linear(b, setting.blocksize),
            batch=setting.batch,
            context=setting.context,
            compiler=compiler(compile_mode),
        )
        say(f"{a.name}, {b} bits: compiling and measuring")
        steps.append(measure_step(model, b, batch=setting.batch, context=setting.context))
        del model
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return steps


@torch.no_grad()
def measure_step(model: Decoder, bits: int, *, batch: int, context: int) -> Step:
    """Capture a step of a model on the current GPU as a graph, time and check it."""
    tokens = torch.arange(batch, device="cuda") + 1
    position = torch.tensor([context - 1], device="cuda")

    def ready() -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    graph, logits = capture(lambda: model(tokens, position), ready=ready)
    seconds = replay_seconds(graph, _REPLAYS)
    peak = torch.cuda.max_memory_allocated()
    expected = model.reference(tokens, position, dequantized)
    error = (logits.float() - expected.float()).norm() / expected.float().norm()
    read, size = sizes(model)
    return Step(bits=bits, seconds=seconds, read_bytes=read, model_bytes=size, peak_bytes=peak, error=float(error))


def sizes(model: Decoder) -> tuple[int, int]:
    """Bytes that a step must read, and bytes of the model without its cache."""
    everything = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in model.in_order())
    return everything - model.positions.nbytes, everything - cache


def needed_bytes(setting: Setting, bits: int) -> float:
    """Return bytes of GPU memory for a precision, estimated before anything is made."""
    a = setting.model
    stored = bits if bits == BASELINE_BITS else bits + 16 / setting.blocksize
    cache = 4.0 * a.layers * setting.batch * setting.context * a.hidden
    return a.linear_weights * stored / 8 + 2 * a.other_parameters + cache + _SPARE_BYTES


def kbit_linear(weight: Tensor, bias: Tensor, *, spec: QuantSpec) -> nn.Module:
    """Return a layer held in k bits."""
    return KBitLinear.from_quantized(quantize(weight, spec), bias=bias)


def dequantized(layer: nn.Module) -> nn.Module:
    """Return a 16-bit layer of the weights that a k-bit one stands for; others as they are."""
    return plain_linear(layer.dequantize(), layer.bias) if isinstance(layer, KBitLinear) else layer


def compiler(mode: str) -> Compiler | None:
    """torch.compile in one of ``COMPILE_MODES``; each piece has to be one graph, of fixed sizes.

    Where the GPU and torch can, a compiled kernel may begin while the one before ends, as the k-bit product may.
    """
    if mode == "none":
        return None
    options = {} if mode == "default" else dict(torch._inductor.list_mode_options(mode))
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
        options.update({name: True for name in torch._inductor.list_options() if name == "triton.enable_pdl"})
    return partial(torch.compile, fullgraph=True, dynamic=False, options=options)


def table(steps: Sequence[Step], setting: Setting, ceilings: Ceilings, *, device: str) -> Table:
    """Return a table of a row per precision."""
    base = next((s for s in steps if s.bits == BASELINE_BITS), None)
    body, records = [], []
    for s in steps:
        least = s.read_bytes / ceilings.bandwidth
        ratio = base.seconds / s.seconds if base else None
        of_bytes = base.read_bytes / s.read_bytes if base else None
        body.append(
            [
                f"{s.bits}" + (" (cuBLAS)" if s.bits == BASELINE_BITS else ""),
                f"{s.seconds * 1e3:.3f}",
                "-" if ratio is None else f"{ratio:.2f}x",
                f"{least * 1e3:.3f}",
                "-" if of_bytes is None else f"{of_bytes:.2f}x",
                f"{least / s.seconds:.0%}",
                f"{s.model_bytes / 1e9:.2f}",
                f"{s.peak_bytes / 1e9:.2f}",
                f"{s.error:.1e}",
            ]
        )
        records.append(_record(s, setting, ratio, least, of_bytes))
    return Table(
        name="decode",
        title=f"A decode step of an {setting.model.name}-shaped model: batch {setting.batch}, {setting.context} tokens "
        f"cached, block {setting.blocksize}; on {device}",
        header=("bits", "ms", "speedup", "limit ms", "limit", "of limit", "size GB", "peak GB", "error"),
        body=body,
        notes=[
            "ms: a step, median of CUDA-graph replays. limit: weights, head and cache read once, at "
            f"{ceilings.bandwidth / 1e9:,.0f} GB/s, the faster of a read and a copy; as a ratio, of bytes alone.",
            "size: the model; peak: all GPU memory allocated in a step. error: of the logits, relative, to the same "
            "weights dequantized and uncompiled. Embeddings and head at 16 bits.",
        ],
        records=records,
    )


def _record(s: Step, setting: Setting, ratio: float | None, least: float, of_bytes: float | None) -> Record:
    blocksize = None if s.bits == BASELINE_BITS else setting.blocksize
    return {
        **{"model": setting.model.name, "bits": s.bits, "blocksize": blocksize},
        **{"batch": setting.batch, "context": setting.context, "seconds": s.seconds, "speedup": ratio},
        **{"limit_seconds": least, "limit": of_bytes, "read_bytes": s.read_bytes, "model_bytes": s.model_bytes},
        **{"peak_bytes": s.peak_bytes, "logits_error": s.error},
    }


def _linear(bits: int, blocksize: int) -> Callable[[Tensor, Tensor], nn.Module]:
    if bits == BASELINE_BITS:
        return plain_linear
    return partial(kbit_linear, spec=QuantSpec(bits=bits, dtype=DTYPE, blocksize=blocksize))
