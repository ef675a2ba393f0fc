"""Dtypes of arithmetic that a setting may name. Imports no torch."""

from __future__ import annotations

from typing import Final

COMPUTE_DTYPES: Final = ("storage", "float16", "bfloat16", "float32")
"""Dtypes of activations and arithmetic; 'storage' is the checkpoint's own 16-bit dtype."""
