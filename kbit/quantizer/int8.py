"""int8 with one scale per row: the weights of LLM.int8() (Dettmers et al. 2022, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kbit.quantizer.storage import FLOAT16_MAX, check_weight, divided, non_finite, storage_dtype_of

LARGEST_CODE: Final = 127
_PIECE: Final = 1 << 24
"""Values that are worked on at once, in float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Int8Rows:
    """A weight in int8.

    Attributes:
        codes: int8 [out_features, in_features], from -127 to 127.
        absmax: float16 [out_features]: a row is codes / 127 · absmax.
        storage_dtype: float16 or bfloat16: the weight was cast to it first, and dequantized values are rounded to it.
    """

    codes: Tensor
    absmax: Tensor
    storage_dtype: torch.dtype

    @property
    def nbits(self) -> int:
        """Bits stored: codes and row scales."""
        return 8 * (self.codes.nbytes + self.absmax.nbytes)


def quantize_rows(weight: Tensor, *, storage_dtype: torch.dtype | None = None) -> Int8Rows:
    """Quantize each row by its absmax, rounded to float16 before it is used.

    Args:
        weight: floating point, [out_features, in_features].
        storage_dtype: 16 bits that it is cast to first; None is its own, or float16.

    Raises:
        WeightError: no matrix of floating point, or NaN or infinite values.
    """
    check_weight(weight)
    dtype = storage_dtype_of(weight, storage_dtype)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(weight.shape[0], dtype=torch.float16, device=weight.device)
    finite = torch.ones((), dtype=torch.bool, device=weight.device)
    for first, last in row_pieces(weight):
        values = weight[first:last].to(dtype).float()
        largest = values.abs().amax(1)
        finite &= largest.isfinite().all()
        absmax[first:last] = largest.clamp(max=FLOAT16_MAX)
        codes[first:last] = to_codes(values, absmax[first:last].float())
    if not bool(finite):
        raise non_finite("weight", dtype)
    return Int8Rows(codes=codes, absmax=absmax, storage_dtype=dtype)


def to_codes(values: Tensor, absmax: Tensor) -> Tensor:
    """Return int8 codes of rows: the nearest of 127 · value / absmax, ties to even; 0 where absmax is 0.

    Args:
        values: float32 [rows, columns].
        absmax: float32 [rows].
    """
    divisor = torch.where(absmax == 0, torch.inf, absmax).unsqueeze(1)
    return (values / divisor * LARGEST_CODE).round().clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)


def dequantize_rows(q: Int8Rows, columns: Tensor | None = None) -> Tensor:
    """Return the weight that `q` stands for, in the storage dtype; of some columns, int64 [m], where they are given."""
    codes = q.codes if columns is None else q.codes.index_select(1, columns)
    return (divided(codes.float(), LARGEST_CODE) * q.absmax.float().unsqueeze(1)).to(q.storage_dtype)


def row_pieces(weight: Tensor) -> list[tuple[int, int]]:
    """Return [first, last) of runs of rows that are worked on at once."""
    step = max(1, _PIECE // weight.shape[1])
    return [(first, min(first + step, weight.shape[0])) for first in range(0, weight.shape[0], step)]
