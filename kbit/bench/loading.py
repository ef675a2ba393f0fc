"""Load a checkpoint into k bits: peak of the GPU's allocator, peak of the host's memory, rate beside the disk's own.

The disk's rate is that of reading the same files with as many threads into as many page-locked chunks, without anything
else. Cold is after the files are dropped from the page cache (posix_fadvise, POSIX_FADV_DONTNEED), warm is straight
after. The peer, transformers with bitsandbytes, is measured in the same way; its mapped files count as host memory.
"""

from __future__ import annotations

import gc
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from kbit.bench.report import Record, Table, device_name
from kbit.models.checkpoint import model_files, weights_among
from kbit.models.streaming import reader
from kbit.models.streaming.packing import Packing
from kbit.models.streaming.streamed import open_streamed
from kbit.packed.linear import KBitLinear
from kbit.quantizer.blockwise import quantize
from kbit.spec import QuantSpec

COLD, WARM = "cold", "warm"
_ROUNDS: Final = 2
"""Times that the disk is read alone, before and after ours: the faster one counts."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is loaded, and how.

    Attributes:
        directory: the checkpoint.
        device: 'cpu' or 'cuda'.
        threads: that read.
    """

    directory: Path
    spec: QuantSpec
    device: str
    threads: int


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one loading took.

    Attributes:
        who: ours, or the peer.
        cache: cold or warm.
        seconds: from the call to the last kernel's end.
        open_seconds: of these, until the model without weights was there.
        disk_seconds: of reading the same files alone.
        gpu_peak: bytes, of the allocator; None on a CPU.
        gpu_held: bytes that the model holds there afterwards.
        host_peak: bytes beyond what the process had resident before, page-locked chunks included.
        locked: of these, page-locked.
        equal: codes and bits are those of weights that safetensors read; None where it wasn't looked at.
    """

    who: str
    cache: str
    seconds: float
    open_seconds: float
    disk_seconds: float
    gpu_peak: int | None
    gpu_held: int
    host_peak: int
    locked: int
    equal: bool | None


def measure(setting: Setting, *, say: Callable[[str], None]) -> Table:
    """Load a checkpoint cold and warm, and read its files alone; and the peer where it can be imported.

    Args:
        setting: what and how.
        say: told what is being measured.
    """
    files = weights_among(setting.directory, model_files(setting.directory))
    nbytes = sum(file.stat().st_size for file in files)
    say("a first time, which imports the model's code and compiles kernels")
    _load(setting, WARM, files, is_last=False)
    found, notes = [], []
    for cache in (COLD, WARM):
        say(f"{cache}: the disk alone")
        alone = [disk_seconds(files, setting, cold=cache == COLD)]
        say(f"{cache}: ours")
        ours = _load(setting, cache, files, is_last=cache == WARM)
        for _ in range(_ROUNDS - 1):
            say(f"{cache}: the disk alone once more")
            alone.append(disk_seconds(files, setting, cold=cache == COLD))
        notes.append(f"{cache}: the disk alone at " + " and ".join(f"{nbytes / s / 1e9:.2f} GB/s" for s in alone))
        found.append(Load(**{**ours, "disk_seconds": min(alone)}))
    for load in tuple(found):
        say(f"{load.cache}: transformers and bitsandbytes")
        peer = _peer(setting, load.cache, files, load.disk_seconds)
        if isinstance(peer, str):
            notes.append(peer)
            break
        found.append(peer)
    return table(found, setting, nbytes, notes)


def disk_seconds(files: Sequence[Path], setting: Setting, *, cold: bool) -> float:
    """Return the seconds of reading files alone, with the threads and chunks that ours has."""
    if cold:
        drop(files)
    pieces = iter([(f, p) for f in files for p in range(0, f.stat().st_size, reader.CHUNK)])
    opened = {file: os.open(file, os.O_RDONLY) for file in files}
    for number in opened.values():
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    lock = threading.Lock()

    def read() -> None:
        chunk = torch.empty(reader.CHUNK, dtype=torch.uint8, pin_memory=setting.device == "cuda")
        into: Any = memoryview(chunk.numpy())  # type: ignore[arg-type]
        while True:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                return
            os.preadv(opened[piece[0]], [into], piece[1])

    threads = [threading.Thread(target=read) for _ in range(setting.threads)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    for number in opened.values():
        os.close(number)
    return seconds


def drop(files: Sequence[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        number = os.open(file, os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


@contextmanager
def watched(device: str) -> Iterator[dict[str, Any]]:
    """Measure what the body takes: seconds, and peaks of memory beyond what there was."""
    gc.collect()
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = _reset_host_peak()
    found: dict[str, Any] = {"gpu_peak": None}
    began = time.perf_counter()
    yield found
    if on_gpu:
        torch.cuda.synchronize()
        found["gpu_peak"] = torch.cuda.max_memory_allocated()
    found["seconds"] = time.perf_counter() - began
    found["host_peak"] = max(0, _host_peak() - before)


def _load(setting: Setting, cache: str, files: Sequence[Path], *, is_last: bool) -> dict[str, Any]:
    if cache == COLD:
        drop(files)
    with watched(setting.device) as found:
        began = time.perf_counter()
        streamed = open_streamed(str(setting.directory), compute_dtype="storage")
        streamed.threads = setting.threads
        found["open_seconds"] = time.perf_counter() - began
        packing = Packing(streamed, device=setting.device)
        packing.quantize(setting.spec)
    locked = setting.threads * reader.CHUNK if setting.device == "cuda" else 0
    return {
        **found,
        "who": f"ours, {setting.spec.label}",
        "cache": cache,
        "gpu_held": _held(packing.model),
        # They are there from the first time on, and the kernel may not count them as resident.
        "host_peak": found["host_peak"] + locked,
        "locked": locked,
        "equal": _is_equal(packing, setting, files) if is_last else None,
    }


def _held(model: torch.nn.Module) -> int:
    tensors = (*model.parameters(), *model.buffers())
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def _is_equal(packing: Packing, setting: Setting, files: Sequence[Path]) -> bool | None:
    """Tell whether each layer has the codes of its weight as safetensors reads it; None where names don't say which."""
    from safetensors import safe_open

    where = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                where.update(dict.fromkeys(opened.keys(), file))
    layers = {name: module for name, module in packing.model.named_modules() if isinstance(module, KBitLinear)}
    if not layers or any(f"{name}.weight" not in where for name in layers):
        return None
    for name, layer in layers.items():
        with safe_open(where[f"{name}.weight"], framework="pt", device=setting.device) as opened:
            q = quantize(opened.get_tensor(f"{name}.weight"), setting.spec)
        ours = layer.quantized()
        if not (torch.equal(q.codes, ours.codes) and q.nbits == ours.nbits):
            return False
    return True


