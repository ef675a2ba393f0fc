"""HQQ of a tensor: zero points by half-quadratic optimisation, in plain torch on any device (Badri & Shaji 2023).

Scale and zero point of a group begin at its range. The scale stays; the zero point follows from alternating two steps:
the error that a sparse term explains, e = shrink(W - dequantized), and the zero point at which the rest is best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final, NamedTuple

import torch
from torch import Tensor

from kbit.quantizer.blockwise import QuantizedTensor
from kbit.quantizer.codebooks import fixed_codebook
from kbit.quantizer.packing import pack, packed_bytes, unpack
from kbit.quantizer.storage import FLOAT16_MAX, check_weight, chunk_length, divided, non_finite, storage_dtype_of
from kbit.specs.base import ROW
from kbit.specs.hqq import HqqSpec

NORM: Final = 0.7
"""p: the error's norm that is made small."""
BETA: Final = 10.0
KAPPA: Final = 1.01
"""What beta is multiplied by after each round."""
ROUNDS: Final = 20
LARGEST_ZERO: Final = 2048
"""Of a zero point: up to here float16 has every whole number. A group far from zero gets a larger scale for it."""
_GPU_CHUNKS: Final = 8
"""Chunks at a time on a GPU: 2^24 values, of which five float32 copies take 340 MB."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HqqTensor:
    """A weight in HQQ's form: (code - zero) * scale.

    Attributes:
        codes: uint8 [ceil(n k / 8)], codes of exactly k bits in row-major order (``kbit.quantizer.packing``).
        scale, zero: float16 [rows, groups of a row].
        spec: bits and group size.
        shape, dtype: the weight's, and the dequantized tensor's.
        storage_dtype: float16 or bfloat16: the weight was cast to it first, and dequantized values are rounded to it.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    spec: HqqSpec
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage_dtype: torch.dtype

    @property
    def nbits(self) -> int:
        """Bits stored: codes, scales, zero points."""
        return 8 * (self.codes.numel() + self.scale.nbytes + self.zero.nbytes)


class _Span(NamedTuple):
    """Some rows of a matrix and the columns of their whole groups, or of their short last ones."""

    rows: slice
    columns: slice
    groups: slice
    width: int

    def of(self, matrix: Tensor) -> Tensor:
        """Return its values as [rows, groups, width]."""
        return matrix[self.rows, self.columns].reshape(self.rows.stop - self.rows.start, -1, self.width)


