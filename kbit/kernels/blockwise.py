"""Launches of the Triton kernels that quantize and dequantize (``kbit.kernels.blockwise_jit``).

Importing this imports triton.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit.kernels import blockwise_jit as jit
from kbit.kernels.codes_jit import plant_tree
from kbit.kernels.interpreter import interpreted
from kbit.kernels.launching import on
from kbit.quantizer.absmax import NestedAbsmax, load_absmax, nest
from kbit.quantizer.blocks import Blocks
from kbit.quantizer.codebooks import codebook, fixed_codebook
from kbit.quantizer.encode import midpoints
from kbit.quantizer.packed import Packed
from kbit.quantizer.packing import packed_bytes
from kbit.quantizer.source import Source
from kbit.quantizer.storage import FLOAT16_MAX, non_finite
from kbit.spec import QuantSpec

# How much a CTA takes at a time. What doesn't follow from something else is a choice for speed; no measurement of
# others is on record.
_WARPS: Final = 4
"""Of a CTA: 128 threads."""
_GROUP: Final = 32
"""Consecutive values that a thread quantizes. Their codes fill as many 32-bit words as they have bits, so that no word
has codes of two threads; the kernels count on it."""
_GROUPS: Final = 32 * _WARPS
"""Groups that a CTA quantizes: one per thread."""
_LARGEST_FUSED: Final = _GROUP * _GROUPS
"""Largest block of which one CTA sees all values, so that absmax and codes take one pass over the weight."""
_OCTETS: Final = 512
"""Eights of values that a CTA dequantizes: 4 per thread. Codes of eight values begin at a whole byte, whatever the
bits; eight values of 16 bits are one store of 16 bytes, the widest."""
_CHUNK: Final = 4096
"""Values that a CTA measures in a step: several small blocks, or a part of a large one; a power of two."""
_STEPS: Final = 8
"""Steps that a CTA takes along a block longer than ``_CHUNK``: one atomic maximum for 32,768 values."""
_ENTRY: Final = 4
"""Bytes of a float32, as an argument: what the compiler doesn't know, it can't turn into a slower shift and sum
(``codes_jit.look_up``)."""
_WIDE: Final = 2**31 - 2**20
"""From this many values on, indices have 64 bits."""
_FINEST_BFLOAT16: Final = 2.0**-90
"""Midpoints of at least this magnitude, or of 0, stand the short division of bfloat16 values: it may be off only for
quotients below 2^-100."""
_TYPES: Final = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_LOADED: Final = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that the kernels load; a weight of another is cast first."""
_OPTIONS: Final[dict[str, Any]] = {"num_warps": _WARPS, "enable_fp_fusion": False}