def _peer(setting: Setting, cache: str, files: Sequence[Path], disk: float) -> Load | str:
    """Load with transformers and bitsandbytes' nf4; or say why not."""
    if setting.device != "cuda":
        return "transformers and bitsandbytes: not measured on a CPU."
    try:
        import bitsandbytes  # noqa: F401
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    except ImportError as error:
        return f"transformers and bitsandbytes: not measured: {error}."
    if cache == COLD:
        drop(files)
    made: Any = AutoModelForCausalLM
    how: Any = BitsAndBytesConfig
    with watched(setting.device) as found:
        model = made.from_pretrained(
            setting.directory,
            dtype=torch.float16,
            quantization_config=how(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16),
            device_map={"": 0},
        )
    return Load(
        **found,
        who="transformers and bitsandbytes, nf4",
        cache=cache,
        open_seconds=0.0,
        disk_seconds=disk,
        gpu_held=_held(model),
        locked=0,
        equal=None,
    )


def _reset_host_peak() -> int:
    """Have the kernel count this process's peak from now on; return what is resident, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5)
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return _status("VmRSS")


def _host_peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def table(found: Sequence[Load], setting: Setting, nbytes: int, notes: Sequence[str]) -> Table:
    """Return a table of a row per loading."""
    body = [
        [
            f"{f.who}, {f.cache}",
            f"{f.seconds:.2f}",
            f"{nbytes / f.seconds / 1e9:.2f}",
            f"{nbytes / f.disk_seconds / 1e9:.2f}",
            f"{f.disk_seconds / f.seconds:.0%}",
            "-" if f.gpu_peak is None else f"{f.gpu_peak / 1e9:.3f}",
            f"{f.gpu_held / 1e9:.3f}",
            f"{f.host_peak / 1e9:.3f}",
            "-" if f.equal is None else "yes" if f.equal else "NO",
        ]
        for f in found
    ]
    return Table(
        name="loading",
        title=f"Loading {setting.directory.name} ({nbytes / 1e9:.2f} GB of weights) into k bits, on "
        f"{device_name(setting.device)}, {setting.threads} threads",
        header=(
            *("who, page cache", "s", "GB/s", "disk GB/s", "of disk", "GPU peak GB", "held GB"),
            *("host peak GB", "same codes"),
        ),
        body=body,
        notes=[
            "Seconds begin before config.json is read. Host peak: beyond the process before, page-locked chunks "
            f"({found[0].locked / 1e9:.3f} GB) included. Same codes: as of weights that safetensors read.",
            "Of ours, until the model without weights is there: "
            + " and ".join(f"{f.open_seconds:.2f} s {f.cache}" for f in found if f.open_seconds)
            + "; from then on "
            + " and ".join(f"{f.disk_seconds / (f.seconds - f.open_seconds):.0%}" for f in found if f.open_seconds)
            + " of the disk.",
            *notes,
        ],
        records=[_record(f, setting, nbytes) for f in found],
    )


def _record(f: Load, setting: Setting, nbytes: int) -> Record:
    return {
        **{"who": f.who, "cache": f.cache, "bits": setting.spec.bits, "threads": setting.threads, "bytes": nbytes},
        **{"seconds": f.seconds, "open_seconds": f.open_seconds, "disk_seconds": f.disk_seconds},
        **{"gpu_peak_bytes": f.gpu_peak, "gpu_held_bytes": f.gpu_held, "host_peak_bytes": f.host_peak},
        **{"locked_bytes": f.locked, "equal": None if f.equal is None else int(f.equal)},
    }
