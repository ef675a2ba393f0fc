"""k-bit quantization of language models: data types, block-wise quantizers, whole models, evaluations.

Names are loaded when first used, so that ``import kbit.spec`` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kbit.blockwise import QuantizedTensor, dequantize, quantize
    from kbit.codebooks import codebook
    from kbit.model import QuantHandle, quantize_model
    from kbit.spec import QuantSpec, SpecError

_HOME = {
    "QuantSpec": "kbit.spec",
    "SpecError": "kbit.spec",
    "codebook": "kbit.codebooks",
    "QuantizedTensor": "kbit.blockwise",
    "quantize": "kbit.blockwise",
    "dequantize": "kbit.blockwise",
    "QuantHandle": "kbit.model",
    "quantize_model": "kbit.model",
}

__all__ = [
    "QuantHandle",
    "QuantSpec",
    "QuantizedTensor",
    "SpecError",
    "codebook",
    "dequantize",
    "quantize",
    "quantize_model",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'kbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