class Quantized(NamedTuple):
    """The result of ``quantize_values``, as a ``QuantizedTensor`` has it.

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
    source: Source,
    blocks: Blocks,
    spec: QuantSpec,
    values: Tensor | None,
    stored: Tensor | NestedAbsmax | None = None,
) -> Quantized:
    """Return packed codes and absmax of a weight, equal to the reference's to the bit.

    Args:
        source: the weight and what is known of it.
        blocks: how it is cut.
        spec: how to quantize it.
        values: the codebook, float32, of a type that the data decide; None for the spec's own.
        stored: absmax that was chosen already, of a weight that is finite; None takes the blocks' own.

    Raises:
        WeightError: a value is NaN or infinite, where `bad` doesn't say so.
    """
    flat = source.flat if source.flat.dtype in _LOADED else source.flat.to(source.dtype)
    words = flat.new_empty(-(-packed_bytes(flat.numel(), spec.bits) // 4), dtype=torch.int32)
    with on(flat.device):
        tree = _fixed_tree(spec, flat.device) if values is None else midpoint_tree(values, spec.bits)
        taken = _Taken(flat=flat, blocks=blocks, dtype=source.dtype, mean=source.mean, kept=_mask(source))
        if stored is None and taken.kept is None and spec.absmax_dtype != "nested" and _is_one_pass(blocks):
            reciprocal = _divides_by_reciprocal(spec, source.dtype, values)
            absmax, bad = _quantize_in_one_pass(taken, spec, tree, words, reciprocal)
            return Quantized(_as_bytes(words, flat.numel(), spec.bits), absmax, bad)
        stored = _measure(taken, spec) if stored is None else stored
        _encode(taken, spec.bits, load_absmax(stored), tree, words)
    return Quantized(_as_bytes(words, flat.numel(), spec.bits), stored, None)


class _Taken(NamedTuple):
    """A weight as the kernels take it.

    Attributes:
        flat: its values in row-major order, of a dtype in ``_LOADED``, contiguous.
        blocks: how they are cut.
        dtype: float16 or bfloat16, to which they are cast first.
        mean: float16, 0-dim, subtracted then; or None.
        kept: int8 [k], 1 for columns whose values count as zero; or None.
    """

    flat: Tensor
    blocks: Blocks
    dtype: torch.dtype
    mean: Tensor | None
    kept: Tensor | None


def midpoint_tree(values: Tensor, bits: int) -> Tensor:
    """Return a codebook's midpoints as a search tree: float32 [2^bits] (``codes_jit.plant_tree``)."""
    with on(values.device):
        tree = values.new_empty(1 << bits)
        plant_tree[(1,)](values, tree, values.numel(), BITS=bits, num_warps=1, enable_fp_fusion=False)
    return tree


@lru_cache(maxsize=256)
def _fixed_tree(spec: QuantSpec, device: torch.device) -> Tensor:
    tree = midpoint_tree(fixed_codebook(spec, device), spec.bits)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # the next call may come from another stream
    return tree


def dequantize_values(packed: Packed, out: Tensor, *, dtype: torch.dtype) -> None:
    """Fill `out`, contiguous and of 16 or 32 bits per value, with what packed codes stand for, rounded to `dtype`."""
    count, words, blocks = out.numel(), _as_words(packed.codes), packed.blocks
    absmax, mean = packed.absmax, packed.mean
    with on(out.device):
        jit.dequantize_values[(triton.cdiv(count, 8 * _OCTETS),)](
            words,
            absmax,
            packed.codebook,
            out,
            absmax if mean is None else mean,
            _ENTRY,
            count,
            words.numel(),
            blocks.size,
            blocks.length,
            blocks.per_row,
            torch.finfo(dtype).max,
            BITS=packed.bits,
            OCTETS=_OCTETS,
            STORAGE=_TYPES[dtype],
            CENTER=mean is not None,
            # A codebook's values are at most 1, so that only these may be beyond the dtype's range. Elements of
            # block-scaled floats are larger, and their scales come as float32.
            LIMITED=mean is not None or absmax.dtype != torch.float16,
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
    w: _Taken, spec: QuantSpec, tree: Tensor, words: Tensor, reciprocal: bool
) -> tuple[Tensor, Tensor]:
    """Fill `words`; return absmax, and int32 [1] that is not zero if a value is not finite."""
    count = w.flat.numel()
    absmax = w.flat.new_empty(w.blocks.per_row, dtype=getattr(torch, spec.absmax_dtype))
    bad = torch.zeros(1, dtype=torch.int32, device=w.flat.device)
    jit.quantize_blocks[(triton.cdiv(count, _GROUP * _GROUPS),)](
        w.flat,
        words,
        absmax,
        bad,
        tree,
        w.flat if w.mean is None else w.mean,
        _ENTRY,
        count,
        words.numel(),
        BITS=spec.bits,
        SIZE=w.blocks.size,
        GROUPS=_GROUPS,
        STORAGE=_TYPES[w.dtype],
        CENTER=w.mean is not None,
        RECIPROCAL=reciprocal,
        MASKED=count % (_GROUP * _GROUPS) != 0,
        **_OPTIONS,
    )
    return absmax, bad


