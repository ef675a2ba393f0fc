"""HQQ: against its formulas written out in float64, its edges, whole models, bits."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kbit import dequantize, quantize_model
from kbit.errors import SpecError, WeightError
from kbit.quantizer.hqq import as_blockwise, dequantize_hqq, quantize_hqq
from kbit.quantizer.packing import unpack
from kbit.spec import spec_from_canonical, spec_of
from kbit.specs.hqq import HqqSpec
from tests.kbit.tiny_models import NAMES, bits_of, identical, tiny

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def hqq_by_hand(weight: Tensor, bits: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[float]]:
    """Codes, zero points and values of a matrix of whole groups in float64, and the mean absolute error of each round.

    Scales and the final zero points are rounded to float16, as they are stored.
    """
    x = weight.double().numpy().reshape(weight.shape[0], -1, size)
    top = 2**bits - 1
    scale = ((x.max(-1) - x.min(-1)) / top).astype(np.float16).astype(np.float64)[..., None]
    zero = -x.min(-1)[..., None] / scale
    beta, best, errors = 10.0, math.inf, []
    for _ in range(20):
        codes = np.clip(np.round(x / scale + zero), 0, top)
        error = x - (codes - zero) * scale
        with np.errstate(divide="ignore"):
            explained = np.sign(error) * np.maximum(np.abs(error) - np.abs(error) ** (0.7 - 1) / beta, 0)
        zero = (codes - (x - explained) / scale).mean(-1, keepdims=True)
        beta *= 1.01
        errors.append(float(np.abs(error).mean()))
        if errors[-1] >= best:
            break
        best = errors[-1]
    zero = zero.astype(np.float16).astype(np.float64)
    codes = np.clip(np.round(x / scale + zero), 0, top)
    return codes.reshape(weight.shape), zero[..., 0], ((codes - zero) * scale).reshape(weight.shape), errors


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_zero_points_and_values_are_those_of_float64(bits: int, size: int) -> None:
    weight = (torch.randn(96, 256, generator=torch.Generator().manual_seed(bits)).pow(3) * 0.02).half()
    q = quantize_hqq(weight, HqqSpec(bits=bits, blocksize=size))
    codes, zero, values, errors = hqq_by_hand(weight, bits, size)
    found = unpack(q.codes, bits, weight.numel()).view(weight.shape).numpy()
    assert len(errors) > 2
    assert np.mean(found == codes) > 0.999
    assert np.abs(found.astype(int) - codes).max() <= 1
    # A zero point is an average of codes: one code that rounds the other way moves it by 1/size.
    assert np.mean(np.abs(q.zero.float().numpy() - zero) < 2e-3 * np.maximum(1, np.abs(zero))) > 0.97
    back, true = dequantize_hqq(q).double().numpy(), torch.from_numpy(values).half().double().numpy()
    same = found == codes
    assert np.abs(back - true)[same].mean() < 0.01 * np.abs(weight.double().numpy() - values).mean()


def test_the_optimised_zero_points_have_a_smaller_error_than_those_of_the_range() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).pow(3) * 0.02
    for bits in (2, 3, 4):
        back = dequantize_hqq(quantize_hqq(weight, HqqSpec(bits=bits)))
        x = weight.half().float().view(64, -1, 64)
        scale = ((x.amax(-1) - x.amin(-1)) / (2**bits - 1)).half().float().unsqueeze(-1)
        zero = (-x.amin(-1, keepdim=True) / scale).half().float()
        plain = ((x / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale
        assert (back - weight).abs().pow(0.7).mean() < (plain.view_as(weight) - weight).abs().pow(0.7).mean()


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    blocksize=st.integers(1, 70) | st.sampled_from([64, "row"]),
    shape=st.lists(st.integers(1, 20), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["normal", "heavy", "tiny", "shifted", "zero", "constant"]),
)
def test_any_shape_and_value_stays_within_its_range_and_counts_its_bytes(
    bits: int, blocksize: int | str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, kind: str
) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    w = {
        "normal": w,
        "heavy": w.pow(5),
        "tiny": w * 1e-7,
        "shifted": w * 0.01 + 3,
        "zero": w * 0,
        "constant": w * 0 - 0.37,
    }[kind].to(dtype)
    before = w.clone()
    q = quantize_hqq(w, spec_of({"method": "hqq", "bits": bits, "blocksize": blocksize}))
    back = dequantize_hqq(q)
    assert (back.dtype, back.shape) == (dtype, w.shape)
    assert torch.equal(w, before)
    stored = w.float() if dtype != torch.float32 else w.half().float()
    span = max(float(stored.max() - stored.min()), 2e-3 * float(stored.abs().max()), 1e-7)
    assert float((back.float() - stored).abs().max()) <= span
    size = shape[-1] if blocksize == "row" else min(int(blocksize), shape[-1])
    groups = math.prod(shape[:-1]) * -(-shape[-1] // size)
    assert q.nbits == 8 * -(-math.prod(shape) * bits // 8) + 32 * groups
    assert q.nbits == 8 * sum(t.nbytes for t in (q.codes, q.scale, q.zero))


def test_a_group_of_one_value_comes_back() -> None:
    for value in (-0.37, 0.37, 3e-5, 0.0):
        w = torch.full((3, 40), value)
        back = dequantize_hqq(quantize_hqq(w, HqqSpec(bits=2, blocksize=16)))
        assert (back - w.half().float()).abs().max() <= abs(value) * 2e-3


def test_rows_in_pieces_give_what_one_piece_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 70)
    whole = quantize_hqq(weight, HqqSpec(bits=3, blocksize=32))
    monkeypatch.setattr("kbit.quantizer.hqq.chunk_length", lambda _: 8 * 70)
    pieces = quantize_hqq(weight, HqqSpec(bits=3, blocksize=32))
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(whole.zero, pieces.zero)
    assert torch.equal(dequantize_hqq(whole), dequantize_hqq(pieces))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    w = torch.randn(4, 40)
    w[2, 7] = bad
    with pytest.raises(WeightError, match="NaN or infinite"):
        quantize_hqq(w, HqqSpec(bits=4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_quantized_and_comes_back_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    model, spec = tiny(name, dtype), HqqSpec(bits=3, blocksize=32)
    before = bits_of(model)
    with quantize_model(model, spec) as handle:
        for layer, (rows, columns) in handle.layers.items():
            weight = before[f"{layer}.weight"]
            held = model.get_submodule(layer).weight.detach()
            weight, held = (weight.t(), held.t()) if name == "gpt2" else (weight, held)
            assert weight.shape == (rows, columns)
            assert torch.equal(held, dequantize_hqq(quantize_hqq(weight, spec)))
        count = sum(r * c * 3 + 32 * r * -(-c // 32) for r, c in handle.layers.values())
        assert handle.bits_per_param * sum(r * c for r, c in handle.layers.values()) == pytest.approx(count)
    assert identical(bits_of(model), before)


@pytest.mark.parametrize(
    ("values", "key", "said"),
    [
        ({"bits": 1}, "bits", "a whole number from 2 to 8"),
        ({"bits": 16}, "bits", "a whole number from 2 to 8"),
        ({}, "bits", "must be given"),
        ({"bits": 4, "blocksize": None}, "blocksize", "or row"),
        ({"bits": 4, "blocksize": 0}, "blocksize", "at least 1"),
        ({"bits": 4, "dtype": "int"}, "dtype", "method hqq has no such axis"),
    ],
)
def test_bad_values_are_named(values: dict[str, object], key: str, said: str) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        spec_of({"method": "hqq", **values})
    assert caught.value.key == key


def test_specs_come_back_and_say_what_they_are() -> None:
    specs = [spec_of({"method": "hqq", "bits": 4, "blocksize": size}) for size in (64, 128, "row")]
    assert [spec.label for spec in specs] == ["hqq4 g64", "hqq4 g128", "hqq4 row"]
    assert [spec_from_canonical(spec.canonical()) for spec in specs] == specs
    assert [spec.nominal_bits(512) for spec in specs] == [4.5, 4.25, 4 + 32 / 512]
    assert not any(spec.why_not_packed for spec in specs)


@pytest.mark.parametrize("blocksize", [24, 64, "row"])
def test_block_wise_tensors_stand_for_the_same_values(blocksize: int | str) -> None:
    spec = spec_of({"method": "hqq", "bits": 3, "blocksize": blocksize})
    for weight in (
        torch.randn(33, 128),
        (torch.randn(5, 128) * 6e4).clamp(-65504, 65504).half(),
        torch.randn(3, 128) * 1e-3 + 4,
    ):
        q = quantize_hqq(weight, spec)
        as_blocks = as_blockwise(q)
        assert torch.equal(dequantize(as_blocks), dequantize_hqq(q))
        assert as_blocks.nbits == q.nbits


@needs_gpu
def test_a_gpu_gives_nearly_the_same() -> None:
    weight = (torch.randn(512, 1000, generator=torch.Generator().manual_seed(0)).pow(3) * 0.02).half()
    for bits in (2, 4, 8):
        on_cpu, on_gpu = (quantize_hqq(w, HqqSpec(bits=bits)) for w in (weight, weight.cuda()))
        same = unpack(on_cpu.codes, bits, weight.numel()) == unpack(on_gpu.codes.cpu(), bits, weight.numel())
        assert same.float().mean() > 0.999
        errors = [(dequantize_hqq(q).cpu().float() - weight.float()).abs().mean() for q in (on_cpu, on_gpu)]
        assert errors[0] == pytest.approx(float(errors[1]), rel=1e-3)


@needs_gpu
def test_6_7_billion_weights_take_less_than_30_seconds() -> None:
    """One of the 32 blocks of an OPT of that size, quantized and dequantized, times 32."""
    shapes = [(4096, 4096)] * 4 + [(16384, 4096), (4096, 16384)]
    weights = [torch.randn(shape, device="cuda", dtype=torch.float16) * 0.02 for shape in shapes]
    dequantize_hqq(quantize_hqq(weights[0], HqqSpec(bits=4)))
    torch.cuda.synchronize()
    began = time.perf_counter()
    for weight in weights:
        dequantize_hqq(quantize_hqq(weight, HqqSpec(bits=4)))
    torch.cuda.synchronize()
    assert 32 * (time.perf_counter() - began) < 30
