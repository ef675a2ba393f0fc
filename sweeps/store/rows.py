"""The columns of a measurement's row, from what a worker has at hand. Only what asks a GPU imports torch."""

from __future__ import annotations

import os
import resource
import traceback
from typing import TYPE_CHECKING, Any

from kbit.evaluation.spec import EvalResult
from sweeps.plan.packs import OOM_ERROR

if TYPE_CHECKING:
    from kbit.models.quantize import QuantHandle


def result_columns(result: EvalResult) -> dict[str, Any]:
    return {
        "status": "diverged" if result.diverged else "done",
        "metrics": dict(result.metrics),
        "stderr": dict(result.stderr),
        "samples": dict(result.samples),
        "n_samples": result.n_samples,
        "n_tokens": result.n_tokens,
        "dataset_hash": result.dataset_hash,
    }


def handle_columns(handle: QuantHandle) -> dict[str, Any]:
    return {
        "bits_per_param": handle.bits_per_param,
        "total_bits": float(handle.total_bits),
        "total_bits_nominal": handle.total_bits_nominal,
        "codebook_hash": handle.codebook_hash,
    }


def failure_columns(error: Exception) -> dict[str, Any]:
    from kbit.memory import is_out_of_memory

    return {
        "status": "failed",
        "error_type": OOM_ERROR if is_out_of_memory(error) else type(error).__name__,
        "error": "".join(traceback.format_exception(error)),
    }


def device_name(device: str) -> str:
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    return f"cpu ({os.uname().machine})"


def reset_peak_memory(gpus: int) -> None:
    """Begin to count anew on the first ``gpus`` GPUs; a process's peak on a CPU can't be reset."""
    if gpus:
        import torch

        for gpu in range(gpus):
            torch.cuda.reset_peak_memory_stats(gpu)


def peak_memory(gpus: int) -> int:
    """Bytes: the sum of each GPU's peak, or the process's peak where there is none."""
    if gpus:
        import torch

        return sum(int(torch.cuda.max_memory_allocated(gpu)) for gpu in range(gpus))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
