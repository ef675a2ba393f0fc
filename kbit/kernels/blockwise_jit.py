"""Triton kernels that quantize and dequantize, to the bit as the reference does (``kbit.quantizer.blockwise``).

Launch them with ``enable_fp_fusion=False``: a product contracted with the sum behind it would be rounded once instead
of twice.

Layout. Quantizing gives each thread a group of 32 consecutive values, whose codes are whole 32-bit words at any width,
so that none crosses threads. A CTA has GROUPS groups; a group's values are held as four runs of eight, x[0] to x[3]:

    value     0 .. 7   8 .. 15  16 .. 23  24 .. 31 | 32 ..
    run        x[0]      x[1]      x[2]      x[3]  | x[0] ..
    codes     two fields of 4 BITS bits for each   |            (``codes_jit.pack_fours``)
    words     0 .. BITS - 1                        | BITS ..    (``codes_jit.store_words``)
    thread    0                                    | 1

Dequantizing gives a thread eights of values (octets): their codes are BITS bytes, in up to three words, and their
values are written together.

Arguments that several kernels have, flat and contiguous:
    weight_ptr: the weight's values [count], float16, bfloat16 or float32.
    words_ptr: int32 [words], the packed codes (``kbit.quantizer.packing``); `words` is ceil(count BITS / 32).
    absmax_ptr: float16 or float32 [blocks].
    tree_ptr: float32 [2^BITS], the midpoints as a search tree (``codes_jit.plant_tree``).
    mean_ptr: float16 [1], read with CENTER alone; else any pointer.
    kept_ptr: int8 [columns], 1 for kept columns, read with KEPT alone; else any pointer.
    entry: 4 (``codes_jit.look_up``).
    size, length, per_row: values of a block, values of a row, blocks of a row (``kbit.quantizer.blocks.Blocks``).
    STORAGE: float16 or bfloat16, to which values are rounded first, or last.
    FLAT: the tensor is cut as one row.
    INDEX: int32, or int64 where offsets need it.
    MASKED: the last CTA has less than its share.
"""

# A launch has as many arguments as its kernel.
# ruff: noqa: N803, PLR0913
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"

import triton
import triton.language as tl

from kbit.kernels.codes_jit import load_codes, look_up, nearest, pack_fours, store_words

INFINITY_BITS = tl.constexpr(0x7F800000)
FLOAT16_MAX = tl.constexpr(65504.0)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_absmax(largest, DTYPE: tl.constexpr):
    """Return absmax values from their bits, in the dtype in which they are stored."""
    absmax = largest.to(tl.float32, bitcast=True)
    if DTYPE.is_fp16():
        absmax = tl.minimum(absmax, FLOAT16_MAX)
    return absmax.to(DTYPE)


@triton.jit
def divisors(absmax, RECIPROCAL: tl.constexpr):
    """Return the divisors that ``scaled`` takes for absmax values: a block of zero is scaled to zero."""
    if RECIPROCAL:
        return absmax, tl.where(absmax == 0, 0.0, tl.div_rn(1.0, tl.where(absmax == 0, 1.0, absmax)))
    return tl.where(absmax == 0, float("inf"), absmax), absmax


@triton.jit
def scaled(x, absmax, reciprocal, RECIPROCAL: tl.constexpr):
    """Return x / absmax, rounded as IEEE division is; 0 where absmax is 0.

    With RECIPROCAL by the correctly rounded 1 / absmax, for operands of at most 11 bits: the first product is off by at
    most 1.5 ulp, the remainder is exact, and corrected by it the quotient is off by 2^-23 ulp before it is rounded,
    while that of two 11-bit numbers is at least 2^-12 ulp away from where rounding changes.
    """
    if RECIPROCAL:
        y = x * reciprocal
        return tl.fma(tl.fma(y, -absmax, x), reciprocal, y)
    return tl.div_rn(x, absmax)


@triton.jit
def load_values(weight_ptr, offset, left, mean, STORAGE: tl.constexpr, CENTER: tl.constexpr, MASKED: tl.constexpr):
    """Return float32 of the values as stored in 16 bits, less the mean; zero beyond `left`."""
    if MASKED:
        x = tl.load(weight_ptr + offset, mask=offset < left, other=0.0).to(STORAGE).to(tl.float32)
        if CENTER:
            x = tl.where(offset < left, x - mean, 0.0)
    else:
        x = tl.load(weight_ptr + offset).to(STORAGE).to(tl.float32)
        if CENTER:
            x = x - mean
    return x


@triton.jit
def without_kept(x, at, kept_ptr, columns, KEPT: tl.constexpr):
    """Return values, zero where a value's column is kept in 16 bits."""
    if KEPT:
        x = tl.where(tl.load(kept_ptr + at % columns) != 0, 0.0, x)
    return x


