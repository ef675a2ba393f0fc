"""Launches of the Triton kernels that quantize and dequantize (``kbit.kernels.blockwise_jit``).

Importing this imports triton.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit.kernels import blockwise_jit as jit
from kbit.kernels.codes_jit import plant_tree
from kbit.kernels.interpreter import interpreted
from kbit.quantizer.absmax import NestedAbsmax, load_absmax, nest
from kbit.quantizer.blocks import Blocks
from kbit.quantizer.codebooks import codebook, fixed_codebook
from kbit.quantizer.encode import midpoints
from kbit.quantizer.packing import packed_bytes
from kbit.quantizer.storage import FLOAT16_MAX, non_finite
from kbit.spec import QuantSpec

_GROUP: Final = 32
_GROUPS: Final = 128
_OCTETS: Final = 512
_CHUNK: Final = 4096
_STEPS: Final = 8
_LARGEST_FUSED: Final = _GROUP * _GROUPS
_WIDE: Final = 2**31 - 2**20
"""From this many values on, indices have 64 bits."""
_FINEST_BFLOAT16: Final = 2.0**-90
_TYPES: Final = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_LOADED: Final = (torch.float16, torch.bfloat16, torch.float32)
_OPTIONS: Final[dict[str, Any]] = {"num_warps": 4, "enable_fp_fusion": False}
_ENTRY: Final = 4


class Quantized(NamedTuple):
    """What ``quantize_values`` makes, as a ``QuantizedTensor`` has it.

    Attributes:
        codes: uint8, packed.
        absmax: in the spec's dtype.
        bad: int32 [1], not zero if a value was NaN or infinite; None where that was checked. Reading it waits for the
            kernel: what there is to do meanwhile comes first.
    """

    codes: Tensor
    absmax: Tensor | NestedAbsmax
    bad: Tensor | None


def quantize_values(
    flat: Tensor,
    blocks: Blocks,
    spec: QuantSpec,
    *,
    dtype: torch.dtype,
    values: Tensor | None,
    mean: Tensor | None,
    columns: Tensor | None,
    row: int,
) -> Quantized:
    """Packed codes and absmax of a weight, equal to the reference's to the bit.

    Args:
        flat: the weight's values in row-major order, floating point, contiguous.
        dtype: float16 or bfloat16, to which they are cast first.
        values: the codebook, float32, of a type that the data decide; None for the spec's own.
        mean: float16, 0-dim, subtracted first; None without centering.
        columns: kept columns of rows `row` long, which count as zero; None if none are.

    Raises:
        WeightError: a value is NaN or infinite, where `bad` doesn't say so.
    """
    if flat.dtype not in _LOADED:
        flat = flat.to(dtype)
    words = flat.new_empty(-(-packed_bytes(flat.numel(), spec.bits) // 4), dtype=torch.int32)
    with _on(flat.device):
        tree = _fixed_tree(spec, flat.device) if values is None else midpoint_tree(values, spec.bits)
        if columns is None and spec.absmax_dtype != "nested" and _is_one_pass(blocks):
            bad = torch.zeros(1, dtype=torch.int32, device=flat.device)
            absmax = _quantize_in_one_pass(flat, blocks, spec, dtype, values, mean, tree, words, bad)
            return Quantized(_as_bytes(words, flat.numel(), spec.bits), absmax, bad)
        kept = None if columns is None else _mask(columns, row)
        stored = _measure(flat, blocks, spec, dtype, mean, kept)
        _encode(flat, blocks, spec, dtype, mean, kept, tree, load_absmax(stored), words)
    return Quantized(_as_bytes(words, flat.numel(), spec.bits), stored, None)


def midpoint_tree(values: Tensor, bits: int) -> Tensor:
    """A codebook's midpoints as a search tree: float32 [2^bits] (``codes_jit.plant_tree``)."""
    with _on(values.device):
        tree = values.new_empty(1 << bits)
        plant_tree[(1,)](values, tree, values.numel(), BITS=bits, num_warps=1, enable_fp_fusion=False)
    return tree


@lru_cache(maxsize=256)
def _fixed_tree(spec: QuantSpec, device: torch.device) -> Tensor:
    tree = midpoint_tree(fixed_codebook(spec, device), spec.bits)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # the next call may come from another stream
    return tree


def dequantize_values(
    codes: Tensor,
    absmax: Tensor | NestedAbsmax,
    blocks: Blocks,
    spec: QuantSpec,
    out: Tensor,
    *,
    dtype: torch.dtype,
    values: Tensor,
    mean: Tensor | None,
) -> None:
    """Fill `out`, contiguous and of 16 or 32 bits a value, with what packed codes stand for, rounded to `dtype`."""
    count, loaded = out.numel(), load_absmax(absmax)
    words = _as_words(codes)
    with _on(out.device):
        jit.dequantize_values[(triton.cdiv(count, 8 * _OCTETS),)](
            words,
            loaded,
            values,
            out,
            loaded if mean is None else mean,
            _ENTRY,
            count,
            words.numel(),
            blocks.size,
            blocks.length,
            blocks.per_row,
            torch.finfo(dtype).max,
            BITS=spec.bits,
            OCTETS=_OCTETS,
            STORAGE=_TYPES[dtype],
            CENTER=mean is not None,
            # A codebook's values are at most 1, so that only these may be beyond the dtype's range.
            LIMITED=mean is not None or loaded.dtype != torch.float16,
            FLAT=blocks.rows == 1,
            WHOLE=blocks.rows == 1 and blocks.size % 8 == 0,
            INDEX=_index(count),
            MASKED=count % (8 * _OCTETS) != 0,
            **_OPTIONS,
        )


def _is_one_pass(blocks: Blocks) -> bool:
    size = blocks.size
    return blocks.rows == 1 and _GROUP <= size <= _LARGEST_FUSED and size & (size - 1) == 0


