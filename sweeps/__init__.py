"""Sweeps of k-bit quantizations: what to measure, what is left to do, who does it, where results are.

Names are loaded when first used; planning never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sweeps.results.table import load_results, load_samples

_HOME = {"load_results": "sweeps.results.table", "load_samples": "sweeps.results.table"}

__all__ = ["load_results", "load_samples"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'sweeps' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
