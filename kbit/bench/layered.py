"""Run a checkpoint layer by layer beside the whole model: losses, seconds beside reading and computing alone, memory.

One pass over the blocks serves the 16-bit baseline and eight cells, with the GPU's memory limited
(``torch.cuda.set_per_process_memory_fraction``). Then the files are read alone, and each cell runs on the whole model
without the limit, in batches of the same shape. Cold is after the files are dropped from the page cache.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from kbit.bench import loading
from kbit.bench.decode import Architecture
from kbit.bench.report import Record, Table, device_name
from kbit.evaluation.perplexity import PerplexityEval
from kbit.layered.blocks import StreamedBlocks
from kbit.layered.cells import PassCell
from kbit.layered.hollow import Hollow
from kbit.layered.run import LayeredPass
from kbit.layered.states import StatePlace
from kbit.models.architectures import block_layers, decoder_blocks
from kbit.models.checkpoint import model_files, weights_among
from kbit.models.originals import Originals
from kbit.models.quantize import quantize_model
from kbit.models.streaming.reader import THREADS
from kbit.models.streaming.streamed import Streamed, open_streamed
from kbit.quantizer.blockwise import dequantize, quantize
from kbit.spec import QuantSpec, Spec
from kbit.specs.base import BASELINE_BITS

CELLS: Final = (
    *(("int", 4), ("float", 4), ("dynamic", 4), ("normal", 4), ("quantile", 4)),
    *(("float", 3), ("float", 5), ("int", 8)),
)
"""Data types and bits beside the baseline."""
LARGE: Final = Architecture(name="OPT-175B", hidden=12288, ffn=49152, layers=96, heads=96)
"""What the figures are extrapolated to."""
LOSS_TOLERANCE: Final = 1e-5
"""Nats a token."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What runs, and how.

    Attributes:
        directory: the checkpoint.
        device: 'cpu' (float32) or 'cuda' (its own 16 bits).
        tokens: of the text, random ones, in windows of the model's context.
        batch_tokens: tokens in a batch.
        limit: bytes of the GPU that torch may use for the pass; None is all.
    """

    directory: Path
    device: str
    blocksize: int
    tokens: int
    batch_tokens: int
    limit: int | None

    @property
    def specs(self) -> dict[str, Spec]:
        """The cells by their labels, the baseline first."""
        cells = [QuantSpec(bits=bits, dtype=dtype, blocksize=self.blocksize) for dtype, bits in CELLS]
        return {spec.label: spec for spec in (QuantSpec(bits=BASELINE_BITS), *cells)}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the runs gave.

    Attributes:
        layered, whole: nats of each window by cell; ``whole`` is empty where the model doesn't fit whole.
        seconds: of the pass, from opening the files to the last loss.
        wait, quantizing: of these, waiting for blocks, and beginning to quantize.
        reading: seconds of reading the files alone.
        computing: seconds of quantizing and evaluating all cells on the whole model; None where it doesn't fit.
        gpu_peak, host_peak: bytes, of the allocator and beyond what the process had resident.
        states: bytes of hidden states by where they were kept.
        nbytes: of the files.
        largest, hidden: values of the largest block, and its width.
        quantized: weights in the blocks' matrices.
    """

    layered: Mapping[str, np.ndarray[Any, Any]]
    whole: Mapping[str, np.ndarray[Any, Any]]
    seconds: float
    wait: float
    quantizing: float
    reading: float
    computing: float | None
    gpu_peak: int | None
    host_peak: int
    states: Mapping[str, int]
    nbytes: int
    largest: int
    hidden: int
    quantized: int


def measure(setting: Setting, *, say: Callable[[str], None]) -> Table:
    """Run a checkpoint layer by layer and whole.

    Args:
        setting: what and how.
        say: told what is being measured.
    """
    files = weights_among(setting.directory, model_files(setting.directory))
    say("warming up")
    _warm_up(setting)
    say("layer by layer, cold")
    found = _layered(setting, files, say)
    say("reading alone, cold")
    read = loading.Setting(
        directory=setting.directory, spec=QuantSpec(bits=4, dtype="int"), device=setting.device, threads=THREADS
    )
    reading = loading.disk_seconds(files, read, cold=True)
    say("the whole model")
    whole, computing = _whole(setting, say)
    return table(
        Found(
            **found,
            whole=whole,
            computing=computing,
            reading=reading,
            nbytes=sum(file.stat().st_size for file in files),
        ),
        setting,
    )