def _quantize_in_one_pass(
    flat: Tensor,
    blocks: Blocks,
    spec: QuantSpec,
    dtype: torch.dtype,
    values: Tensor | None,
    mean: Tensor | None,
    tree: Tensor,
    words: Tensor,
    bad: Tensor,
) -> Tensor:
    """Fills `words`, and `bad`, zero at first; returns absmax."""
    count = flat.numel()
    absmax = flat.new_empty(blocks.per_row, dtype=getattr(torch, spec.absmax_dtype))
    jit.quantize_blocks[(triton.cdiv(count, _GROUP * _GROUPS),)](
        flat,
        words,
        absmax,
        bad,
        tree,
        flat if mean is None else mean,
        _ENTRY,
        count,
        words.numel(),
        BITS=spec.bits,
        SIZE=blocks.size,
        GROUPS=_GROUPS,
        STORAGE=_TYPES[dtype],
        CENTER=mean is not None,
        RECIPROCAL=_divides_by_reciprocal(spec, dtype, values),
        MASKED=count % (_GROUP * _GROUPS) != 0,
        **_OPTIONS,
    )
    return absmax


def _divides_by_reciprocal(spec: QuantSpec, dtype: torch.dtype, values: Tensor | None) -> bool:
    """Whether the kernel's short division gives the codes of an IEEE division.

    It is exact for operands of 11 bits whose quotient and remainder are normal numbers. In bfloat16 they may not be:
    quotients below 2^-100 may be off, though not in sign, which changes no code where no midpoint but 0 is as small.
    """
    if spec.center or interpreted():  # means make longer operands; the interpreter's fma rounds twice
        return False
    if dtype == torch.float16:
        return True
    if spec.absmax_dtype != "float16":
        return False
    return _is_coarse_type(spec) if values is None else _is_coarse(values)


@lru_cache(maxsize=256)
def _is_coarse_type(spec: QuantSpec) -> bool:
    return _is_coarse(codebook(spec))


def _is_coarse(values: Tensor) -> bool:
    points = midpoints(values).abs()
    return bool(((points == 0) | (points >= _FINEST_BFLOAT16)).all())


def _measure(
    flat: Tensor, blocks: Blocks, spec: QuantSpec, dtype: torch.dtype, mean: Tensor | None, kept: Tensor | None
) -> Tensor | NestedAbsmax:
    """absmax as it is stored."""
    number = blocks.rows * blocks.per_row
    found = torch.zeros(number, dtype=torch.int32, device=flat.device)
    chunk = triton.next_power_of_2(min(blocks.size, _CHUNK))
    steps = 1 if blocks.size <= chunk else _STEPS
    parts = triton.cdiv(blocks.size, chunk * steps)
    jit.measure_blocks[(triton.cdiv(number, _CHUNK // chunk) * parts,)](
        flat,
        found,
        found if mean is None else mean,
        found if kept is None else kept,
        blocks.size,
        blocks.length,
        blocks.per_row,
        number,
        1 if kept is None else kept.numel(),
        parts,
        BLOCKS=_CHUNK // chunk,
        CHUNK=chunk,
        STEPS=steps,
        STORAGE=_TYPES[dtype],
        CENTER=mean is not None,
        KEPT=kept is not None,
        INDEX=_index(flat.numel()),
        **_OPTIONS,
    )
    absmax = found.view(torch.float32)
    if not bool(absmax.isfinite().all()):
        raise non_finite("weight", dtype)
    if spec.absmax_dtype == "nested":
        return nest(absmax)
    return absmax.clamp(max=FLOAT16_MAX).half() if spec.absmax_dtype == "float16" else absmax


def _encode(
    flat: Tensor,
    blocks: Blocks,
    spec: QuantSpec,
    dtype: torch.dtype,
    mean: Tensor | None,
    kept: Tensor | None,
    tree: Tensor,
    absmax: Tensor,
    words: Tensor,
) -> None:
    """Fills `words`."""
    jit.encode_values[(triton.cdiv(flat.numel(), _GROUP * _GROUPS),)](
        flat,
        words,
        absmax,
        tree,
        absmax if mean is None else mean,
        absmax if kept is None else kept,
        _ENTRY,
        flat.numel(),
        words.numel(),
        blocks.size,
        blocks.length,
        blocks.per_row,
        1 if kept is None else kept.numel(),
        BITS=spec.bits,
        GROUPS=_GROUPS,
        STORAGE=_TYPES[dtype],
        CENTER=mean is not None,
        KEPT=kept is not None,
        FLAT=blocks.rows == 1,
        WHOLE=blocks.rows == 1 and blocks.size % _GROUP == 0,
        INDEX=_index(flat.numel()),
        **_OPTIONS,
    )


def _mask(columns: Tensor, row: int) -> Tensor:
    kept = torch.zeros(row, dtype=torch.int8, device=columns.device)
    kept[columns.long()] = 1
    return kept


def _as_bytes(words: Tensor, count: int, bits: int) -> Tensor:
    return words.view(torch.uint8)[: packed_bytes(count, bits)]


def _as_words(codes: Tensor) -> Tensor:
    """Packed codes as int32; a view where their memory has whole words, as that of ``quantize_values`` has."""
    padded = codes.numel() + -codes.numel() % 4
    offset = codes.storage_offset()
    if codes.is_contiguous() and offset % 4 == 0 and offset + padded <= codes.untyped_storage().nbytes():
        return codes.as_strided((padded,), (1,)).view(torch.int32)
    return torch.nn.functional.pad(codes, (0, padded - codes.numel())).contiguous().view(torch.int32)


def _index(count: int) -> Any:
    return tl.int32 if count < _WIDE else tl.int64


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
