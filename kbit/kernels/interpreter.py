"""Triton's interpreter, which runs kernels on the CPU. Imports no triton."""

from __future__ import annotations

import os


def interpreted() -> bool:
    """Return whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
