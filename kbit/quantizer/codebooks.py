"""The data types' values: each is its codebook, a sorted float32 tensor of distinct values in [-1, 1], nothing else.

Appendix A of the paper (int, float, dynamic, quantile) and QLoRA (normal). Values are computed in float64 and rounded
once, so they may differ from bitsandbytes' float32 arithmetic in the last bit; the tests say where. The functions are
entries of ``kbit.data_types.DTYPES``; nothing here knows them by name.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kbit.data_types import DataType, data_type
from kbit.doors import load
from kbit.errors import SpecError
from kbit.quantizer.source import Source
from kbit.quantizer.storage import check_weight, chunks, columns_of, flattened, mean16, non_finite, storage_dtype_of
from kbit.spec import QuantSpec

PATTERNS = 1 << 16
"""Distinct values a 16-bit dtype can hold: a histogram of them is a tensor, sorted, in half a megabyte."""
_GPU_CHUNKS = 8
"""Chunks of a histogram at a time on a GPU, 2^24 values: ``bincount`` waits for the GPU twice, whatever it counts. Its
indices take 130 MB."""


def codebook(
    spec: QuantSpec,
    weight: Tensor | None = None,
    *,
    outlier_columns: Tensor | list[int] | None = None,
    storage_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the values that codes stand for: at most 2^bits, float32, sorted, distinct, within [-1, 1].

    Those of the fixed types and of `quantile` have 0 among them, and largest magnitude exactly 1. With zero points they
    are the integers 0 to 2^bits - 1.

    Args:
        spec: bits 2 to 8 and a data type.
        weight: what a data-dependent type is made from; others take only its device.
        outlier_columns: columns of `weight` kept in 16 bits, which a data-dependent codebook leaves out.
        storage_dtype: float16 or bfloat16 to cast `weight` to first; None as in ``quantize``.

    Returns:
        On the weight's device, on the CPU without one. A fresh tensor.

    Raises:
        SpecError: the spec is the 16-bit baseline, which has no codebook.
        ValueError: a data-dependent type without a weight, or with one that isn't finite (WeightError).
    """
    if spec.is_baseline:
        raise SpecError("bits", spec.bits, "2 to 8 for a codebook; the 16-bit baseline has none")
    if not is_data_dependent(spec):
        return fixed_codebook(spec, torch.device("cpu") if weight is None else weight.device).clone()
    if weight is None:
        raise ValueError(f"dtype={spec.dtype!r} is made from the weight it quantizes: call codebook(spec, weight)")
    check_weight(weight)
    dtype = storage_dtype_of(weight, storage_dtype)
    mean = mean16(weight, dtype) if spec.center else None
    return fitted_codebook(spec, Source(weight, dtype, columns_of(weight, outlier_columns), mean))


def is_data_dependent(spec: QuantSpec) -> bool:
    """Return whether each tensor has a codebook of its own, whose bits count."""
    return _type_of(spec).data_dependent


@lru_cache(maxsize=256)
def fixed_codebook(spec: QuantSpec, device: torch.device) -> Tensor:
    """Return the codebook of a type that no data decides; the same tensor each time, not to be changed.

    It is kept on each device, since a copy from the CPU waits for all that the device still has to do.
    """
    return _on_cpu(spec).to(device)


def fitted_codebook(spec: QuantSpec, source: Source) -> Tensor:
    """Return the codebook of a data-dependent type for one tensor, on its device.

    Raises:
        WeightError: a value is NaN or infinite.
    """
    values: Tensor = load(_type_of(spec).values)(source, spec)
    return values


def _type_of(spec: QuantSpec) -> DataType:
    return data_type(str(spec.dtype), spec.codebook)


@lru_cache(maxsize=256)
def _on_cpu(spec: QuantSpec) -> Tensor:
    values: Tensor = load(_type_of(spec).values)(spec)
    return values


def int_values(spec: QuantSpec) -> Tensor:
    """i / (2^(k-1) - 1): the smallest integer is left out, so that as many lie below zero as above (Appendix A).

    With zero points they are the integers 0 to 2^k - 1 themselves (``kbit.quantizer.asymmetric``).
    """
    if spec.zero_point:
        return torch.arange(2**spec.bits, dtype=torch.float32)
    top = 2 ** (spec.bits - 1) - 1
    return torch.arange(-top, top + 1, dtype=torch.float64).div(top).float()


def float_values(spec: QuantSpec) -> Tensor:
    """Sign, E exponent bits, M = k - 1 - E fraction bits; no infinities, no NaN (Appendix A, eq. 5).

    The bias cancels in the division by the largest value, so the field itself serves as the exponent. Exponent field 0
    is subnormal: multiples of the smallest normal number's last bit (IEEE), or a quarter of that (bitsandbytes'
    create_fp8_map).
    """
    exponent_bits = spec.exponent_bits
    assert isinstance(exponent_bits, int)  # QuantSpec resolves the rules' names
    steps = 2 ** (spec.bits - 1 - exponent_bits)
    smallest_normal = 2.0
    subnormal_unit = smallest_normal / (4 if spec.subnormals == "bnb" else 1)
    positive = [m / steps * subnormal_unit for m in range(steps)]
    positive += [(1 + m / steps) * 2.0**e for e in range(1, 2**exponent_bits) for m in range(steps)]
    return _normalised(torch.tensor(positive + [-v for v in positive], dtype=torch.float64))


