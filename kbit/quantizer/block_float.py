"""Block-scaled floats of a tensor: MX formats and NVFP4, in plain torch on any device; every device gives the same.

Elements are rounded to the nearest value of the format, ties to the even code (IEEE), in these formats only; what is
beyond the largest saturates. An MX block's scale is E8M0, 2^(floor(log2 absmax) - emax) (OCP Microscaling 1.0, section
6.3) or with ceil; an NVFP4 block's is E4M3 under a float32 scale of the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import frexp, prod
from typing import Final

import torch
from torch import Tensor

from kbit.quantizer.encode import Encoder
from kbit.quantizer.packing import pack, packed_bytes, unpack
from kbit.quantizer.storage import check_weight, chunk_length, divided, non_finite, storage_dtype_of
from kbit.specs.block_float import FORMATS, TENSOR_SCALE_BITS, BlockFloatSpec, ElementFormat

E8M0_BIAS: Final = 127
FP4_LARGEST: Final = FORMATS["nvfp4"].largest
E4M3: Final = FORMATS["mxfp8_e4m3"]
_GPU_CHUNKS: Final = 8
"""Chunks at a time on a GPU: 2^24 values, so that a large layer takes few launches and some 300 MB."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockFloatTensor:
    """A weight in a block-scaled float format.

    Attributes:
        codes: uint8 [ceil(n k / 8)], codes of exactly k bits in row-major order (``kbit.quantizer.packing``): sign,
            exponent, fraction, as the format has them.
        scales: uint8 [rows, blocks of a row]: E8M0 (biased by 127), or E4M3 in NVFP4.
        tensor_scale: float32, 0-dim, of NVFP4; None for MX formats.
        spec: the format.
        shape, dtype: the weight's, and the dequantized tensor's.
        storage_dtype: float16 or bfloat16: the weight was cast to it first, and dequantized values are rounded to it.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    spec: BlockFloatSpec
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage_dtype: torch.dtype

    @property
    def nbits(self) -> int:
        """Bits stored: codes, scales, and the tensor's scale where there is one."""
        return 8 * (self.codes.numel() + self.scales.numel()) + TENSOR_SCALE_BITS * (self.tensor_scale is not None)


