"""Triton: the largest logit of each row, where it is, and the log of the sum of exponentials, in one reading; of two
models' rows in one reading too, with their KL divergence.
"""

# ruff: noqa: N803, PLR0913
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4e38)  # finite: a block of -inf must not give inf - inf


@triton.jit
def _go_on(x, column, largest, total, best):
    """Take a block into each lane's largest value, sum and best column; also give by what earlier sums are scaled, and
    the block's exponentials.
    """
    is_larger = x > largest
    higher = tl.where(is_larger, x, largest)
    scale = tl.exp(largest - higher)
    exponential = tl.exp(x - higher)
    return higher, total * scale + exponential, tl.where(is_larger, column, best), scale, exponential


@triton.jit
def _end(largest, total, best, columns, largest_ptr, log_sum_ptr, best_ptr):
    """Have the lanes meet: store the row's summary, and return its largest value, its sum and the sum's log."""
    most = tl.max(largest, axis=0)
    all_of_it = tl.sum(total * tl.exp(largest - most), axis=0)
    log_sum = tl.log(all_of_it)
    tl.store(largest_ptr, most)
    tl.store(log_sum_ptr, log_sum)
    tl.store(best_ptr, tl.min(tl.where(largest == most, best, columns), axis=0))
    return most, all_of_it, log_sum


@triton.jit
def summarize_rows(logits_ptr, largest_ptr, log_sum_ptr, best_ptr, stride, columns, BLOCK: tl.constexpr):
    """Summarize row `program_id` of `logits` in float32; the first of equal logits is the best, a NaN makes NaN."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    # Each lane keeps its own largest value and sum, so that lanes meet once, at the end of the row.
    largest = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    best = offset
    for start in range(0, columns, BLOCK):
        column = start + offset
        x = tl.load(logits_ptr + row * stride + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        largest, total, best, _, _ = _go_on(x, column, largest, total, best)
    _end(largest, total, best, columns, largest_ptr + row, log_sum_ptr + row, best_ptr + row)


@triton.jit
def compare_rows(
    logits_ptr,
    reference_ptr,
    largest_ptr,
    log_sum_ptr,
    best_ptr,
    reference_largest_ptr,
    reference_log_sum_ptr,
    reference_best_ptr,
    kl_ptr,
    stride,
    reference_stride,
    columns,
    BLOCK: tl.constexpr,
):
    """Summarize row `program_id` of both, by the same steps, and their divergence, p of `reference` and q of `logits`.

    KL(p || q) = sum p (y - x) + (ln sum exp x - ln sum exp y); where p is 0, nothing is added.
    """
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    best = offset
    reference_largest, reference_total, reference_best, apart = largest, total, offset, total
    for start in range(0, columns, BLOCK):
        column = start + offset
        is_inside = column < columns
        x = tl.load(logits_ptr + row * stride + column, mask=is_inside, other=float("-inf")).to(tl.float32)
        y = tl.load(reference_ptr + row * reference_stride + column, mask=is_inside, other=float("-inf")).to(tl.float32)
        largest, total, best, _, _ = _go_on(x, column, largest, total, best)
        reference_largest, reference_total, reference_best, scale, p = _go_on(
            y, column, reference_largest, reference_total, reference_best
        )
        # What is infinitely far apart where nothing is left of p must not become inf x 0.
        apart = tl.where(scale == 0, 0.0, apart * scale) + tl.where(p == 0, 0.0, p * (y - x))
    most, _, log_sum = _end(largest, total, best, columns, largest_ptr + row, log_sum_ptr + row, best_ptr + row)
    reference_most, all_of_it, reference_log_sum = _end(
        reference_largest,
        reference_total,
        reference_best,
        columns,
        reference_largest_ptr + row,
        reference_log_sum_ptr + row,
        reference_best_ptr + row,
    )
    scale = tl.exp(reference_largest - reference_most)
    mean = tl.sum(tl.where(scale == 0, 0.0, apart * scale), axis=0) / all_of_it
    tl.store(kl_ptr + row, mean + ((most - reference_most) + (log_sum - reference_log_sum)))
