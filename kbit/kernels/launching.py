"""Where Triton's kernels are launched. Imports no triton."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the one that launches go to: Triton launches on the current GPU, wherever the tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
