"""Prepare a weight for any quantizer: check it, choose its 16-bit storage dtype, walk it in chunks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kbit.errors import SpecError, WeightError

STORAGE_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
FLOAT16_MAX = torch.finfo(torch.float16).max


def storage_dtype_of(weight: Tensor, storage_dtype: torch.dtype | None = None) -> torch.dtype:
    """Return the 16-bit dtype that a weight is cast to first: the given one, its own if it has 16 bits, or float16.

    Raises:
        SpecError: `storage_dtype` is neither float16 nor bfloat16.
    """
    if storage_dtype is None:
        return weight.dtype if weight.dtype in STORAGE_DTYPES else torch.float16
    if storage_dtype not in STORAGE_DTYPES:
        raise SpecError("storage_dtype", storage_dtype, "torch.float16 or torch.bfloat16, or None for the weight's own")
    return storage_dtype


def check_weight(weight: Tensor) -> None:
    """Refuse what has no block-wise quantization.

    Raises:
        WeightError: not a floating-point tensor, without values, without dimensions, or on the meta device.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise WeightError(
            f"weight is {kind}: quantizing needs a floating-point tensor (float16, bfloat16, float32 or float64)"
        )
    if weight.ndim == 0 or weight.numel() == 0:
        raise WeightError(
            f"weight has shape {tuple(weight.shape)}: quantizing needs at least one dimension and one value"
        )
    if weight.is_meta:
        raise WeightError(
            f"weight of shape {tuple(weight.shape)} is on the meta device, without values: load the model first"
        )


def divided(values: Tensor, number: float) -> Tensor:
    """Return values / number, the same on every device: a GPU multiplies by the reciprocal of a Python number."""
    return values / values.new_full((), number)


def non_finite(what: str, dtype: torch.dtype) -> WeightError:
    name = STORAGE_DTYPES.get(dtype, "float32")
    return WeightError(f"{what} holds NaN or infinite values once cast to {name}: there is no absmax to scale it by")


def columns_of(weight: Tensor, outlier_columns: Tensor | list[int] | None) -> Tensor | None:
    """Return the kept columns as sorted int32 [m] on the weight's device; None if there are none.

    Raises:
        WeightError: columns of a tensor that is no matrix, not whole numbers, out of range, or named twice.
    """
    if outlier_columns is None:
        return None
    columns = torch.as_tensor(outlier_columns)
    if columns.numel() == 0:
        return None
    if weight.ndim != 2:
        raise WeightError(f"outlier_columns need a weight [out, in]; this one has shape {tuple(weight.shape)}")
    if columns.ndim != 1 or columns.is_floating_point() or columns.dtype == torch.bool:
        raise WeightError(
            f"outlier_columns must be a list of whole numbers, not {columns.dtype} of shape {tuple(columns.shape)}"
        )
    columns = columns.to(weight.device, torch.int64).sort().values
    if int(columns[0]) < 0 or int(columns[-1]) >= weight.shape[1] or bool((columns[1:] == columns[:-1]).any()):
        raise WeightError(
            f"outlier_columns must be distinct and from 0 to {weight.shape[1] - 1}: {columns.tolist()[:8]}"
        )
    return columns.to(torch.int32)


def chunk_length(device: torch.device) -> int:
    """Return how many values to work on at a time, a multiple of 8: they fit a CPU thread's cache, or fill a GPU."""
    return (1 << 17) * min(torch.get_num_threads(), 8) if device.type == "cpu" else 1 << 21


def chunks(flat: Tensor, dtype: torch.dtype, *, times: int = 1) -> Iterator[Tensor]:
    """Yield a flat tensor cast to `dtype`, `times` chunks at a time, so that no copy of all of it is made."""
    step = times * chunk_length(flat.device)
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].to(dtype)


def flattened(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return all values in row-major order; copied only if they don't lie so, and then in `dtype`."""
    weight = weight.detach()
    if not weight.is_contiguous():
        weight = weight.to(dtype).contiguous()
    return weight.view(-1)


def mean16(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean of the stored values as float16, 0-dim, saturated; summed in float64, to be the same on every device.

    Raises:
        WeightError: a value is NaN or infinite.
    """
    flat = flattened(weight, dtype)
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for chunk in chunks(flat, dtype):
        total += chunk.sum(dtype=torch.float64)
    mean = total / flat.numel()
    if not bool(mean.isfinite()):
        raise non_finite("weight", dtype)
    return mean.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16)