@torch.no_grad()
def quantize_block_float(
    weight: Tensor, spec: BlockFloatSpec, *, storage_dtype: torch.dtype | None = None
) -> BlockFloatTensor:
    """Quantize a weight to a block-scaled float format.

    Args:
        weight: floating point, of one or more dimensions; blocks lie along the last, and a row's last one may be short.
        spec: the format.
        storage_dtype: float16 or bfloat16 to cast it to first; None is the weight's own, or float16.

    Raises:
        WeightError: not floating point, empty, or with NaN or infinite values.
    """
    check_weight(weight)
    dtype = storage_dtype_of(weight, storage_dtype)
    element, length = spec.element, weight.shape[-1]
    rows = prod(weight.shape[:-1])
    flat = weight.detach().reshape(rows, length)
    per_row = -(-length // element.block)
    absmax = torch.cat([_blocks_of(flat[part].to(dtype), element.block).abs().amax(-1) for part in _parts(flat)])
    if not bool(absmax.isfinite().all()):
        raise non_finite("weight", dtype)
    absmax = absmax.float()
    tensor_scale = _tensor_scale(absmax, element) if element.tensor_scaled else None
    scales = _e8m0(absmax, element, spec.scale_rounding) if tensor_scale is None else _e4m3(absmax, tensor_scale)
    factor = _factors(scales, tensor_scale)
    encode = _encoder(element, weight.device)
    sign = 1 << (spec.bits - 1)
    codes = torch.empty(packed_bytes(rows * length, spec.bits), dtype=torch.uint8, device=weight.device)
    for part in _parts(flat):
        values = _blocks_of(flat[part].to(dtype).float(), element.block)
        divisor = factor[part].unsqueeze(-1)
        scaled = values.abs().div_(torch.where(divisor == 0, torch.inf, divisor))
        of_part = encode(scaled.view(-1)).add_(values.view(-1).signbit(), alpha=sign)
        of_part = of_part.view(-1, per_row * element.block)[:, :length].reshape(-1)
        start = part.start * length * spec.bits // 8
        packed = pack(of_part, spec.bits)
        codes[start : start + packed.numel()] = packed
    return BlockFloatTensor(
        codes=codes,
        scales=scales,
        tensor_scale=tensor_scale,
        spec=spec,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        storage_dtype=dtype,
    )


@torch.no_grad()
def dequantize_block_float(q: BlockFloatTensor, *, out: Tensor | None = None) -> Tensor:
    """Return what the codes stand for, element x scale in float32, rounded to the storage dtype and saturated there.

    Args:
        q: the quantized weight.
        out: of its shape, dtype and device, written to and returned; None makes it.
    """
    element, length, device = q.spec.element, q.shape[-1], q.codes.device
    limit = torch.finfo(q.storage_dtype).max
    result = torch.empty(q.shape, dtype=q.dtype, device=device) if out is None else out
    # A weight that lies transposed (Conv1D) is written through its own view, row by row.
    rows = result.view(-1, length) if result.is_contiguous() or result.ndim == 1 else result
    factor, table = _factors(q.scales, q.tensor_scale), code_values(element, device)
    for part in _parts(rows):
        count = (part.stop - part.start) * length
        start = part.start * length * q.spec.bits // 8
        codes = unpack(q.codes[start : start + packed_bytes(count, q.spec.bits)], q.spec.bits, count)
        values = _blocks_of(table[codes.int()].view(-1, length), element.block).mul_(factor[part].unsqueeze(-1))
        values = values.view(values.shape[0], -1)[:, :length]
        rows[part] = values.clamp_(-limit, limit).to(q.storage_dtype).to(q.dtype)
    return result


@lru_cache(maxsize=32)
def code_values(element: ElementFormat, device: torch.device) -> Tensor:
    """Return the value of each code, float32 [2^k]; 0 for the codes that are not used. Not to be changed."""
    magnitudes = torch.zeros(1 << (element.bits - 1), dtype=torch.float32, device="cpu")  # whatever the default one is
    known = torch.tensor(element.magnitudes(), dtype=torch.float32, device="cpu")
    magnitudes[: known.numel()] = known
    return torch.cat([magnitudes, -magnitudes]).to(device)


@lru_cache(maxsize=32)
def _encoder(element: ElementFormat, device: torch.device) -> Encoder:
    """Return what gives codes of magnitudes: how many limits lie below; a tie with an odd code below it goes up."""
    magnitudes = torch.tensor(element.magnitudes(), dtype=torch.float32, device="cpu")
    limits = (magnitudes[:-1] + magnitudes[1:]) / 2
    limits[1::2] = limits[1::2].nextafter(torch.tensor(-torch.inf, device="cpu"))
    return Encoder.of_limits(limits.to(device))


def _parts(flat: Tensor) -> Iterator[slice]:
    """Yield rows in pieces; each begins at a multiple of 8 rows, that is of packed codes at a whole byte."""
    values = chunk_length(flat.device) * (_GPU_CHUNKS if flat.is_cuda else 1)
    step = 8 * max(1, values // (8 * flat.shape[1]))
    for start in range(0, flat.shape[0], step):
        yield slice(start, min(start + step, flat.shape[0]))


def _blocks_of(rows: Tensor, block: int) -> Tensor:
    """Return [rows, length] as [rows, blocks, block], the last block filled with zeros."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % block))
    return padded.contiguous().view(rows.shape[0], -1, block)


def _e8m0(absmax: Tensor, element: ElementFormat, rounding: str | None) -> Tensor:
    """Return biased exponents of scales; a block of zeros has the smallest."""
    fraction, exponent = torch.frexp(absmax)  # absmax = fraction 2^exponent, fraction in [1/2, 1)
    power = exponent - 1
    if rounding == "ceil":
        power = power + (fraction > 0.5)
    power = power - (frexp(element.largest)[1] - 1) + E8M0_BIAS
    return torch.where(absmax > 0, power.clamp(0, 2 * E8M0_BIAS), 0).to(torch.uint8)


def _tensor_scale(absmax: Tensor, element: ElementFormat) -> Tensor:
    return divided(absmax.amax(), E4M3.largest * element.largest)


def _e4m3(absmax: Tensor, tensor_scale: Tensor) -> Tensor:
    """Return E4M3 codes of absmax / 6 / tensor scale, rounded to nearest even; 0 where the tensor's scale is."""
    scaled = divided(absmax, FP4_LARGEST).div_(torch.where(tensor_scale == 0, torch.inf, tensor_scale))
    return _encoder(E4M3, absmax.device)(scaled.view(-1)).view(absmax.shape)


def _factors(scales: Tensor, tensor_scale: Tensor | None) -> Tensor:
    """Return what a block's elements are multiplied by: float32, of the scales' shape."""
    if tensor_scale is None:
        return _powers(scales.device)[scales.int()]
    return code_values(E4M3, scales.device)[scales.int()] * tensor_scale


@lru_cache(maxsize=8)
def _powers(device: torch.device) -> Tensor:
    """Return the value of each E8M0 code: float32 [256]; the code of NaN, which is not used, has 0."""
    return torch.tensor(
        [2.0 ** (code - E8M0_BIAS) for code in range(255)] + [0.0], dtype=torch.float32, device="cpu"
    ).to(device)
