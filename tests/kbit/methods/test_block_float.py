"""Block-scaled floats: codes and scales against ml_dtypes, values against float64, whole models, bits."""

from __future__ import annotations

import math
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kbit import quantize_model
from kbit.errors import SpecError, WeightError
from kbit.quantizer.block_float import BlockFloatTensor, dequantize_block_float, quantize_block_float
from kbit.quantizer.packing import unpack
from kbit.spec import spec_from_canonical, spec_of
from kbit.specs.block_float import FORMATS, BlockFloatSpec
from tests.kbit.tiny_models import NAMES, bits_of, identical, tiny

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
ELEMENTS = {
    "mxfp4": ml_dtypes.float4_e2m1fn,
    "nvfp4": ml_dtypes.float4_e2m1fn,
    "mxfp6_e2m3": ml_dtypes.float6_e2m3fn,
    "mxfp6_e3m2": ml_dtypes.float6_e3m2fn,
    "mxfp8_e4m3": ml_dtypes.float8_e4m3fn,
    "mxfp8_e5m2": ml_dtypes.float8_e5m2,
}
LARGEST_EXPONENT = {"mxfp4": 2, "mxfp6_e2m3": 2, "mxfp6_e3m2": 4, "mxfp8_e4m3": 8, "mxfp8_e5m2": 15}
"""emax of each element (OCP Microscaling 1.0, table 1 and 2)."""
BITS = {"mxfp4": 4.25, "nvfp4": 4.5, "mxfp6_e2m3": 6.25, "mxfp6_e3m2": 6.25, "mxfp8_e4m3": 8.25, "mxfp8_e5m2": 8.25}
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def by_ml_dtypes(weight: Tensor, spec: BlockFloatSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [rows, length], scales [rows, blocks] and float64 values of a matrix, rounded by ml_dtypes."""
    element, block = ELEMENTS[spec.format], 16 if spec.format == "nvfp4" else 32
    largest = float(ml_dtypes.finfo(element).max)
    x = weight.to(weight.dtype if weight.dtype != torch.float32 else torch.float16).float().numpy()
    codes, values = np.zeros(x.shape, np.uint8), np.zeros(x.shape)
    scales = np.zeros((x.shape[0], -(-x.shape[1] // block)), np.uint8)
    of_tensor = np.float32(np.abs(x).max() / np.float32(448 * 6))
    for row in range(x.shape[0]):
        for number, start in enumerate(range(0, x.shape[1], block)):
            own = x[row, start : start + block]
            absmax = np.abs(own).max()
            if spec.format == "nvfp4":
                scaled = np.float32(absmax / np.float32(6)) / of_tensor if of_tensor else np.float32(0)
                scale = np.minimum(scaled, np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
                factor = np.float32(scale) * of_tensor
            else:
                log2 = (math.floor if spec.scale_rounding == "floor" else math.ceil)(math.log2(absmax or 2.0**-149))
                power = max(-127, log2 - LARGEST_EXPONENT[spec.format])
                scale = np.float32(2.0**power).astype(ml_dtypes.float8_e8m0fnu)
                factor = np.float32(scale)
            y = own / factor if factor else np.copysign(np.float32(0), own)
            rounded = np.clip(y, -largest, largest).astype(element)
            codes[row, start : start + block] = rounded.view(np.uint8)
            values[row, start : start + block] = rounded.astype(np.float64) * float(factor)
            scales[row, number] = scale.view(np.uint8)
    return codes, scales, values


def codes_of(q: BlockFloatTensor) -> np.ndarray:
    return unpack(q.codes, q.spec.bits, math.prod(q.shape)).view(q.shape).numpy()


def weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    if kind == "heavy":
        w = w.pow(5) * torch.randint(0, 2, shape, generator=generator)
    elif kind == "tiny":
        w = w * 1e-7
    elif kind == "grid":  # halves of fourths up to 7: values of the formats, and ties between them
        w = torch.randint(-56, 57, shape, generator=generator) / 8
    elif kind == "zero":
        w[:, : shape[1] // 2] = 0
        w[0] = 0
    return w.to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(FORMATS)),
    rounding=st.sampled_from(["floor", "ceil"]),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 100)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["normal", "heavy", "tiny", "grid", "zero"]),
)
def test_codes_scales_and_values_are_those_of_ml_dtypes(name, rounding, shape, dtype, seed, kind) -> None:
    rounding = None if name == "nvfp4" else rounding  # which has none
    weight, spec = weights(shape, dtype, seed, kind), BlockFloatSpec(format=name, scale_rounding=rounding)
    before = weight.clone()
    q = quantize_block_float(weight, spec)
    codes, scales, values = by_ml_dtypes(weight, spec)
    assert np.array_equal(codes_of(q), codes)
    # A block of zeros has the smallest scale.
    block = q.spec.element.block
    padded = torch.nn.functional.pad(weight.to(q.storage_dtype), (0, -shape[1] % block))
    is_zero = ~padded.view(shape[0], -1, block).any(-1).numpy()
    assert np.array_equal(q.scales.numpy()[~is_zero], scales[~is_zero])
    assert not q.scales.numpy()[is_zero].any()
    storage = torch.float16 if dtype == torch.float32 else dtype
    limit = torch.finfo(storage).max
    true = torch.from_numpy(values).clamp(-limit, limit).float().to(storage).to(dtype)
    back = dequantize_block_float(q)
    assert back.dtype == dtype
    assert torch.equal(back, true)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "nvfp4"])
def test_every_value_of_a_format_comes_back_and_ties_go_to_the_even_code(name: str) -> None:
    magnitudes = FORMATS[name].magnitudes()
    assert (
        magnitudes[-1]
        == {4: 6.0, 6: 7.5 if "e2m3" in name else 28.0, 8: 448.0 if "e4m3" in name else 57344.0}[FORMATS[name].bits]
    )
    top = magnitudes[-1]
    middles = [(a + b) / 2 for a, b in pairwise(magnitudes)]
    for values, codes in (
        (magnitudes, range(len(magnitudes))),
        (middles, [i + i % 2 for i in range(len(middles))]),
    ):
        for value, code in zip(values, codes, strict=True):
            for sign in (1, -1):
                # Scaled by powers of two, so that float16 holds it exactly; the largest makes the scale 2^0.
                w = torch.tensor([[sign * value, top]], dtype=torch.float32) * 2.0**-5
                if not torch.equal(w.half().float(), w):
                    continue
                found = codes_of(quantize_block_float(w, BlockFloatSpec(format=name)))[0, 0]
                assert found == code + (1 << FORMATS[name].bits - 1) * (sign < 0)


def test_what_floor_saturates_and_ceil_does_not() -> None:
    w = torch.tensor([[7.0, 1.0, -3.0, 0.25]])
    floor = dequantize_block_float(quantize_block_float(w, BlockFloatSpec(format="mxfp4")))
    ceil = dequantize_block_float(quantize_block_float(w, BlockFloatSpec(format="mxfp4", scale_rounding="ceil")))
    assert floor.tolist() == [[6.0, 1.0, -3.0, 0.0]]  # 1/4 lies between 0 and 1/2: code 0 is even
    assert ceil.tolist() == [[8.0, 1.0, -3.0, 0.0]]  # scale 2: 3.5 to 4, 0.5, 1.5, and 1/8 to 0


@pytest.mark.parametrize("name", list(FORMATS))
def test_bits_are_the_bytes(name: str) -> None:
    spec = BlockFloatSpec(format=name)
    assert spec.bits_per_param_nominal == BITS[name]
    q = quantize_block_float(torch.randn(24, 64), spec)
    assert q.nbits == 24 * 64 * BITS[name] + (32 if name == "nvfp4" else 0)
    short = quantize_block_float(torch.randn(3, 33), spec)
    stored = [short.codes, short.scales, *([] if short.tensor_scale is None else [short.tensor_scale])]
    assert short.nbits == 8 * sum(t.nbytes for t in stored)
    assert short.scales.shape == (3, 3 if name == "nvfp4" else 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_quantized_and_comes_back_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    model = tiny(name, dtype)
    before = bits_of(model)
    spec = BlockFloatSpec(format="nvfp4")
    with quantize_model(model, spec) as handle:
        for layer, (rows, columns) in handle.layers.items():
            weight = before[f"{layer}.weight"]
            weight = weight.t() if name == "gpt2" else weight
            held = model.get_submodule(layer).weight.detach()
            q = quantize_block_float(weight, spec)
            assert torch.equal(held.t() if name == "gpt2" else held, dequantize_block_float(q))
            assert q.shape == (rows, columns)
        count = sum(r * c * 4 + 8 * r * -(-c // 16) + 32 for r, c in handle.layers.values())
        assert handle.bits_per_param * sum(r * c for r, c in handle.layers.values()) == pytest.approx(count)
    assert identical(bits_of(model), before)


def test_a_transposed_weight_is_written_where_it_lies() -> None:
    w = torch.randn(40, 70).t()
    q = quantize_block_float(w, BlockFloatSpec(format="mxfp6_e3m2"))
    out = torch.empty(40, 70).t()
    assert dequantize_block_float(q, out=out) is out
    assert torch.equal(out, dequantize_block_float(quantize_block_float(w.contiguous(), q.spec)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    w = torch.randn(4, 40)
    w[2, 7] = bad
    with pytest.raises(WeightError, match="NaN or infinite"):
        quantize_block_float(w, BlockFloatSpec(format="mxfp4"))


def test_zeros_and_the_smallest_numbers_stay_finite() -> None:
    for name in FORMATS:
        for w in (torch.zeros(2, 40), torch.full((2, 40), 2.0**-133, dtype=torch.bfloat16)):
            back = dequantize_block_float(quantize_block_float(w, BlockFloatSpec(format=name)))
            assert back.isfinite().all()
            assert (back - w).abs().max() <= 2.0**-130


@pytest.mark.parametrize(
    ("values", "key", "said"),
    [
        ({"format": "mxfp5"}, "format", "one of mxfp4, nvfp4"),
        ({"format": "nvfp4", "scale_rounding": "ceil"}, "scale_rounding", "leave it out with format=nvfp4"),
        ({"format": "mxfp4", "bits": 5}, "bits", "4, the bits of format=mxfp4: leave it out"),
        ({"format": "mxfp4", "bits": 16}, "bits", "4, the bits of format=mxfp4"),
        ({"format": "mxfp4", "scale_rounding": "up"}, "scale_rounding", "one of floor, ceil"),
        ({}, "format", "must be given with method=block_float"),
        ({"format": "mxfp4", "blocksize": 32}, "blocksize", "method block_float has no such axis"),
    ],
)
def test_bad_values_are_named(values: dict[str, object], key: str, said: str) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        spec_of({"method": "block_float", **values})
    assert caught.value.key == key


def test_a_spec_has_its_bits_from_the_format_and_nothing_that_does_not_matter() -> None:
    spec = spec_of({"method": "block_float", "format": "mxfp6_e2m3"})
    assert spec == spec_of({"method": "block_float", "format": "mxfp6_e2m3", "bits": 6, "scale_rounding": "floor"})
    assert spec.canonical() == {"method": "block_float", "bits": 6, "format": "mxfp6_e2m3"}
    assert spec_from_canonical(spec.canonical()) == spec
    nv = spec_of({"method": "block_float", "format": "nvfp4", "scale_rounding": "floor"})
    assert nv == spec_of({"method": "block_float", "format": "nvfp4"})
    assert [s.label for s in (spec, nv, BlockFloatSpec(format="mxfp4", scale_rounding="ceil"))] == [
        "mxfp6_e2m3",
        "nvfp4",
        "mxfp4 scale-ceil",
    ]


@pytest.mark.parametrize("name", list(FORMATS))
def test_layers_are_held_in_the_bits_that_are_counted(name: str) -> None:
    spec = BlockFloatSpec(format=name)
    assert spec.why_not_packed is None
    assert spec.bits_per_param_held == BITS[name]
    model = tiny("opt", torch.float16)
    with quantize_model(model, spec, packed=True) as handle:
        for layer, (rows, columns) in handle.layers.items():
            held = model.get_submodule(layer).state_dict()
            stored = sum(held[part].nbytes for part in held.keys() & {"codes", "scales", "tensor_scale"})
            block = spec.element.block
            assert 8 * stored == rows * (columns * spec.bits + 8 * -(-columns // block)) + 32 * (name == "nvfp4")


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(FORMATS))
def test_a_gpu_gives_the_same(name: str, dtype: torch.dtype) -> None:
    for kind in ("normal", "heavy", "tiny", "grid", "zero"):
        w, spec = weights((130, 1000), dtype, 1, kind), BlockFloatSpec(format=name)
        on_cpu, on_gpu = quantize_block_float(w, spec), quantize_block_float(w.cuda(), spec)
        assert torch.equal(on_cpu.codes, on_gpu.codes.cpu())
        assert torch.equal(on_cpu.scales, on_gpu.scales.cpu())
        assert torch.equal(dequantize_block_float(on_cpu), dequantize_block_float(on_gpu).cpu())