def _text(setting: Setting, model: Any) -> PerplexityEval:
    length = min(setting.tokens, int(model.config.max_position_embeddings))
    vocabulary = int(model.config.vocab_size)
    ids = np.random.default_rng(0).integers(0, vocabulary, (max(1, setting.tokens // length), length))
    nothing = np.full(len(ids), length, dtype=np.int64)
    return PerplexityEval(windows=ids, window_bytes=nothing, vocab_size=vocabulary, dataset_hash="random")


def _open(setting: Setting) -> Streamed:
    return open_streamed(str(setting.directory), compute_dtype="storage" if setting.device == "cuda" else "float32")


def _layered(setting: Setting, files: Sequence[Path], say: Callable[[str], None]) -> dict[str, Any]:
    loading.drop(files)
    _limit(setting, setting.limit)
    with loading.watched(setting.device) as watched:
        streamed = _open(setting)
        text = _text(setting, streamed.model)
        blocks = StreamedBlocks(streamed, setting.device)
        hollow = Hollow(blocks, name=setting.directory.name)
        calls = hollow.record(lambda: text.run(hollow.model, batch_tokens=setting.batch_tokens))
        cells = [PassCell(key=name, spec=spec, calls=calls) for name, spec in setting.specs.items()]
        one = LayeredPass(blocks=blocks, hollow=hollow, cells=cells, storage_dtype=streamed.loaded.storage_dtype)

        def between(done: int, count: int) -> bool:
            say(f"block {done} of {count}")
            return False

        one.run(between)
        nats = {}
        for cell in cells:
            if cell.error is not None:
                raise cell.error
            with hollow.playing(one.leaving(cell)):
                nats[cell.key] = text.run(hollow.model, batch_tokens=setting.batch_tokens).samples["nats"]
    modules = decoder_blocks(streamed.model)[1]
    assert one.states is not None
    return {
        **watched,
        "layered": nats,
        "wait": one.wait_seconds,
        "quantizing": sum(cell.quantize_seconds for cell in cells),
        "states": {place.value: one.states.bytes_at(place) for place in StatePlace},
        "largest": max(sum(p.numel() for p in module.parameters()) for module in modules),
        "hidden": one.states.shapes[0][-1],
        "quantized": sum(layer.working.numel() for layer in block_layers(streamed.model)),
    }


@torch.no_grad()
def _whole(setting: Setting, say: Callable[[str], None]) -> tuple[dict[str, Any], float | None]:
    """Return each cell's nats on the whole model, and the seconds of quantizing and evaluating all of them."""
    gc.collect()
    _limit(setting, None)
    streamed = _open(setting)
    names = [name for name, _ in streamed.model.named_parameters(remove_duplicate=False)]
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        if 1.3 * streamed.nbytes(names) > torch.cuda.mem_get_info()[0]:
            say("it doesn't fit this GPU")
            return {}, None
    streamed.fill(names, torch.device(setting.device))
    model: Any = streamed.model
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(setting.device)
    text, originals = _text(setting, model), Originals(model=model)
    storage = streamed.loaded.storage_dtype
    nats: dict[str, Any] = {}
    total = 0.0
    # Of the first, what is done once for all cells doesn't count.
    specs = setting.specs
    for number, name in enumerate([list(specs)[1], *specs]):
        _wait(setting)
        began = time.perf_counter()
        quantize_model(model, specs[name], storage_dtype=storage, originals=originals)
        result = text.run(model, batch_tokens=setting.batch_tokens)
        _wait(setting)
        if number:
            nats[name] = result.samples["nats"]
            total += time.perf_counter() - began
            say(f"{name}: {time.perf_counter() - began:.2f} s")
    return nats, total


def _warm_up(setting: Setting) -> None:
    """Compile the kernels that the cells take, for the shapes of the layers; import the model's code."""
    streamed = _open(setting)
    layers = {tuple(layer.working.shape): layer for layer in block_layers(streamed.model)}
    dtype = streamed.compute_dtype
    for shape in layers:
        weight = torch.randn(shape, device=setting.device).to(dtype)
        for spec in setting.specs.values():
            if isinstance(spec, QuantSpec) and not spec.is_baseline:
                dequantize(quantize(weight, spec, storage_dtype=streamed.loaded.storage_dtype))
        nn.functional.linear(torch.zeros(64, shape[1], dtype=dtype, device=setting.device), weight)


def _limit(setting: Setting, limit: int | None) -> None:
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(1.0 if limit is None else min(1.0, limit / total))


def _wait(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()


def table(f: Found, setting: Setting) -> Table:
    """Return a table of a row per cell."""
    body, records = [], []
    windows = next(iter(f.layered.values()))
    scored = setting.tokens // len(windows) - 1
    for name, nats in f.layered.items():
        loss = float(nats.mean()) / scored
        other = f.whole.get(name)
        change = None if other is None else abs(loss - float(other.mean()) / scored)
        same = None if other is None else bool(np.array_equal(nats, other))
        body.append(
            [
                name,
                f"{loss:.6f}",
                "-" if other is None else f"{float(other.mean()) / scored:.6f}",
                "-" if change is None else "0" if change == 0 else f"{change:.1e}",
                "-" if same is None else "yes" if same else "no",
            ]
        )
        records.append(_record(f, name, loss, change, same))
    return Table(
        name="layered",
        title=f"{setting.directory.name} layer by layer, {len(f.layered)} cells on {setting.tokens:,} tokens in one "
        f"pass, on {device_name(setting.device)}"
        + ("" if setting.limit is None else f" limited to {setting.limit / 1e9:.1f} GB"),
        header=("cell", "loss, layer by layer", "loss, whole", "difference", "same bits"),
        body=body,
        notes=[*_figures(f), *_extrapolated(f, setting)],
        records=records,
    )


def _ratio(f: Found) -> float:
    return f.seconds / max(f.reading, f.computing or 0.0)


def _figures(f: Found) -> list[str]:
    computing = "" if f.computing is None else f", computing alone (whole model, all cells) {f.computing:.2f} s"
    gpu = "" if f.gpu_peak is None else f"allocator {f.gpu_peak / 1e9:.3f} GB, "
    kept = ", ".join(f"{nbytes / 1e9:.2f} GB in {place}" for place, nbytes in f.states.items() if nbytes)
    return [
        f"The pass took {f.seconds:.2f} s, cold, from opening the files to the last loss; reading alone "
        f"{f.reading:.2f} s ({f.nbytes / 1e9:.2f} GB, {f.nbytes / f.reading / 1e9:.2f} GB/s){computing}: "
        f"{_ratio(f):.2f} times the larger.",
        f"Of the pass, waiting for blocks {f.wait:.2f} s, beginning to quantize {f.quantizing:.2f} s.",
        f"Peaks: {gpu}host {f.host_peak / 1e9:.3f} GB beyond the process before; hidden states: {kept}.",
    ]


def _extrapolated(f: Found, setting: Setting) -> list[str]:
    """Say what the same pass would take of a far larger model, and how that was found."""
    if f.computing is None:
        return []
    a = LARGE
    nbytes = 2 * (a.linear_weights + a.other_parameters)
    reading = nbytes * f.reading / f.nbytes
    computing = f.computing * a.linear_weights / f.quantized
    hours = max(reading, computing) * _ratio(f) / 3600
    block = 2 * a.linear_weights / a.layers
    cells = len(f.layered)
    states = 2 * cells * setting.tokens * a.hidden
    width = 4 * a.hidden + 3 * a.ffn
    gpu = 3 * block + 2 * (a.other_parameters + setting.batch_tokens * width)
    return [
        f"Extrapolated to {a.name}, the same cells and tokens: {nbytes / 1e9:,.0f} GB to read, {hours:.2f} h, which is "
        f"{_ratio(f):.2f} times the larger of reading at this rate ({reading / 3600:.2f} h) and computing in "
        f"proportion to the weights ({computing / 3600:.2f} h). On the GPU {gpu / 1e9:,.0f} GB (three blocks of "
        f"{block / 1e9:.1f} GB, what lies outside of blocks, a batch of {setting.batch_tokens:,} tokens), "
        f"and {states / 1e9:.1f} GB of hidden states there, on the host or in a file."
    ]


def _record(f: Found, name: str, loss: float, change: float | None, same: bool | None) -> Record:
    return {
        **{"cell": name, "loss": loss, "loss_difference": change, "same_bits": None if same is None else int(same)},
        # What the command fails on.
        "equal": None if change is None else int(change <= LOSS_TOLERANCE),
        **{"seconds": f.seconds, "wait_seconds": f.wait, "reading_seconds": f.reading},
        **{"computing_seconds": f.computing, "ratio": _ratio(f), "gpu_peak_bytes": f.gpu_peak},
        **{"host_peak_bytes": f.host_peak, "bytes": f.nbytes},
        **{f"states_{place.lower().replace(' ', '_')}_bytes": nbytes for place, nbytes in f.states.items()},
    }
