"""k-bit quantization of language models: data types, block-wise quantizers, whole models, evaluations.

Names are loaded when first used, so that ``import kbit.spec`` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kbit.errors import SpecError
    from kbit.ggml.quantize import ggml_dequantize, ggml_quantize
    from kbit.models.quantize import QuantHandle, quantize_model
    from kbit.packed.files import load_packed, save_packed
    from kbit.packed.linear import KBitLinear
    from kbit.quantizer.blockwise import QuantizedTensor, dequantize, quantize
    from kbit.quantizer.codebooks import codebook
    from kbit.spec import QuantSpec

_HOME = {
    "QuantSpec": "kbit.spec",
    "SpecError": "kbit.errors",
    "codebook": "kbit.quantizer.codebooks",
    "QuantizedTensor": "kbit.quantizer.blockwise",
    "quantize": "kbit.quantizer.blockwise",
    "dequantize": "kbit.quantizer.blockwise",
    "ggml_dequantize": "kbit.ggml.quantize",
    "ggml_quantize": "kbit.ggml.quantize",
    "KBitLinear": "kbit.packed.linear",
    "QuantHandle": "kbit.models.quantize",
    "quantize_model": "kbit.models.quantize",
    "load_packed": "kbit.packed.files",
    "save_packed": "kbit.packed.files",
}

__all__ = [
    "KBitLinear",
    "QuantHandle",
    "QuantSpec",
    "QuantizedTensor",
    "SpecError",
    "codebook",
    "dequantize",
    "ggml_dequantize",
    "ggml_quantize",
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
