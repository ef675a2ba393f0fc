"""Triton: GPTQ's columns of a segment, one after another, each row of the weight by itself."""

# ruff: noqa: N803, PLR0913
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def round_columns(
    w_ptr,
    upper_ptr,
    groups_ptr,
    scale_ptr,
    zero_ptr,
    points_ptr,
    codebook_ptr,
    codes_ptr,
    errors_ptr,
    rows,
    width,
    w_stride,
    upper_stride,
    scale_stride,
    codes_stride,
    size,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    REFRESHES: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    STORAGE: tl.constexpr,
    LIMIT: tl.constexpr,
    HALF_SCALES: tl.constexpr,
    HALF_LIMIT: tl.constexpr,
):
    """Round `width` columns of ROWS rows; what remains of the columns to come stays in registers.

    Args:
        w_ptr: float32, rows by `w_stride`.
        upper_ptr: float32, upper triangular, rows by `upper_stride`.
        groups_ptr: int64 [width].
        scale_ptr: float16 or float32, rows by `scale_stride`; written where groups are measured here.
        zero_ptr: float32, the same.
        points_ptr: float32 [2^BITS], midpoints, then infinity.
        codebook_ptr: float32 [2^BITS].
        codes_ptr: uint8, rows by `codes_stride`: written.
        errors_ptr: float32 [rows, width]: written.
        size: columns of a group.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    is_row = row < rows
    is_column = column < width
    tile = tl.load(
        w_ptr + row[:, None] * w_stride + column[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0
    )
    scale = tl.zeros([ROWS], tl.float32)
    zero = tl.zeros([ROWS], tl.float32)
    for i in range(width):
        place = row * scale_stride + tl.load(groups_ptr + i)
        if REFRESHES:
            if i % size == 0:
                inside = (column >= i) & (column < i + size) & is_column
                scale, zero = _measured(tl.where(inside[None, :], tile, 0.0), BITS, ASYMMETRIC, HALF_SCALES, HALF_LIMIT)
                tl.store(scale_ptr + place, scale, mask=is_row)
                if ASYMMETRIC:
                    tl.store(zero_ptr + place, zero, mask=is_row)
        else:
            scale = tl.load(scale_ptr + place, mask=is_row, other=0.0).to(tl.float32)
            if ASYMMETRIC:
                zero = tl.load(zero_ptr + place, mask=is_row, other=0.0)
        x = tl.sum(tl.where(column[None, :] == i, tile, 0.0), axis=1)
        y = tl.div_rn(x, tl.where(scale == 0.0, float("inf"), scale))
        if ASYMMETRIC:
            code = _round(y) + zero
            code = tl.minimum(tl.maximum(code, 0.0), (1 << BITS) - 1.0)
            value = (code - zero) * scale
            tl.store(codes_ptr + row * codes_stride + i, code.to(tl.uint8), mask=is_row)
        else:
            below = tl.zeros([ROWS], tl.int32)
            for bit in tl.static_range(BITS):
                point = tl.load(points_ptr + below + ((1 << (BITS - 1 - bit)) - 1))
                below = tl.where(point < y, below + (1 << (BITS - 1 - bit)), below)
            value = tl.load(codebook_ptr + below) * scale
            tl.store(codes_ptr + row * codes_stride + i, below.to(tl.uint8), mask=is_row)
        value = tl.minimum(tl.maximum(value, -LIMIT), LIMIT).to(STORAGE).to(tl.float32)
        error = tl.div_rn(x - value, tl.load(upper_ptr + i * upper_stride + i))
        tl.store(errors_ptr + row * width + i, error, mask=is_row)
        later = tl.load(upper_ptr + i * upper_stride + column, mask=(column > i) & is_column, other=0.0)
        tile = tile - later[None, :] * error[:, None]


@triton.jit
def _measured(
    values,
    BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    HALF_SCALES: tl.constexpr,
    HALF_LIMIT: tl.constexpr,
):
    """Return scales and zero points of a group, float32, by its values [ROWS, columns], zeros outside of it."""
    if ASYMMETRIC:
        low = tl.min(values, axis=1)
        high = tl.max(values, axis=1)
        top: tl.constexpr = (1 << BITS) - 1.0
        scale = tl.div_rn(high - low, tl.full(low.shape, top, tl.float32))
        scale = tl.minimum(scale, HALF_LIMIT).to(tl.float16).to(tl.float32)
        zero = _round(tl.div_rn(0.0 - low, tl.where(scale == 0.0, float("inf"), scale)))
        zero = tl.minimum(tl.maximum(zero, 0.0), top)
    else:
        scale = tl.max(tl.abs(values), axis=1)
        zero = tl.zeros_like(scale)
        if HALF_SCALES:
            scale = tl.minimum(scale, HALF_LIMIT).to(tl.float16).to(tl.float32)
    return scale, zero


@triton.jit
def _round(x):
    """The nearest whole number; a tie goes to the even one. For magnitudes that float32 has halves of, and larger."""
    floor = tl.floor(x)
    part = x - floor
    odd = floor - 2.0 * tl.floor(floor * 0.5)
    up = (part > 0.5) | ((part == 0.5) & (odd == 1.0))
    return tl.where(up, floor + 1.0, floor)
