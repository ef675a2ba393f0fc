"""Rows of values to llama.cpp's bytes and back, a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from kbit.errors import SpecError, WeightError
from kbit.ggml import k_quants, simple
from kbit.ggml.formats import format_of
from kbit.quantizer.storage import check_weight

CHUNK: Final = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Values at a time: what a search works on stays near a core's cache, or fills a GPU in 2 GB."""
_QUANTIZE: Final[Mapping[str, Callable[[Tensor, Tensor, int], Tensor]]] = {
    **dict.fromkeys(("q4_0", "q5_0"), simple.quantize_symmetric),
    **dict.fromkeys(("q4_1", "q5_1"), simple.quantize_offset),
    "q8_0": simple.quantize_8bit,
    **dict.fromkeys(("q4_K", "q5_K"), k_quants.quantize_offset),
    "q6_K": k_quants.quantize_6bit,
}
_DEQUANTIZE: Final[Mapping[str, Callable[[Tensor, int], Tensor]]] = {
    **dict.fromkeys(("q4_0", "q5_0"), simple.dequantize_symmetric),
    **dict.fromkeys(("q4_1", "q5_1"), simple.dequantize_offset),
    "q8_0": simple.dequantize_8bit,
    **dict.fromkeys(("q4_K", "q5_K"), k_quants.dequantize_offset),
    "q6_K": k_quants.dequantize_6bit,
}


@torch.no_grad()
def ggml_quantize(x: Tensor, type: str) -> Tensor:
    """Quantize a matrix into llama.cpp's format, as its quantizer does without an importance matrix.

    q4_0 to q8_0 are equal to PyPI ``gguf`` byte for byte, and all formats to llama.cpp compiled without fused
    multiply-add, as by default for x86-64. With it, of two scales of almost the same error it may take the other.

    Args:
        x: floating-point [rows, columns], taken as float32; columns are a multiple of the format's block.
        type: one of q4_0, q4_1, q5_0, q5_1, q8_0, q4_K, q5_K, q6_K.

    Returns:
        uint8 [rows, bytes of a row], on the same device.

    Raises:
        SpecError: a format that isn't known, or columns that it doesn't take.
        WeightError: no matrix of floating-point values, or NaN, infinite or, for a float16 scale, too large ones.
    """
    layout = format_of(type)
    check_weight(x)
    if x.ndim != 2:
        raise WeightError(f"weight has shape {tuple(x.shape)}: ggml_quantize takes a matrix [rows, columns]")
    rows, columns = x.shape
    out = torch.empty(rows, layout.row_bytes(columns), dtype=torch.uint8, device=x.device)
    step = _rows_at_once(x.device, columns)
    checks = []
    for first in range(0, rows, step):
        values = x[first : first + step].detach().to(torch.float32).contiguous().view(-1, layout.block)
        check = _QUANTIZE[type](values, out[first : first + step].view(-1, layout.nbytes), layout.bits)
        checks.append(check.abs().amax())
    # Looked at in the end: a GPU is not waited for in between.
    if not bool(torch.stack(checks).isfinite().all()):
        raise WeightError("weight holds NaN or infinite values, or values too large for a scale in float16")
    return out


@torch.no_grad()
def ggml_dequantize(
    stored: Tensor, type: str, *, out: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the values of ``ggml_quantize``'s bytes.

    Args:
        stored: uint8 [rows, bytes of a row].
        type: their format.
        out: floating-point [rows, columns] to write into, in whatever order it lies; None makes float32.
        dtype: what values are rounded to before they are written; None is not at all.

    Raises:
        SpecError: a format that isn't known, or bytes that are no whole blocks of it.
    """
    layout = format_of(type)
    if stored.dtype != torch.uint8 or stored.ndim != 2 or stored.shape[1] % layout.nbytes:
        shape = f"{stored.dtype} {list(stored.shape)}"
        raise SpecError("stored", shape, f"uint8 [rows, a multiple of {layout.nbytes}], the bytes of {type}")
    rows, columns = stored.shape[0], stored.shape[1] // layout.nbytes * layout.block
    if out is None:
        out = torch.empty(rows, columns, dtype=torch.float32, device=stored.device)
    step = _rows_at_once(stored.device, columns)
    for first in range(0, rows, step):
        blocks = stored[first : first + step].reshape(-1, layout.nbytes)
        values = _DEQUANTIZE[type](blocks, layout.bits).view(-1, columns)
        out[first : first + step] = values if dtype is None else values.to(dtype)
    return out


def _rows_at_once(device: torch.device, columns: int) -> int:
    chunk = CHUNK.get(device.type, CHUNK["cuda"])
    return max(1, chunk // max(1, columns))
