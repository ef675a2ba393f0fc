"""Find the GPUs, cores and memory of this machine without loading torch."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from sweeps.errors import UserError
from sweeps.text import counted
from sweeps.worker.cgroup import memory_limit

DEVICES: Final = ("auto", "cpu", "cuda")
WORKER_BYTES: Final = 1_500_000_000
"""Of a CPU worker: torch, transformers, lm-eval and their buffers, on the large side."""
MODEL_BYTES_PER_PARAM: Final = 10
"""Of a CPU worker: float32 weights, the originals kept for restoring, and what quantizing needs besides them."""
MOST_CPU_WORKERS: Final = 8


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Workers of the local executor: ``count`` processes on ``device``, each with ``threads``."""

    device: str
    count: int
    threads: int


@cache
def gpus() -> tuple[str, ...]:
    """Return the ids of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them.

    nvidia-smi comes with the driver and takes 0.02 s on an H200. The bindings of nvidia-ml-py take 0.1 s, and would be
    one more dependency.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(v.strip() for v in visible.split(",") if v.strip() and v.strip() != "-1")
    if shutil.which("nvidia-smi"):
        result = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
        found = [line for line in result.stdout.splitlines() if line.startswith("GPU ")]
        if found:
            return tuple(str(i) for i in range(len(found)))
    return tuple(str(i) for i, _ in enumerate(sorted(Path("/proc/driver/nvidia/gpus").glob("*"))))


@cache
def gpu_bytes() -> int | None:
    """Return the memory of the smallest GPU that this process may use, in bytes; None where nvidia-smi can't tell."""
    if not gpus() or not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "-i", ",".join(gpus()), "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = [int(line) for line in map(str.strip, result.stdout.splitlines()) if line.isdigit()]
    return min(found) * 2**20 if found else None


def resolve_device(asked: str) -> str:
    """Return 'cpu' or 'cuda'.

    Raises:
        UserError: not a device, or a GPU that is not there.
    """
    if asked not in DEVICES:
        raise UserError(f"executor.device={asked!r} is not valid: one of {', '.join(DEVICES)}")
    if asked == "cuda" and not gpus():
        raise UserError("executor.device='cuda': this machine has no GPU. Use executor.device=auto or cpu")
    return asked if asked != "auto" else "cuda" if gpus() else "cpu"


def plan_workers(device: str, asked: object, threads: object, largest_params: int) -> Workers:
    """Plan one worker per GPU, or on a CPU as many as cores and memory allow, which share the cores.

    Args:
        device: 'cpu' or 'cuda'.
        asked: executor.workers.
        threads: executor.threads.
        largest_params: of the study's models.

    Raises:
        UserError: ``asked`` or ``threads`` is neither 'auto' nor a whole number from 1 to what this machine has.
    """
    cores = usable_cores()
    most, what = (len(gpus()), "GPU") if device == "cuda" else (cores, "core")
    count = _number("workers", asked, f"{counted(most, what)} to use, and a worker takes at least one", most)
    of_each = _number("threads", threads, f"{counted(cores, 'core')} to use", cores)
    if count is None and device == "cuda":
        count = len(gpus())
    if count is None:
        fit = usable_memory() // (WORKER_BYTES + MODEL_BYTES_PER_PARAM * largest_params)
        count = max(1, min(cores // (of_each or 1), MOST_CPU_WORKERS, fit))
    return Workers(device=device, count=count, threads=of_each or max(1, cores // count))


def _number(key: str, value: object, has: str, most: int) -> int | None:
    """Return what a key of the executor says; None for 'auto'."""
    if value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"executor.{key}={value!r} is not valid: auto, or a whole number of at least 1")
    if value > most:
        raise UserError(f"executor.{key}={value} is not valid: this machine has {has}: auto, or from 1 to {most}")
    return value


def usable_cores() -> int:
    """Return how many cores this process may keep busy: by its affinity and, in a container, by its CPU quota."""
    import joblib

    return int(joblib.cpu_count())


def usable_memory() -> int:
    """Return in bytes the memory that this process may fill: the machine's, or its control group's limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, memory_limit() or machine)


def device_name(device: str) -> str:
    """Return the name of the GPU, or the kind of the CPU."""
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    return f"cpu ({os.uname().machine})"


def reset_peak_memory(count: int) -> None:
    """Reset the peak of the first ``count`` GPUs; a process's peak on a CPU can't be reset."""
    if count:
        import torch

        for gpu in range(count):
            torch.cuda.reset_peak_memory_stats(gpu)


def peak_memory(count: int) -> int:
    """Return in bytes the sum of each GPU's peak, or the process's peak where there is none."""
    if count:
        import torch

        return sum(int(torch.cuda.max_memory_allocated(gpu)) for gpu in range(count))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
