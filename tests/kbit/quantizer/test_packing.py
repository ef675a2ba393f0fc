"""k-bit codes in exactly k bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kbit.quantizer.packing import pack, packed_bytes, unpack


def stream_by_hand(codes: list[int], bits: int) -> bytes:
    """One number whose binary digits are the stream, as Python's big integers have it."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return number.to_bytes(-(-len(codes) * bits // 8), "little")


@given(bits=st.integers(1, 8), data=st.data())
def test_codes_are_one_little_endian_bit_stream(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert bytes(packed.tolist()) == stream_by_hand(codes, bits)
    assert packed.numel() == packed_bytes(len(codes), bits)
    assert unpack(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", range(1, 9))
def test_eight_codes_take_k_bytes_and_come_back(bits):
    codes = torch.randint(0, 2**bits, (8 * 1001,), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == bits * 1001
    assert torch.equal(unpack(packed, bits, codes.numel()), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_stream_can_be_cut_where_eight_codes_end(bits):
    codes = torch.randint(0, 2**bits, (123,), dtype=torch.uint8)
    assert torch.equal(torch.cat([pack(codes[:64], bits), pack(codes[64:], bits)]), pack(codes, bits))


@pytest.mark.parametrize("bits", [3, 8])
def test_packing_changes_no_code_and_shares_no_memory(bits):
    codes = torch.arange(8, dtype=torch.uint8)
    packed = pack(codes, bits)
    unpacked = unpack(packed, bits, 8)
    packed.zero_()
    unpacked.zero_()
    assert codes.tolist() == list(range(8))


def test_wrong_length_is_refused():
    with pytest.raises(ValueError, match="9 codes of 3 bits take 4 bytes, not 3"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, 9)