@triton.jit
def block_of(at, size, length, per_row, FLAT: tl.constexpr):
    """Return the block of the value at a flat index: of its row's blocks, unless the tensor is cut as one row."""
    if FLAT:
        return at // size
    row = at // length
    return row * per_row + (at - row * length) // size


@triton.jit
def encode_eight(y, offset, left, tree_ptr, entry, root, BITS: tl.constexpr, MASKED: tl.constexpr):
    """Return codes of scaled values [n, 8] as two runs of four, uint32 [n] of 4 BITS bits; zero from `left` on."""
    node = nearest(y, tree_ptr, entry, root, BITS)
    if MASKED:
        node = tl.where(offset < left, node, 1 << BITS)
    return pack_fours(node, BITS)


@triton.jit(do_not_specialize=["words"])
def quantize_blocks(
    weight_ptr,
    words_ptr,
    absmax_ptr,
    bad_ptr,
    tree_ptr,
    mean_ptr,
    entry,
    count,
    words,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    STORAGE: tl.constexpr,
    CENTER: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write absmax and codes in one pass over a flat weight, its block size a power of two from 32 to 32 GROUPS.

    A CTA takes 32 GROUPS values; above is what a thread does with 32 of them.

    Args:
        absmax_ptr: [count / SIZE], rounded up; written.
        bad_ptr: int32 [1], zero at first; becomes 1 if a value is NaN or infinite.
        SIZE: of a block.
        RECIPROCAL: divide by way of 1 / absmax (``scaled``).
    """
    first = tl.program_id(0).to(tl.int64) * GROUPS
    left = tl.minimum(count - first * 32, GROUPS * 32).to(tl.int32)
    weight_ptr += first * 32
    mean = tl.load(mean_ptr).to(tl.float32) if CENTER else 0.0
    root = tl.load(tree_ptr + 1)
    group = tl.arange(0, GROUPS)
    offset = 32 * group[:, None] + tl.arange(0, 8)[None, :]
    x = ()
    for i in tl.static_range(4):
        x += (load_values(weight_ptr, offset + 8 * i, left, mean, STORAGE, CENTER, MASKED),)

    # As whole numbers, magnitudes keep their order, and NaN is above infinity.
    eight = larger(larger(tl.abs(x[0]), tl.abs(x[1])), larger(tl.abs(x[2]), tl.abs(x[3])))
    largest = tl.max(eight.to(tl.int32, bitcast=True), axis=1)
    per_block: tl.constexpr = SIZE // 32
    if per_block > 1:
        shared = tl.max(tl.reshape(largest, (GROUPS // per_block, per_block)), axis=1)[:, None]
        largest = tl.reshape(tl.broadcast_to(shared, (GROUPS // per_block, per_block)), (GROUPS,))
    tl.store(bad_ptr + tl.zeros_like(group), tl.full((GROUPS,), 1, tl.int32), mask=largest >= INFINITY_BITS)
    stored = round_absmax(largest, absmax_ptr.dtype.element_ty)
    is_first = (group % per_block == 0) & (32 * group < left)
    tl.store(absmax_ptr + first // per_block + group // per_block, stored, mask=is_first)
    divisor, reciprocal = divisors(stored.to(tl.float32)[:, None], RECIPROCAL)

    runs = ()
    for i in tl.static_range(4):
        y = scaled(x[i], divisor, reciprocal, RECIPROCAL)
        runs += encode_eight(y, offset + 8 * i, left, tree_ptr, entry, root, BITS, MASKED)
    words_left = tl.minimum(words - first * BITS, GROUPS * BITS).to(tl.int32)
    store_words(words_ptr + first * BITS, group, words_left, runs, BITS, MASKED)


@triton.jit(do_not_specialize=["per_row", "blocks", "columns", "parts"])
def measure_blocks(
    weight_ptr,
    bits_ptr,
    mean_ptr,
    kept_ptr,
    size,
    length,
    per_row,
    blocks,
    columns,
    parts,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    STORAGE: tl.constexpr,
    CENTER: tl.constexpr,
    KEPT: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Raise the int32 at `bits_ptr`, zero at first, to the bits of each block's largest magnitude.

    A CTA takes BLOCKS blocks, or one of `parts` parts of each, STEPS times CHUNK values long. The largest doesn't
    depend on the order.

    Args:
        bits_ptr: int32 [blocks].
        blocks: of the whole weight.
        parts: CTAs that share a block; with more than one, BLOCKS is 1.
        BLOCKS, CHUNK: values are held as [BLOCKS, CHUNK], powers of two.
    """
    block = (tl.program_id(0) // parts).to(INDEX) * BLOCKS + tl.arange(0, BLOCKS)
    some = tl.minimum(block, blocks - 1)
    row = some // per_row
    start = row * length + (some - row * per_row) * size
    stop = tl.minimum(start + size, (row + 1) * length)[:, None]
    at = (start + (tl.program_id(0) % parts).to(INDEX) * (STEPS * CHUNK))[:, None] + tl.arange(0, CHUNK)[None, :]
    mean = tl.load(mean_ptr).to(tl.float32) if CENTER else 0.0
    largest = tl.zeros((BLOCKS, CHUNK), tl.int32)
    for _ in range(STEPS):
        x = load_values(weight_ptr, at, stop, mean, STORAGE, CENTER, True)
        x = without_kept(x, at, kept_ptr, columns, KEPT)
        largest = tl.maximum(largest, tl.abs(x).to(tl.int32, bitcast=True))
        at += CHUNK
    largest = tl.max(largest, axis=1)
    if parts == 1:
        tl.store(bits_ptr + block, largest, mask=block < blocks)
    else:
        tl.atomic_max(bits_ptr + block, largest, mask=block < blocks)


@triton.jit(do_not_specialize=["words", "size", "length", "per_row", "columns"])
def encode_values(
    weight_ptr,
    words_ptr,
    absmax_ptr,
    tree_ptr,
    mean_ptr,
    kept_ptr,
    entry,
    count,
    words,
    size,
    length,
    per_row,
    columns,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    STORAGE: tl.constexpr,
    CENTER: tl.constexpr,
    KEPT: tl.constexpr,
    FLAT: tl.constexpr,
    WHOLE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Write codes of values whose absmax are known, as ``quantize_blocks`` lays them out.

    Args:
        absmax_ptr: read.
        WHOLE: 32 values from a multiple of 32 on lie in one block.
    """
    first = tl.program_id(0).to(INDEX) * GROUPS
    group = first + tl.arange(0, GROUPS)
    mean = tl.load(mean_ptr).to(tl.float32) if CENTER else 0.0
    root = tl.load(tree_ptr + 1)
    at = 32 * group[:, None] + tl.arange(0, 8)[None, :]
    runs = ()
    for i in tl.static_range(4):
        x = load_values(weight_ptr, at + 8 * i, count, mean, STORAGE, CENTER, True)
        x = without_kept(x, at + 8 * i, kept_ptr, columns, KEPT)
        block = 32 * group[:, None] // size if WHOLE else block_of(at + 8 * i, size, length, per_row, FLAT)
        beyond = 32 * group[:, None] >= count if WHOLE else at + 8 * i >= count
        absmax = tl.load(absmax_ptr + tl.where(beyond, 0, block)).to(tl.float32)
        divisor, reciprocal = divisors(absmax, False)
        y = scaled(x, divisor, reciprocal, False)
        runs += encode_eight(y, at + 8 * i, count, tree_ptr, entry, root, BITS, True)
    store_words(words_ptr, group, words, runs, BITS, True)


@triton.jit(do_not_specialize=["words", "size", "length", "per_row"])
def dequantize_values(
    words_ptr,
    absmax_ptr,
    codebook_ptr,
    out_ptr,
    mean_ptr,
    entry,
    count,
    words,
    size,
    length,
    per_row,
    limit,
    BITS: tl.constexpr,
    OCTETS: tl.constexpr,
    STORAGE: tl.constexpr,
    CENTER: tl.constexpr,
    LIMITED: tl.constexpr,
    FLAT: tl.constexpr,
    WHOLE: tl.constexpr,
    INDEX: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write codebook[code] · absmax (+ mean), rounded to STORAGE; a CTA takes OCTETS eights of values.

    Args:
        codebook_ptr: float32 [at most 2^BITS].
        out_ptr: [count], float16, bfloat16 or float32; written.
        limit: the largest value of STORAGE, at which others are cut off with LIMITED.
        WHOLE: 8 values from a multiple of 8 on lie in one block.
    """
    octet = tl.program_id(0).to(INDEX) * OCTETS + tl.arange(0, OCTETS)
    codes = load_codes(words_ptr, octet, words, BITS, MASKED)
    at = 8 * octet[:, None] + tl.arange(0, 8)[None, :]
    block = (8 * octet // size)[:, None] if WHOLE else block_of(at, size, length, per_row, FLAT)
    if MASKED:
        beyond = (8 * octet >= count)[:, None] if WHOLE else at >= count
        block = tl.where(beyond, 0, block)
    y = look_up(codebook_ptr, codes, entry) * tl.load(absmax_ptr + block).to(tl.float32)
    if CENTER:
        y = y + tl.load(mean_ptr).to(tl.float32)
    if LIMITED:
        y = tl.minimum(tl.maximum(y, -limit), limit)
    y = y.to(STORAGE).to(tl.float32).to(out_ptr.dtype.element_ty)
    if MASKED:
        tl.store(out_ptr + at, y, mask=at < count)
    else:
        tl.store(out_ptr + at, y)
