"""Clipping search: the best of ten absmax per block, by a search written out in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbit import QuantSpec, dequantize, quantize, quantize_model
from kbit.errors import SpecError, WeightError
from kbit.quantizer.absmax import load_absmax
from kbit.quantizer.packing import unpack
from tests.kbit.quantizer.test_blockwise import SHAPES, SPECS, STORAGE, blocks_by_hand, weights
from tests.kbit.tiny_models import bits_of, identical, tiny

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
CLIPPED = SPECS.map(lambda spec: replace(spec, clip=True))


def errors_by_hand(x: np.ndarray, values: np.ndarray, absmax_dtype: str) -> tuple[list[np.float32], list[float]]:
    """Absmax of each candidate of a block, and its squared error in float64."""
    middles, found, errors = (values[:-1] + values[1:]) / np.float32(2), [], []
    for i in range(10):
        absmax = np.float32(np.abs(x).max()) * np.float32((20 - i) / 20)
        if absmax_dtype == "float16":
            absmax = np.float32(np.float16(min(absmax, np.float32(65504))))
        y = x / absmax if absmax else np.zeros_like(x)
        codes = np.array([np.count_nonzero(middles < v) for v in y])
        back = values[codes] * absmax
        found.append(absmax)
        errors.append(float(((x.astype(np.float64) - back.astype(np.float64)) ** 2).sum()))
    return found, errors


@settings(max_examples=40, deadline=None)
@given(
    spec=CLIPPED,
    shape=SHAPES,
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["normal", "heavy", "tiny", "grid"]),
)
def test_absmax_is_the_best_of_ten_and_of_equals_the_largest(spec, shape, dtype, seed, kind) -> None:
    weight = weights(shape, dtype, seed, kind)
    q = quantize(weight, spec)
    x = weight.to(STORAGE[dtype]).float().numpy().ravel()
    if q.mean is not None:
        x = x - np.float32(q.mean)
    values = q.codebook.numpy()
    middles = (values[:-1] + values[1:]) / np.float32(2)
    codes = unpack(q.codes, spec.bits, q.numel).numpy()
    for block, absmax in zip(blocks_by_hand(shape, spec), q.absmax.float().numpy(), strict=True):
        found, errors = errors_by_hand(x[block], values, spec.absmax_dtype)
        least, at = min(errors), found.index(absmax)
        # Errors that float64 tells apart only in its last digits, or below what is summed, count as equal.
        slack = 1e-9 * least + 2.0**-50 * float(found[0]) ** 2
        assert errors[at] <= least + slack
        assert not [i for i in range(at) if errors[i] < errors[at] - slack]
        if errors[0] <= least:
            assert errors[at] == errors[0]
        y = x[block] / absmax if absmax else np.zeros(len(block), np.float32)
        assert codes[block].tolist() == [np.count_nonzero(middles < v) for v in y]


def test_outliers_are_clipped_and_nothing_else() -> None:
    plain, clipped = (QuantSpec(bits=3, dtype="int", blocksize=64, clip=clip) for clip in (False, True))
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    before, after = quantize(weight, plain), quantize(weight, clipped)
    assert (after.absmax <= before.absmax).all()
    assert (after.absmax < before.absmax).any()
    errors = [(dequantize(q) - weight).square().view(-1, 64).sum(1) for q in (before, after)]
    assert (errors[1] <= errors[0] * (1 + 1e-3)).all()
    assert errors[1].sum() < 0.98 * errors[0].sum()
    # A block whose values are all codes keeps its absmax: no candidate is better.
    exact = torch.tensor([[-1.0, 0.0, 1 / 3, 2 / 3] * 16]).half()
    assert torch.equal(quantize(exact, clipped).absmax, quantize(exact, plain).absmax)


def test_blocks_longer_than_a_piece_are_summed_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(40, 100, generator=torch.Generator().manual_seed(1)).pow(3)
    specs = [QuantSpec(bits=3, dtype="normal", blocksize=size, clip=True) for size in (None, 1000, 64)]
    whole = [quantize(weight, spec).absmax for spec in specs]
    monkeypatch.setattr("kbit.quantizer.blocks.chunk_length", lambda _: 136)
    for spec, absmax in zip(specs, whole, strict=True):
        assert torch.equal(quantize(weight, spec).absmax, absmax)


def test_kept_columns_and_nested_absmax_are_searched_too() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    weight[:, 7] *= 30
    spec = QuantSpec(bits=3, dtype="lloyd", blocksize=32, clip=True)
    q = quantize(weight, spec, outlier_columns=[7])
    assert load_absmax(q.absmax).max() < 5
    assert torch.equal(dequantize(q)[:, 7], weight[:, 7].half().float())
    nested = quantize(weight, QuantSpec(bits=3, dtype="int", blocksize=32, clip=True, absmax_dtype="nested"))
    single = quantize(weight, QuantSpec(bits=3, dtype="int", blocksize=32, clip=True, absmax_dtype="float32"))
    assert (load_absmax(nested.absmax) - single.absmax).abs().max() < 0.02 * single.absmax.max()


def test_a_clipped_model_is_packed_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, spec = tiny("opt", torch.float16), QuantSpec(bits=3, dtype="lloyd", blocksize=32, clip=True)
    before = bits_of(model)
    with quantize_model(model, spec) as handle:
        dense, bits = bits_of(model), handle.bits_per_param
    assert identical(bits_of(model), before)
    with quantize_model(model, spec, packed=True) as handle:
        assert handle.bits_per_param == bits
        for layer in handle.layers:
            assert torch.equal(model.get_submodule(layer).dequantize(), dense[f"{layer}.weight"])
    assert identical(bits_of(model), before)
    with quantize_model(model, QuantSpec(bits=3, dtype="int", blocksize=32)) as plain:
        assert plain.bits_per_param == bits - 16 * 8 * len(plain.layers) / sum(r * c for r, c in plain.layers.values())


def test_what_can_not_be_clipped_is_refused() -> None:
    with pytest.raises(SpecError, match="clip='yes' is not valid: true or false"):
        QuantSpec(bits=4, dtype="int", clip="yes")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="clip=True is not valid: false with zero_point=true"):
        QuantSpec(bits=4, dtype="int", clip=True, zero_point=True)
    weight = torch.randn(4, 64)
    weight[1, 1] = torch.nan
    with pytest.raises(WeightError, match="NaN"):
        quantize(weight, QuantSpec(bits=4, dtype="int", clip=True))


@needs_gpu
@pytest.mark.parametrize("dtype", ["int", "normal", "lloyd", "quantile"])
@pytest.mark.parametrize("blocksize", [32, 64, 100, None])
def test_kernels_give_what_the_reference_gives(dtype: str, blocksize: int | None) -> None:
    for scheme in ("block", "group"):
        spec = QuantSpec(bits=3, dtype=dtype, blocksize=blocksize, scheme=scheme, clip=True)
        weight = weights((130, 1000), torch.float16, 1, "heavy")
        cpu, gpu = quantize(weight, spec, impl="torch"), quantize(weight.cuda(), spec, impl="triton")
        assert torch.equal(cpu.absmax, gpu.absmax.cpu())
        assert torch.equal(cpu.codes, gpu.codes.cpu())
