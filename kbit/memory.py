"""Tell exceptions that mean that memory ran out, of a GPU or of the machine, from all others."""

from __future__ import annotations

import errno
from typing import Final

import torch

_MESSAGES: Final = (
    "can't allocate memory",  # torch's CPU allocator
    "Cannot allocate memory",  # the system, as safetensors and others pass it on
    "CUDA error: out of memory",  # what torch allocates outside its caching allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether an exception, or one that it was raised from, says that memory ran out.

    Those are torch.OutOfMemoryError, MemoryError, ENOMEM, and the RuntimeErrors of torch's CPU allocator and of CUDA
    libraries, which have no type of their own.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, Exception) and any(message in str(error) for message in _MESSAGES):
            return True
        error = error.__cause__
    return False
