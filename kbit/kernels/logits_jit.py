"""Triton: the largest logit of each row, where it is, and the log of the sum of exponentials, in one reading; and the
KL divergence of two rows, in one more.
"""

# ruff: noqa: N803, PLR0913
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def summarize_rows(logits_ptr, largest_ptr, log_sum_ptr, best_ptr, stride, columns, BLOCK: tl.constexpr):
    """Summarize row `program_id` of `logits` in float32; the first of equal logits is the best, a NaN makes NaN."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    # Each lane keeps its own largest value and sum, so that lanes meet once, at the end of the row.
    lowest: tl.constexpr = -3.4e38  # finite: a block of -inf must not give inf - inf
    largest = tl.full([BLOCK], lowest, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    best = offset
    for start in range(0, columns, BLOCK):
        column = start + offset
        x = tl.load(logits_ptr + row * stride + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        is_larger = x > largest
        higher = tl.where(is_larger, x, largest)
        best = tl.where(is_larger, column, best)
        total = total * tl.exp(largest - higher) + tl.exp(x - higher)
        largest = higher
    most = tl.max(largest, axis=0)
    total = tl.sum(total * tl.exp(largest - most), axis=0)
    tl.store(largest_ptr + row, most)
    tl.store(log_sum_ptr + row, tl.log(total))
    tl.store(best_ptr + row, tl.min(tl.where(largest == most, best, columns), axis=0))


@triton.jit
def diverge_rows(
    logits_ptr,
    reference_ptr,
    largest_ptr,
    log_sum_ptr,
    reference_largest_ptr,
    reference_log_sum_ptr,
    kl_ptr,
    stride,
    reference_stride,
    columns,
    BLOCK: tl.constexpr,
):
    """Sum p (ln p - ln q) over row `program_id`, p of `reference` and q of `logits`; where p is 0, nothing."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    largest, log_sum = tl.load(largest_ptr + row), tl.load(log_sum_ptr + row)
    reference_largest, reference_log_sum = tl.load(reference_largest_ptr + row), tl.load(reference_log_sum_ptr + row)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + offset
        is_inside = column < columns
        x = tl.load(logits_ptr + row * stride + column, mask=is_inside, other=0.0).to(tl.float32)
        y = tl.load(reference_ptr + row * reference_stride + column, mask=is_inside, other=float("-inf")).to(tl.float32)
        log_p = (y - reference_largest) - reference_log_sum
        p = tl.exp(log_p)
        total += tl.where(p == 0, 0.0, p * (log_p - ((x - largest) - log_sum)))
    tl.store(kl_ptr + row, tl.sum(total, axis=0))
