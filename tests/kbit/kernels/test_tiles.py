"""The kernels' layout, on any machine."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from kbit import QuantSpec, quantize
from kbit.kernels.interpreter import interpreted
from kbit.kernels.tiles import BLOCKSIZES, tile, tiled_codes, untile, why_not_tiled
from kbit.quantizer.block_float import dequantize_block_float, quantize_block_float
from kbit.specs.block_float import FORMATS, BlockFloatSpec
from kbit.specs.hqq import HqqSpec
from tests.kbit.kernels.interpreted import passed_in_the_interpreter
from tests.kbit.kernels.tiled_weights import error, weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL = DEVICE == "cuda" or interpreted()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_the_layout_holds_every_code_and_absmax_and_rounds_no_more_than_float16(bits: int, blocksize: int) -> None:
    tiled, exact = weight(100, 256, QuantSpec(bits=bits, dtype="quantile", blocksize=blocksize))
    assert torch.equal(untile(tiled), exact.float())
    # What the tensor cores take must not be worse than rounding each weight, as any float16 matmul does.
    taken = replace(tiled, codebook=tiled.table.float() * tiled.unscale)
    assert error(untile(taken), exact) <= 1.05 * error(exact.half(), exact)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_take_exactly_k_bits(bits: int) -> None:
    tiled, _ = weight(128, 512, QuantSpec(bits=bits, dtype="int", blocksize=64))
    assert tiled.codes.nbytes * 8 == bits * 128 * 512
    assert tiled.scales.nbytes * 8 == 16 * 128 * 512 // 64
    for spec, zero_bits in ((HqqSpec(bits=bits).blockwise(512), 8), (HqqSpec(bits=bits), 16)):
        tiled, _ = weight(128, 512, spec)
        assert tiled.scales.nbytes * 8 == (16 + zero_bits) * 128 * 512 // 64
        assert tiled.zero_bytes == zero_bits // 8


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_block_scaled_floats_have_a_layout_of_their_bytes_and_an_exact_table(name: str, dtype: torch.dtype) -> None:
    spec = BlockFloatSpec(format=name)
    q = quantize_block_float(torch.randn(100, 256).mul(torch.randn(100, 1).exp()).to(dtype), spec)
    tiled = tile(q, dtype)
    assert torch.equal(untile(tiled).to(dtype), dequantize_block_float(q))
    assert tiled.scales.nbytes == 128 * 256 // spec.element.block
    elements = tiled.table.double() * tiled.unscale.double()
    if q.tensor_scale is not None:  # a scale's bits are those of a smaller number
        elements /= q.tensor_scale.double() * (2.0**8 if dtype == torch.float16 else 2.0**120)
    assert torch.equal(elements, tiled.codebook.double())


@pytest.mark.parametrize(
    ("spec", "shape", "why"),
    [
        (QuantSpec(bits=4, dtype="int", blocksize=64), (64, 100), "no multiple of 64"),
        (QuantSpec(bits=4, dtype="int", blocksize=16), (64, 128), "block size is 16"),
        (QuantSpec(bits=4, dtype="int", blocksize=None), (64, 128), "block size is None"),
        (QuantSpec(bits=4, dtype="int", blocksize=256), (64, 128 + 256), "blocks of 256 don't divide"),
        (QuantSpec(bits=4, dtype="int", blocksize=64, absmax_dtype="float32"), (64, 128), "absmax is float32"),
        (QuantSpec(bits=4, dtype="int", blocksize=64), (2, 64, 64), "3 dimensions"),
    ],
)
def test_what_has_no_layout_is_refused_with_the_reason(spec: QuantSpec, shape: tuple[int, ...], why: str) -> None:
    q = quantize(torch.randn(shape), spec)
    assert why in str(why_not_tiled(q))
    with pytest.raises(ValueError, match="no tiled layout"):
        tile(q, torch.float16)


@pytest.mark.skipif(KERNEL or find_spec("triton") is None, reason="runs in this process, or needs triton")
def test_the_kernel_passes_in_the_interpreter() -> None:
    assert passed_in_the_interpreter(__file__, "as_torch_does") == 7


@pytest.mark.skipif(not KERNEL, reason="needs a GPU, or Triton's interpreter")
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_kernel_lays_codes_out_as_torch_does(bits: int) -> None:
    for rows, columns in ((64, 64), (65, 128), (3, 192)):
        q = quantize(torch.randn(rows, columns, device=DEVICE), QuantSpec(bits=bits, dtype="int"))
        assert torch.equal(tiled_codes(q, impl="triton"), tiled_codes(q, impl="torch"))
