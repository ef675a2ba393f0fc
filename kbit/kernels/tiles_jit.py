"""Triton: codes in row-major order to the kernels' tiles (``kbit.kernels.tiles``), a tile by a program of its own."""

# ruff: noqa: N803, PLR0913
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def tile_codes(
    codes_ptr,
    tiles_ptr,
    rows,
    columns,
    nbytes,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
):
    """Gather each 32-bit word of a tile from the codes that lie in it.

    Args:
        codes_ptr: uint8 [nbytes], codes [rows, columns] of exactly BITS bits each.
        tiles_ptr: int32 [row blocks · column tiles, BITS, LANES, 4]; codes of rows beyond the last are 0.
    """
    tile = tl.program_id(0)
    tiles_of_row = columns // TILE
    first_row, first_column = tile // tiles_of_row * TILE, tile % tiles_of_row * TILE
    lane = tl.arange(0, LANES)[:, None]
    group, thread = lane // 4, lane % 4
    # A lane's word holds at most this many codes, cut ones included.
    most: tl.constexpr = (30 + BITS) // BITS + 1
    for piece in tl.static_range(BITS):
        word = 4 * piece + tl.arange(0, 4)[None, :]
        gathered = tl.zeros([LANES, 4], dtype=tl.int64)
        for number in tl.static_range(most):
            # The bits of a code's number in its lane are, from the highest: r r kh kl j1 j0 e.
            code = 32 * word // BITS + number
            row = first_row + (code >> 5) * 16 + (code >> 1 & 1) * 8 + group
            column = first_column + (code >> 4 & 1) * 32 + thread * 8 + (code >> 3 & 1) * 4 + (code >> 2 & 1) * 2
            column += code & 1
            shift = code * BITS - 32 * word
            is_there = (shift < 32) & (row < rows)
            position = (row.to(tl.int64) * columns + column) * BITS
            byte = position >> 3
            low = tl.load(codes_ptr + byte, mask=is_there, other=0).to(tl.int64)
            high = tl.load(codes_ptr + byte + 1, mask=is_there & (byte + 1 < nbytes), other=0).to(tl.int64)
            value = ((low | (high << 8)) >> (position & 7)) & ((1 << BITS) - 1)
            gathered |= tl.where(shift >= 0, value << tl.maximum(shift, 0), value >> tl.maximum(-shift, 0))
        place = (tile.to(tl.int64) * BITS + piece) * (LANES * 4) + lane * 4 + tl.arange(0, 4)[None, :]
        tl.store(tiles_ptr + place, gathered.to(tl.int32))
