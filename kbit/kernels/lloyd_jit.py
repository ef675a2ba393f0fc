"""Triton: one round of Lloyd's iteration over sorted values, each value of the codebook by a program of its own."""

# ruff: noqa: N803, PLR0913
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def cut_at_midpoints(
    sorted_ptr,
    before_ptr,
    from_ptr,
    to_ptr,
    count,
    chunks,
    steps,
    values,
    CHUNK: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    LOW_BITS: tl.constexpr,
):
    """Count and sum the sorted values nearest to value `program_id`, and give the mean of them to the next round.

    Args:
        sorted_ptr: float32 [count], ascending.
        before_ptr: int64 [4, chunks], high and low bits of the sums of y and y^2 before each chunk.
        from_ptr: float64 [4, values]: this round's values; their counts, sums and sums of squares are written.
        to_ptr: the same of the next round, of which the values are written.
        steps: those of a binary search over `count`.
    """
    number = tl.program_id(0)
    value = tl.load(from_ptr + number)
    side = tl.arange(0, 2)
    other = tl.load(from_ptr + tl.minimum(tl.maximum(number - 1 + 2 * side, 0), values - 1))
    limit = (value + other) * 0.5
    # Between low and high lies how many values are at most the limit; nothing precedes the first, all the last.
    is_end = tl.where(side == 0, number == 0, number == values - 1)
    nearest = tl.where(side == 0, 0, count).to(tl.int64)
    low = tl.where(is_end, nearest, 0)
    high = tl.where(is_end, nearest, count)
    for _ in range(steps):
        middle = (low + high) // 2
        is_open = low < high
        y = tl.load(sorted_ptr + middle, mask=is_open, other=0.0).to(tl.float64)
        is_within = is_open & (y <= limit)
        low = tl.where(is_within, middle + 1, low)
        high = tl.where(is_open & (y > limit), middle, high)

    chunk = low // CHUNK
    place = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    y = tl.load(sorted_ptr + place, mask=place < low[:, None], other=0.0).to(tl.float64)
    first = tl.where(side == 0, -1, 1).to(tl.float64)
    sums = tl.sum(first * _sum_up_to(y, before_ptr + chunk, chunks, HIGH_BITS, LOW_BITS), axis=0)
    squares = tl.sum(first * _sum_up_to(y * y, before_ptr + 2 * chunks + chunk, chunks, HIGH_BITS, LOW_BITS), axis=0)
    counts = tl.sum(tl.where(side == 0, -low, low), axis=0).to(tl.float64)
    tl.store(from_ptr + values + number, counts)
    tl.store(from_ptr + 2 * values + number, sums)
    tl.store(from_ptr + 3 * values + number, squares)
    tl.store(to_ptr + number, tl.where(counts > 0, sums / tl.maximum(counts, 1.0), value))


@triton.jit
def _sum_up_to(rest, before_ptr, chunks, HIGH_BITS: tl.constexpr, LOW_BITS: tl.constexpr):
    """Add what stands before a chunk to the rest of it: float64 [2], exact whole numbers until one last rounding."""
    scaled = rest * (1 << HIGH_BITS)
    floor = tl.floor(scaled)
    high = tl.load(before_ptr) + tl.sum(floor.to(tl.int64), axis=1)
    low = tl.load(before_ptr + chunks) + tl.sum(tl.floor((scaled - floor) * 4294967296.0).to(tl.int64), axis=1)
    carried = high + (low >> LOW_BITS)
    rest_of_low = low & ((1 << LOW_BITS) - 1)
    unit: tl.constexpr = 2.0 ** -(HIGH_BITS + LOW_BITS)
    return (carried.to(tl.float64) * 4294967296.0 + rest_of_low.to(tl.float64)) * unit
