"""The quantizer: block-wise (sections 2.2-2.3, Appendix B); its reference in plain torch, on any device.

Every step is a definition that the kernels (``kbit.kernels.blockwise``) meet to the bit: casting to the storage dtype,
cutting blocks (``kbit.quantizer.blocks``), rounding absmax before it is used, IEEE division, codes as counts of
midpoints (``kbit.quantizer.encode``), rounding to the storage dtype again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kbit.errors import SpecError
from kbit.quantizer import asymmetric
from kbit.quantizer.absmax import NestedAbsmax, load_absmax, stored_absmax
from kbit.quantizer.blocks import Blocks
from kbit.quantizer.clipping import clipped_absmax
from kbit.quantizer.codebooks import fitted_codebook, fixed_codebook, is_data_dependent
from kbit.quantizer.encode import Encoder
from kbit.quantizer.packed import Packed
from kbit.quantizer.packing import pack, packed_bytes, unpack
from kbit.quantizer.rotation import rotate, rotate_back
from kbit.quantizer.source import Source, kept_values
from kbit.quantizer.storage import check_weight, columns_of, mean16, non_finite, storage_dtype_of
from kbit.spec import QuantSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedTensor:
    """A quantized weight: what is stored of it, and what is needed to read it.

    Attributes:
        codes: uint8 [ceil(n k / 8)], codes of exactly k bits in row-major order (``kbit.quantizer.packing``); those of
        kept
            columns stand for zero.
        absmax: one per block, in order: float16 or float32 [blocks], or ``NestedAbsmax``.
        codebook: float32 [at most 2^k], sorted; with zero points the integers 0 to 2^k - 1.
        spec: how it was quantized.
        shape, dtype: the weight's, and the dequantized tensor's.
        storage_dtype: float16 or bfloat16: the weight was cast to it first, and dequantized values are rounded to it;
            float32 of ``quantize_wide``.
        mean: float16, 0-dim: subtracted first and added last; None without centering.
        kept_columns: int32 [m] input dimensions kept in 16 bits, ascending; None if none are.
        kept_values: storage dtype [out, m].
        zero_points: uint8 [ceil(blocks k / 8)], one of k bits per block, packed as codes are; or float16 [blocks] where
            they are no whole numbers (HQQ's); None without them.
    """

    codes: Tensor
    absmax: Tensor | NestedAbsmax
    codebook: Tensor
    spec: QuantSpec
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage_dtype: torch.dtype
    mean: Tensor | None = None
    kept_columns: Tensor | None = None
    kept_values: Tensor | None = None
    zero_points: Tensor | None = None

    @property
    def blocks(self) -> Blocks:
        """How the values are cut into blocks."""
        return Blocks.of(self.shape, self.spec)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbits(self) -> int:
        """Bits stored: codes, absmax, zero points, a data-dependent codebook (16 bits per value), mean, kept columns
        and their indices."""
        bits = 8 * self.codes.numel()
        bits += self.absmax.nbits if isinstance(self.absmax, NestedAbsmax) else 8 * self.absmax.nbytes
        if is_data_dependent(self.spec):
            bits += 16 * self.codebook.numel()
        bits += 8 * sum(t.nbytes for t in (self.mean, self.kept_columns, self.kept_values) if t is not None)
        return bits if self.zero_points is None else bits + 8 * self.zero_points.nbytes


def quantize(
    weight: Tensor,
    spec: QuantSpec,
    *,
    outlier_columns: Tensor | list[int] | None = None,
    storage_dtype: torch.dtype | None = None,
    impl: str = "auto",
    fitted: Tensor | None = None,
) -> QuantizedTensor:
    """Quantize a weight block by block.

    Args:
        weight: floating point, [out_features, in_features] or any other shape of one or more dimensions, on any device;
            isn't changed. Blocks of `scheme=group` lie along the last dimension.
        spec: bits 2 to 8. Its `outlier_fraction` is for whole models, where the previous layer is known; here columns
            are named.
        outlier_columns: input dimensions that stay in 16 bits (section 3).
        storage_dtype: float16 or bfloat16; None is the weight's own, or float16 if it is wider.
        impl: 'torch' is this reference; 'triton' are kernels for NVIDIA GPUs that give the same, to the bit; 'auto' is
            the faster one that runs on the weight's device.
        fitted: the codebook of a data-dependent type that was fitted to this weight before, as ``q.codebook`` has it,
            on any device; it is not changed. None fits it.

    Returns:
        The quantized tensor, on the weight's device. Beside it and the weight about 20 MB are used; with nested absmax
        also, while they are made, about 20 bytes per block; what a codebook's fit takes, its function says.

    Raises:
        SpecError: the spec is the 16-bit baseline, or `storage_dtype` has not 16 bits.
        WeightError: not floating point, empty, without dimensions or values, with NaN or infinite ones; columns that
            don't exist.
        ValueError: `impl` is unknown or can't run on the weight's device.
    """
    q, bad = quantize_async(
        weight, spec, outlier_columns=outlier_columns, storage_dtype=storage_dtype, impl=impl, fitted=fitted
    )
    if bad is not None and bool(bad):  # last, as it waits for a kernel
        raise non_finite("weight", q.storage_dtype)
    return q


@torch.no_grad()
def quantize_async(
    weight: Tensor,
    spec: QuantSpec,
    *,
    outlier_columns: Tensor | list[int] | None = None,
    storage_dtype: torch.dtype | None = None,
    impl: str = "auto",
    fitted: Tensor | None = None,
) -> tuple[QuantizedTensor, Tensor | None]:
    """``quantize``, but where one kernel does all, the caller waits for it to hear whether all values are finite.

    Returns:
        The quantized tensor; and int32 [1] on the weight's device, not zero if a value was NaN or infinite, so that the
        tensor is not to be used; or None where that has been asked.

    Raises:
        As ``quantize``.
    """
    if spec.is_baseline:
        raise SpecError("bits", spec.bits, "2 to 8 to quantize; the 16-bit baseline stores the weight as it is")
    check_weight(weight)
    dtype = storage_dtype_of(weight, storage_dtype)
    columns = columns_of(weight, outlier_columns)
    spec = spec.of_row(weight.shape[-1])
    impl = _chosen(impl, weight.device, spec)
    source = source_of(weight, dtype, columns, spec)
    own = None
    if is_data_dependent(spec):
        own = fitted_codebook(spec, source) if fitted is None else fitted.to(source.device, copy=True)
    values = fixed_codebook(spec, weight.device) if own is None else own
    blocks = Blocks.of(tuple(weight.shape), spec)
    bad = zero_points = None
    if impl == "triton":
        from kbit.kernels.blockwise import quantize_values  # triton may be absent

        clipped = clipped_absmax(source, blocks, spec, values) if spec.clip else None
        codes, absmax, bad = quantize_values(source, blocks, spec, own, clipped)
    else:
        codes, absmax, zero_points = _by_reference(source, blocks, spec, values)
    q = QuantizedTensor(
        codes=codes,
        absmax=absmax,
        codebook=values.clone() if own is None else own,
        spec=spec,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        storage_dtype=dtype,
        mean=source.mean,
        kept_columns=columns,
        kept_values=kept_values(weight, dtype, columns),
        zero_points=zero_points,
    )
    return q, bad


@torch.no_grad()
def quantize_wide(values: Tensor, spec: QuantSpec, *, fitted: Tensor | None = None) -> QuantizedTensor:
    """Quantize float32 values that were made of a 16-bit weight, without casting them to 16 bits again.

    ``dequantize`` gives float32 values, which are not rounded to 16 bits either. Plain torch on every device.

    Args:
        values: float32, finite; they are not changed.
        spec: as of ``quantize``.
        fitted: as of ``quantize``.

    Raises:
        WeightError: a value is NaN or infinite.
    """
    spec = spec.of_row(values.shape[-1])
    wide = torch.float32
    source = Source(values, wide, None, mean16(values, wide) if spec.center else None)
    own = None
    if is_data_dependent(spec):
        own = fitted_codebook(spec, source) if fitted is None else fitted.to(source.device, copy=True)
    book = fixed_codebook(spec, values.device) if own is None else own
    codes, absmax, zero_points = _by_reference(source, Blocks.of(tuple(values.shape), spec), spec, book)
    return QuantizedTensor(
        codes=codes,
        absmax=absmax,
        codebook=book.clone() if own is None else own,
        spec=spec,
        shape=tuple(values.shape),
        dtype=wide,
        storage_dtype=wide,
        mean=source.mean,
        zero_points=zero_points,
    )


@torch.no_grad()
def dequantize(q: QuantizedTensor, *, impl: str = "auto", out: Tensor | None = None) -> Tensor:
    """Return the weight that `q` stands for: its shape, dtype and device, values rounded to the storage dtype.

    codebook[code] · absmax (+ mean) in float32, two roundings and no fused multiply-add; with zero points
    (code - zero) · absmax. Values that would round beyond
    the storage dtype's range are saturated.

    Args:
        q: the quantized weight.
        impl: as in ``quantize``.
        out: of that shape, dtype and device: it is written to, and returned. Where it is contiguous no other memory is
            used for the values.

    Raises:
        ValueError: `impl` is unknown or can't run on its device; the codes aren't as many as `q` has values; `out` has
            another shape, dtype or device.
    """
    device, nbytes = q.codes.device, packed_bytes(q.numel, q.spec.bits)
    impl = _chosen("torch" if q.storage_dtype == torch.float32 else impl, device, q.spec)
    if q.codes.numel() != nbytes:
        raise ValueError(f"{q.numel} codes of {q.spec.bits} bits take {nbytes} bytes, not {q.codes.numel()}")
    if out is not None and (out.shape, out.dtype, out.device) != (torch.Size(q.shape), q.dtype, device):
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} on {out.device}, not {q.dtype} {list(q.shape)} on {device}"
        )
    packed = Packed(
        codes=q.codes,
        absmax=load_absmax(q.absmax),
        codebook=q.codebook,
        mean=q.mean,
        bits=q.spec.bits,
        blocks=q.blocks,
        zero=None if q.zero_points is None else zeros_of(q).float(),
    )
    if q.spec.rotation is not None:
        flat = torch.empty(q.shape, dtype=torch.float32, device=device)
        _fill(flat.view(-1), packed, torch.float32)
        limit = torch.finfo(q.storage_dtype).max
        turned = rotate_back(flat, q.spec.rotation).clamp_(-limit, limit).to(q.storage_dtype)
        return _with_kept(turned.to(q.dtype) if out is None else out.copy_(turned), q)
    straight = out is not None and out.is_contiguous()
    values = out if out is not None and straight else torch.empty(q.shape, dtype=q.dtype, device=device)
    if impl == "triton":
        from kbit.kernels.blockwise import dequantize_values  # triton may be absent

        loads = q.dtype in (torch.float16, torch.bfloat16, torch.float32)
        narrow = values if loads else torch.empty(q.shape, dtype=q.storage_dtype, device=device)
        dequantize_values(packed, narrow, dtype=q.storage_dtype)
        if narrow is not values:
            values.copy_(narrow)
    else:
        _fill(values.view(-1), packed, q.storage_dtype)
    _with_kept(values, q)
    return values if out is None or straight else out.copy_(values)


def _by_reference(
    source: Source, blocks: Blocks, spec: QuantSpec, values: Tensor
) -> tuple[Tensor, Tensor | NestedAbsmax, Tensor | None]:
    """Return packed codes, absmax, and packed zero points where there are any."""
    if spec.zero_point:
        return asymmetric.quantize_values(source, blocks, spec.bits)
    absmax = clipped_absmax(source, blocks, spec, values) if spec.clip else stored_absmax(source, blocks, spec)
    return _codes(source, blocks, load_absmax(absmax), Encoder(values), spec.bits), absmax, None


def _with_kept(values: Tensor, q: QuantizedTensor) -> Tensor:
    """Put the kept columns' values in their places."""
    if q.kept_columns is not None and q.kept_values is not None:
        values[:, q.kept_columns.long()] = q.kept_values.to(q.dtype)
    return values


def source_of(weight: Tensor, dtype: torch.dtype, columns: Tensor | None, spec: QuantSpec) -> Source:
    """Return a weight's values as they are quantized; those of a rotation in float32, which no kept column enters."""
    if spec.rotation is None:
        return Source(weight, dtype, columns, mean16(weight, dtype) if spec.center else None)
    stored = weight.detach().to(dtype).float()
    if not bool(stored.isfinite().all()):
        raise non_finite("weight", dtype)
    if columns is not None:
        stored = stored.index_fill(1, columns.long(), 0)
    rotated = rotate(stored, spec.rotation)
    return Source(rotated, torch.float32, None, mean16(rotated, torch.float32) if spec.center else None)


def zeros_of(q: QuantizedTensor) -> Tensor:
    """Return the zero points of a tensor that has some: uint8 or float16 [blocks]."""
    assert q.zero_points is not None
    assert isinstance(q.absmax, Tensor)
    return unpacked_zeros(q.zero_points, q.spec.bits, q.absmax.numel())


def unpacked_zeros(zero_points: Tensor, bits: int, blocks: int) -> Tensor:
    """Return as many zero points, uint8 or float16, stored as ``QuantizedTensor`` has them."""
    return zero_points if zero_points.dtype == torch.float16 else unpack(zero_points, bits, blocks)


def _chosen(impl: str, device: torch.device, spec: QuantSpec) -> str:
    from kbit.kernels.availability import choose_blockwise  # kernels import the reference, which asks for them late

    if spec.zero_point or spec.rotation is not None:
        what = "zero points (zero_point=true)" if spec.zero_point else "rotations"
        if impl == "triton":
            raise ValueError(f"impl='triton': its kernels know no {what}; use 'torch' or 'auto'")
        impl = "torch" if impl == "auto" else impl
    return choose_blockwise(impl, device)


def _fill(flat: Tensor, packed: Packed, dtype: torch.dtype) -> None:
    """Fill in the values of a dequantized tensor in row-major order, rounded to `dtype`; not the kept columns."""
    limit = torch.finfo(dtype).max
    lowest, highest = (float(v) for v in torch.aminmax(packed.absmax))
    largest = max(-lowest, highest)
    if packed.zero is not None:
        largest *= (1 << packed.bits) + float(packed.zero.abs().max())
    overflows = largest + (0.0 if packed.mean is None else abs(float(packed.mean))) > limit
    for piece in packed.blocks.pieces(flat.device):
        values = packed.values(piece)
        if overflows:
            values.clamp_(-limit, limit)
        flat[piece.start : piece.stop] = values.to(dtype)


def _codes(source: Source, blocks: Blocks, absmax: Tensor, encode: Encoder, bits: int) -> Tensor:
    """Packed codes. Pieces begin at multiples of 8 values, that is at whole bytes."""
    packed = torch.empty(packed_bytes(blocks.rows * blocks.length, bits), dtype=torch.uint8, device=source.device)
    for piece in blocks.pieces(source.device, source.row):
        values = source[piece]
        piece.divide_(values, absmax)
        packed[piece.start * bits // 8 : packed_bytes(piece.stop, bits)] = pack(encode(values), bits)
    return packed