def _divides_by_reciprocal(spec: QuantSpec, dtype: torch.dtype, values: Tensor | None) -> bool:
    """Return whether the kernel's short division gives the codes of an IEEE division.

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


def _measure(w: _Taken, spec: QuantSpec) -> Tensor | NestedAbsmax:
    """Return absmax as it is stored."""
    blocks = w.blocks
    number = blocks.rows * blocks.per_row
    found = torch.zeros(number, dtype=torch.int32, device=w.flat.device)
    chunk = triton.next_power_of_2(min(blocks.size, _CHUNK))
    steps = 1 if blocks.size <= chunk else _STEPS
    parts = triton.cdiv(blocks.size, chunk * steps)
    jit.measure_blocks[(triton.cdiv(number, _CHUNK // chunk) * parts,)](
        w.flat,
        found,
        found if w.mean is None else w.mean,
        found if w.kept is None else w.kept,
        blocks.size,
        blocks.length,
        blocks.per_row,
        number,
        1 if w.kept is None else w.kept.numel(),
        parts,
        BLOCKS=_CHUNK // chunk,
        CHUNK=chunk,
        STEPS=steps,
        STORAGE=_TYPES[w.dtype],
        CENTER=w.mean is not None,
        KEPT=w.kept is not None,
        INDEX=_index(w.flat.numel()),
        **_OPTIONS,
    )
    absmax = found.view(torch.float32)
    if not bool(absmax.isfinite().all()):
        raise non_finite("weight", w.dtype)
    if spec.absmax_dtype == "nested":
        return nest(absmax)
    return absmax.clamp(max=FLOAT16_MAX).half() if spec.absmax_dtype == "float16" else absmax


def _encode(w: _Taken, bits: int, absmax: Tensor, tree: Tensor, words: Tensor) -> None:
    """Fill `words`."""
    blocks = w.blocks
    jit.encode_values[(triton.cdiv(w.flat.numel(), _GROUP * _GROUPS),)](
        w.flat,
        words,
        absmax,
        tree,
        absmax if w.mean is None else w.mean,
        absmax if w.kept is None else w.kept,
        _ENTRY,
        w.flat.numel(),
        words.numel(),
        blocks.size,
        blocks.length,
        blocks.per_row,
        1 if w.kept is None else w.kept.numel(),
        BITS=bits,
        GROUPS=_GROUPS,
        STORAGE=_TYPES[w.dtype],
        CENTER=w.mean is not None,
        KEPT=w.kept is not None,
        FLAT=blocks.rows == 1,
        WHOLE=blocks.rows == 1 and blocks.size % _GROUP == 0,
        INDEX=_index(w.flat.numel()),
        **_OPTIONS,
    )


def _mask(source: Source) -> Tensor | None:
    """Return ``_Taken.kept``."""
    if source.columns is None or source.row is None:
        return None
    kept = torch.zeros(source.row, dtype=torch.int8, device=source.columns.device)
    kept[source.columns] = 1
    return kept


def _as_bytes(words: Tensor, count: int, bits: int) -> Tensor:
    return words.view(torch.uint8)[: packed_bytes(count, bits)]


def _as_words(codes: Tensor) -> Tensor:
    """Return packed codes as int32; a view where their memory has whole words, as that of ``quantize_values`` has."""
    padded = codes.numel() + -codes.numel() % 4
    offset = codes.storage_offset()
    if codes.is_contiguous() and offset % 4 == 0 and offset + padded <= codes.untyped_storage().nbytes():
        return codes.as_strided((padded,), (1,)).view(torch.int32)
    return torch.nn.functional.pad(codes, (0, padded - codes.numel())).contiguous().view(torch.int32)


def _index(count: int) -> Any:
    return tl.int32 if count < _WIDE else tl.int64
