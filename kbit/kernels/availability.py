"""Choose what runs an operation: the reference in torch, or kernels."""

from __future__ import annotations

import os
import shutil
import warnings
from functools import cache
from importlib.util import find_spec
from typing import Final, Literal

import torch

from kbit.kernels.interpreter import interpreted
from kbit.memory import is_out_of_memory

IMPLS: Final = ("auto", "torch", "triton", "cuda")
_FEWEST_CAPABILITY: Final = (8, 0)


def choose_blockwise(impl: str, device: torch.device) -> Literal["torch", "triton"]:
    """Choose what quantizes and dequantizes on `device`; 'auto' is Triton's kernels where they run, else torch.

    Raises:
        ValueError: `impl` is none of ``IMPLS``, or can't run there.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is not one of {', '.join(IMPLS)}")
    if impl == "cuda":
        raise ValueError(
            "impl='cuda': quantizing and dequantizing have no kernels in CUDA C++, only the matmul has; "
            "use 'triton', 'torch' or 'auto'"
        )
    if impl == "torch":
        return "torch"
    why = why_not_triton(device)
    if why is None:
        return "triton"
    if impl == "triton":
        raise ValueError(f"impl='triton' can't run here: {why}; use 'torch' or 'auto'")
    return "torch"


def why_not_triton(device: torch.device) -> str | None:
    """Say in words why Triton's kernels don't run on a device; None if they do.

    Triton is imported only for the last question, a trial.
    """
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        return None if interpreted() else "the tensor is on the CPU (where Triton runs only with TRITON_INTERPRET=1)"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the tensor is on {device.type}, and the kernels are for NVIDIA GPUs"
    return _why_not_on(device)


@cache
def _why_not_on(device: torch.device) -> str | None:
    """Say the same of an NVIDIA GPU."""
    if torch.cuda.get_device_capability(device) < _FEWEST_CAPABILITY:
        return "the GPU is older than compute capability 8.0"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler to launch kernels, and there is neither gcc nor clang nor CC"
    return _trial_failure(device)


def _trial_failure(device: torch.device) -> str | None:
    """Compile, link and launch a small kernel on a GPU, and say in words why that fails; None if it doesn't.

    A toolchain can be broken in ways that nothing but a trial finds; a study must not fail for that.
    """
    from kbit.kernels.blockwise import midpoint_tree

    try:
        midpoint_tree(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float32, device=device), 2)
        torch.cuda.synchronize(device)
    except Exception as error:  # of compilers, linkers, drivers
        if is_out_of_memory(error):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        warnings.warn(f"quantizing is slow here: a trial of Triton's kernels failed: {what}", stacklevel=2)
        return f"a trial of its kernels failed: {what}"
    return None