@torch.no_grad()
def quantize_hqq(weight: Tensor, spec: HqqSpec, *, storage_dtype: torch.dtype | None = None) -> HqqTensor:
    """Quantize a weight by HQQ.

    Args:
        weight: floating point, of one or more dimensions; groups lie along the last, and a row's last one may be short.
        spec: bits and group size.
        storage_dtype: float16 or bfloat16 to cast it to first; None is the weight's own, or float16.

    Raises:
        WeightError: not floating point, empty, or with NaN or infinite values.
    """
    check_weight(weight)
    dtype = storage_dtype_of(weight, storage_dtype)
    length, rows = weight.shape[-1], prod(weight.shape[:-1])
    matrix = weight.detach().reshape(rows, length)
    size = _group_size(spec, length)
    spans = list(_spans(matrix, size))
    groups = -(-length // size)
    scale, zero = (torch.empty(rows, groups, device=weight.device) for _ in range(2))
    finite = torch.ones((), dtype=torch.bool, device=weight.device)
    for span in spans:
        own = span.of(matrix).to(dtype).float()
        finite &= own.isfinite().all()
        scale[span.rows, span.groups], zero[span.rows, span.groups] = _range(own, spec.bits)
    if not bool(finite):
        raise non_finite("weight", dtype)
    _optimise(matrix, spans, scale, zero, dtype=dtype, bits=spec.bits)
    zero = zero.clamp_(-FLOAT16_MAX, FLOAT16_MAX).half()
    return HqqTensor(
        codes=_codes(matrix, spans, scale, zero.float(), dtype=dtype, bits=spec.bits),
        scale=scale.half(),
        zero=zero,
        spec=spec,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        storage_dtype=dtype,
    )


@torch.no_grad()
def dequantize_hqq(q: HqqTensor, *, out: Tensor | None = None) -> Tensor:
    """Return (code - zero) * scale in float32, rounded to the storage dtype and saturated there.

    Args:
        q: the quantized weight.
        out: of its shape, dtype and device, written to and returned; None makes it.
    """
    length, size = q.shape[-1], _group_size(q.spec, q.shape[-1])
    result = torch.empty(q.shape, dtype=q.dtype, device=q.codes.device) if out is None else out
    matrix = result.view(-1, length) if result.is_contiguous() or result.ndim == 1 else result
    limit, bits = torch.finfo(q.storage_dtype).max, q.spec.bits
    for rows in _rows(matrix):
        count = (rows.stop - rows.start) * length
        start = rows.start * length * bits // 8
        values = unpack(q.codes[start : start + packed_bytes(count, bits)], bits, count).view(-1, length).float()
        values.sub_(_spread(q.zero[rows], size, length)).mul_(_spread(q.scale[rows], size, length))
        matrix[rows] = values.clamp_(-limit, limit).to(q.storage_dtype).to(q.dtype)
    return result


def as_blockwise(q: HqqTensor) -> QuantizedTensor:
    """Return a weight in the form of block-wise quantization, which stands for the same values: its tensors, shared.

    Its zero points are float16.
    """
    spec = q.spec.blockwise(q.shape[-1])
    return QuantizedTensor(
        codes=q.codes,
        absmax=q.scale.view(-1),
        codebook=fixed_codebook(spec, q.codes.device).clone(),
        spec=spec,
        shape=q.shape,
        dtype=q.dtype,
        storage_dtype=q.storage_dtype,
        zero_points=q.zero.view(-1),
    )


def _group_size(spec: HqqSpec, length: int) -> int:
    return length if spec.blocksize == ROW else min(spec.blocksize, length)


def _spread(of_groups: Tensor, size: int, length: int) -> Tensor:
    """Return a group's number for each value of a row: float32 [rows, length]."""
    return of_groups.float().repeat_interleave(size, dim=1)[:, :length]


def _range(own: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale (of float16 values) and zero point of groups [rows, groups, width]: float32 [rows, groups]."""
    least, most = own.aminmax(dim=-1)
    largest = torch.maximum(least.abs(), most.abs())
    scale = (
        torch.maximum(divided(most - least, 2**bits - 1), largest / LARGEST_ZERO).clamp(max=FLOAT16_MAX).half().float()
    )
    # Below float16's smallest numbers: the group is one value, or nothing.
    scale = torch.where(scale == 0, largest.half().float(), scale)
    return scale, -least / _divisor(scale)


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


def _optimise(
    matrix: Tensor, spans: Sequence[_Span], scale: Tensor, zero: Tensor, *, dtype: torch.dtype, bits: int
) -> None:
    """Change the zero points, in place, until the tensor's mean absolute error rises, or for 20 rounds.

    As the published code has it, the round in which it rises still counts. A GPU is not waited for: it goes through all
    rounds, of which those after the last one change nothing.
    """
    active = torch.ones((), dtype=torch.bool, device=matrix.device)
    best = torch.full((), torch.inf, dtype=torch.float64, device=matrix.device)
    beta = BETA
    for _ in range(ROUNDS):
        error = torch.zeros((), dtype=torch.float64, device=matrix.device)
        for span in spans:
            own = span.of(matrix).to(dtype).float()
            at = (span.rows, span.groups)
            found, of_span = _round(own, scale[at].unsqueeze(-1), zero[at].unsqueeze(-1), beta=beta, bits=bits)
            zero[at] = torch.where(active, found, zero[at])
            error += of_span
        active &= error < best
        best = torch.minimum(best, error)
        beta *= KAPPA
        if not active.is_cuda and not bool(active):
            return


def _round(own: Tensor, scale: Tensor, zero: Tensor, *, beta: float, bits: int) -> tuple[Tensor, Tensor]:
    """Return the next zero points [rows, groups], and the sum of the absolute errors at the present ones, float64.

    `own` is overwritten.
    """
    divisor = _divisor(scale)
    codes = (own / divisor).add_(zero).round_().clamp_(0, 2**bits - 1)
    error = own - (codes - zero).mul_(scale)
    explained = error.abs()
    total = explained.sum(dtype=torch.float64)
    # shrink: sign(e) max(|e| - |e|^(p - 1) / beta, 0). At 0 the power is infinite, and the result 0.
    explained = explained.sub_(explained.pow(NORM - 1).div_(beta)).clamp_min_(0).copysign_(error)
    rest = own.sub_(explained).div_(divisor)
    return codes.sub_(rest).mean(-1), total


def _codes(
    matrix: Tensor, spans: Sequence[_Span], scale: Tensor, zero: Tensor, *, dtype: torch.dtype, bits: int
) -> Tensor:
    """Return packed codes. Rows come in pieces that begin at whole bytes."""
    rows, length = matrix.shape
    packed = torch.empty(packed_bytes(rows * length, bits), dtype=torch.uint8, device=matrix.device)
    for piece in _rows(matrix):
        codes = torch.empty(piece.stop - piece.start, length, dtype=torch.uint8, device=matrix.device)
        for span in spans:
            if span.rows == piece:
                at = (span.rows, span.groups)
                own = span.of(matrix).to(dtype).float().div_(_divisor(scale[at]).unsqueeze(-1))
                own = own.add_(zero[at].unsqueeze(-1)).round_().clamp_(0, 2**bits - 1)
                codes[:, span.columns] = own.view(codes.shape[0], -1).to(torch.uint8)
        start = piece.start * length * bits // 8
        of_piece = pack(codes.view(-1), bits)
        packed[start : start + of_piece.numel()] = of_piece
    return packed


def _rows(matrix: Tensor) -> Iterator[slice]:
    """Yield rows in pieces; each begins at a multiple of 8 rows, that is of packed codes at a whole byte."""
    values = chunk_length(matrix.device) * (_GPU_CHUNKS if matrix.is_cuda else 1)
    step = 8 * max(1, values // (8 * matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        yield slice(start, min(start + step, matrix.shape[0]))


def _spans(matrix: Tensor, blocksize: int) -> Iterator[_Span]:
    """Yield a matrix in pieces of rows, the short last groups of rows apart."""
    length = matrix.shape[1]
    whole = length // blocksize
    for rows in _rows(matrix):
        if whole:
            yield _Span(rows, slice(0, whole * blocksize), slice(0, whole), blocksize)
        if length % blocksize:
            yield _Span(rows, slice(whole * blocksize, length), slice(whole, whole + 1), length % blocksize)
