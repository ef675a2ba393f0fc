"""Triton: nearest codes by binary search, and codes of exactly k bits (``kbit.quantizer.packing``) in 32-bit words."""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def look_up(table_ptr, index, entry):
    """Return table[index], float32.

    `entry` is 4, the bytes of one. As the compiler doesn't know, it multiplies and adds in one instruction, instead of
    shifting and adding in two or three on a pipe that is twice as slow.
    """
    at = table_ptr.to(tl.pointer_type(tl.int8), bitcast=True) + index.to(tl.int64) * entry.to(tl.int64)
    return tl.load(at.to(tl.pointer_type(tl.float32), bitcast=True))


@triton.jit
def plant_tree(codebook_ptr, tree_ptr, values, BITS: tl.constexpr):
    """Return midpoints of neighbouring codebook values as a search tree: float32 [2^BITS].

    Node i has the children 2 i and 2 i + 1, so that a level is contiguous and a warp's look-ups fall on few cache
    lines. Unused nodes are NaN, which nothing is above.
    """
    node = tl.arange(0, 1 << BITS)
    level = tl.zeros_like(node)
    for i in tl.static_range(1, BITS):
        level += (node >= (1 << i)).to(tl.int32)
    rank = ((2 * (node - (1 << level)) + 1) << (BITS - 1 - level)) - 1
    used = (node > 0) & (rank + 1 < values)
    lower = tl.load(codebook_ptr + rank, mask=used)
    upper = tl.load(codebook_ptr + rank + 1, mask=used)
    middle = (lower + upper) * 0.5
    middle = tl.where(middle == 0, 0.0, middle)  # never -0, less which a value of 0 would have a sign
    tl.store(tree_ptr + node, tl.where(used, middle, float("nan")))


@triton.jit
def nearest(y, tree_ptr, entry, root, BITS: tl.constexpr):
    """Return the number of midpoints below y, plus 2^BITS: int32.

    A midpoint less y is negative just where it lies below, so its sign bit is the next bit of the path.
    """
    node = 2 | ((root - y).to(tl.uint32, bitcast=True) >> 31)
    for _ in tl.static_range(BITS - 1):
        point = look_up(tree_ptr, node.to(tl.int32, bitcast=True), entry)
        node = (node << 1) | ((point - y).to(tl.uint32, bitcast=True) >> 31)
    return node


@triton.jit
def pack_fours(node, BITS: tl.constexpr):
    """Return codes (plus 2^BITS) [n, 8] as two uint32 [n], each 4 BITS bits wide."""
    shift = BITS * tl.arange(0, 4)[None, None, :]
    runs = tl.sum(tl.reshape(node, (node.shape[0], 2, 4)) << shift, axis=2)
    # The 2^BITS of each of the four goes at once; it may have wrapped around, and wraps back.
    return tl.split(runs - (((1 << BITS) * (1 + (1 << BITS) + (1 << 2 * BITS) + (1 << 3 * BITS))) & 0xFFFFFFFF))


@triton.jit
def word_of(runs, WORD: tl.constexpr, WIDTH: tl.constexpr):
    """Return word WORD of the stream that `runs`, eight fields of WIDTH bits, make end to end."""
    word = tl.zeros_like(runs[0])
    for i in tl.static_range(8):
        if (i * WIDTH < 32 * WORD + 32) and (i * WIDTH + WIDTH > 32 * WORD):
            if i * WIDTH >= 32 * WORD:
                word |= runs[i] << (i * WIDTH - 32 * WORD)
            else:
                word |= runs[i] >> (32 * WORD - i * WIDTH)
    return word


@triton.jit
def store_words(words_ptr, group, left, runs, BITS: tl.constexpr, MASKED: tl.constexpr):
    """Write each group's codes, `runs`, eight of 4 BITS bits, as BITS words; those before `left`."""
    at = group * BITS
    vector: tl.constexpr = 4 if BITS % 4 == 0 else 2 if BITS % 2 == 0 else 1
    for i in tl.static_range(0, BITS, vector):
        if vector == 1:
            words, offset = word_of(runs, i, 4 * BITS), at + i
        elif vector == 2:
            words = tl.join(word_of(runs, i, 4 * BITS), word_of(runs, i + 1, 4 * BITS))
            offset = at[:, None] + i + tl.arange(0, 2)[None, :]
        else:
            even = tl.join(word_of(runs, i, 4 * BITS), word_of(runs, i + 2, 4 * BITS))
            odd = tl.join(word_of(runs, i + 1, 4 * BITS), word_of(runs, i + 3, 4 * BITS))
            words = tl.reshape(tl.join(even, odd), (group.shape[0], 4))
            offset = at[:, None] + i + tl.arange(0, 4)[None, :]
        if MASKED:
            tl.store(words_ptr + offset, words.to(tl.int32, bitcast=True), mask=offset < left)
        else:
            tl.store(words_ptr + offset, words.to(tl.int32, bitcast=True))


@triton.jit
def load_codes(words_ptr, octet, words, BITS: tl.constexpr, MASKED: tl.constexpr):
    """Return codes of eights of values: int32 [n, 8]. Eight take BITS bytes, which lie in up to three words.

    The last eight may need fewer than are read: the last word is read again then.
    """
    word = octet * BITS // 4
    shift = (octet * BITS % 4 * 8).to(tl.int32)
    place = BITS * tl.arange(0, 8)[None, :]
    stream = load_word(words_ptr, word, words, MASKED)
    if BITS == 2:
        stream = stream >> shift.to(tl.uint32)
    elif BITS != 4:
        stream = stream.to(tl.uint64) | (
            load_word(words_ptr, tl.minimum(word + 1, words - 1), words, MASKED).to(tl.uint64) << 32
        )
        stream = stream >> shift.to(tl.uint64)
        if BITS == 7:
            third = load_word(words_ptr, tl.minimum(word + 2, words - 1), words, MASKED).to(tl.uint64)
            stream |= (third << 32) << (32 - shift).to(tl.uint64)
    return ((stream[:, None] >> place.to(stream.dtype)) & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def load_word(words_ptr, word, words, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(words_ptr + word, mask=word < words, other=0).to(tl.uint32, bitcast=True)
    return tl.load(words_ptr + word).to(tl.uint32, bitcast=True)
