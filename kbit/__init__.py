"""k-bit quantization of language models: data types, block-wise quantizers, whole models, evaluations.

Names are loaded when first used, so that ``import kbit.spec`` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kbit.blockwise import QuantizedTensor, dequantize, quantize
    from kbit.codebooks import codebook
    from kbit.linear import KBitLinear
    from kbit.model import QuantHandle, quantize_model
    from kbit.packed import load_packed, save_packed
    from kbit.spec import QuantSpec, SpecError

_HOME = {
    "QuantSpec": "kbit.spec",
    "SpecError": "kbit.spec",
    "codebook": "kbit.codebooks",
    "QuantizedTensor": "kbit.blockwise",
    "quantize": "kbit.blockwise",
    "dequantize": "kbit.blockwise",
    "KBitLinear": "kbit.linear",
    "QuantHandle": "kbit.model",
    "quantize_model": "kbit.model",
    "load_packed": "kbit.packed",
    "save_packed": "kbit.packed",
}

__all__ = [
    "KBitLinear",
    "QuantHandle",
    "QuantSpec",
    "QuantizedTensor",
    "SpecError",
    "codebook",
    "dequantize",
    "load_packed",
    "quantize",
    "quantize_model",
    "save_packed",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'kbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