def dynamic_values(spec: QuantSpec) -> Tensor:
    """Decade e = 0 ... k-2: midpoints of 2^e equal parts of [0.1, upper], times 10^(e-(k-2)), both signs; 0; +1 (App.
    A).

    +1 is bitsandbytes' (create_dynamic_map), and stands in the paper's interval [0.1, 0.9] as well: without it a
    block's largest value would have no code near it. There is no -1 in either.
    """
    bits, upper = spec.bits, 0.9 if spec.dynamic_interval == "paper" else 1.0
    values = [0.0, 1.0]
    for e in range(bits - 1):
        parts = 2**e
        for j in range(parts):
            value = (0.1 + (upper - 0.1) * (j + 0.5) / parts) * 10.0 ** (e - (bits - 2))
            values += [value, -value]
    return _normalised(torch.tensor(values, dtype=torch.float64))


def normal_values(spec: QuantSpec) -> Tensor:
    """NF-k: quantiles of the normal distribution, one more above zero than below, and zero (QLoRA, section 3)."""
    bits = spec.bits
    offset = 1 - (2.0 ** -(bits + 1) + 1 / (2 * (2**bits - 1))) / 2
    above, below = (
        torch.special.ndtri(torch.linspace(offset, 0.5, count + 1, dtype=torch.float64)[:-1])
        for count in (2 ** (bits - 1), 2 ** (bits - 1) - 1)
    )
    return _normalised(torch.cat([above, -below, torch.zeros(1, dtype=torch.float64)]))


def file_values(spec: QuantSpec) -> Tensor:
    """Return the values that a file gave, as the spec has them."""
    return torch.tensor(spec.codebook, dtype=torch.float32)


def _normalised(values: Tensor) -> Tensor:
    """float64 values of any order, divided by the largest magnitude: float32, sorted, distinct."""
    scaled: Tensor = torch.unique(values.div(values.abs().max()).float() + 0.0)  # + 0.0 turns -0 into 0
    return scaled


def quantile_values(source: Source, spec: QuantSpec) -> Tensor:
    """Eq. 6: q_i = (Q(i/(2^k+1)) + Q((i+1)/(2^k+1))) / 2 for i = 1 ... 2^k - 1, and 0; over the largest magnitude.

    Q is the exact empirical quantile with linear interpolation of the stored values less the mean, kept columns left
    out. i = 0 would be the single smallest value, so it is left out, which makes room for the zero. If all quantiles
    are zero the codebook is {0, 1}.

    Raises:
        WeightError: a value is NaN or infinite.
    """
    values, upto = _sorted_values(source.weight, source.dtype, source.columns)
    if not values.numel():
        return torch.tensor([0.0, 1.0], dtype=torch.float32, device=source.device)
    if source.mean is not None:
        values = values - source.mean.float()
    # Whole-number arithmetic keeps the positions i (n - 1) / (2^k + 1) exact however many weights there are.
    parts, last = 2**spec.bits + 1, int(upto[-1]) - 1
    positions = torch.arange(1, parts, dtype=torch.int64) * last
    low, part = positions // parts, (positions % parts).double() / parts
    ranks = torch.stack([low, (low + 1).clamp(max=last)])
    at = values[torch.searchsorted(upto, ranks.to(upto.device), right=True)].double().cpu()
    quantiles = at[0] + part * (at[1] - at[0])
    middles = torch.cat([(quantiles[:-1] + quantiles[1:]) / 2, torch.zeros(1, dtype=torch.float64)])
    if not middles.any():
        middles = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return _normalised(middles).to(source.device)


def _sorted_values(weight: Tensor, dtype: torch.dtype, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Distinct stored values in order (float32), and how many weights lie at or below each (int64)."""
    if dtype == torch.float32:  # a rotated weight, whose values are no 16-bit patterns
        values, counts = torch.unique(flattened(weight, dtype), return_counts=True)
        if not bool(values.isfinite().all()):
            raise non_finite("weight", dtype)
        return values, counts.cumsum(0)
    counts = _histogram(flattened(weight, dtype), dtype)
    patterns = torch.arange(PATTERNS, dtype=torch.int32, device=weight.device)
    values = patterns.to(torch.int16).view(dtype).float()
    if bool(((counts > 0) & ~values.isfinite()).any()):
        raise non_finite("weight", dtype)
    if columns is not None:
        counts -= _histogram(flattened(weight[:, columns.long()], dtype), dtype)
    present = counts > 0
    values, order = values[present].sort()
    return values, counts[present][order].cumsum(0)


def _histogram(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """Count how often each 16-bit pattern occurs: int64 [65536], indexed by the pattern read as an unsigned number."""
    counts = torch.zeros(PATTERNS, dtype=torch.int64, device=flat.device)
    for chunk in chunks(flat, dtype, times=_GPU_CHUNKS if flat.is_cuda else 1):
        counts += torch.bincount(chunk.view(torch.int16).to(torch.int32) & (PATTERNS - 1), minlength=PATTERNS)
    return counts
