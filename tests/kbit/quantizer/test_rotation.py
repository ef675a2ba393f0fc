"""Rotations: orthogonal, by a matrix written out in float64, of any data type; the weight comes back rotated back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from kbit import QuantSpec, dequantize, quantize, quantize_model
from kbit.data_types import named_dtypes
from kbit.errors import SpecError, WeightError
from kbit.packed.linear import KBitLinear
from kbit.quantizer.rotation import rotate, rotate_back, rotated_run
from tests.kbit.tiny_models import NAMES, bits_of, identical, tiny

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
INT4 = QuantSpec(bits=4, dtype="int", blocksize=32, rotation=0)


def matrix(length: int, seed: int) -> np.ndarray:
    """H [length, length] in float64: signs, then a Hadamard matrix in each run."""
    size = rotated_run(length)
    signs = 2 * np.random.default_rng(seed).integers(0, 2, size=length) - 1
    return np.kron(np.eye(length // size), hadamard(size) / np.sqrt(size)) * signs


@pytest.mark.parametrize("length", [1, 7, 12, 32, 96, 256])
def test_a_rotation_is_the_matrix_and_its_way_back_the_inverse(length: int) -> None:
    values, h = torch.randn(5, length), matrix(length, 3)
    assert np.allclose(h @ h.T, np.eye(length))
    turned = rotate(values, 3)
    assert np.allclose(turned.numpy(), values.double().numpy() @ h.T, atol=1e-5)
    assert np.allclose(rotate_back(values, 3).numpy(), values.double().numpy() @ h, atol=1e-5)
    torch.testing.assert_close(rotate_back(turned, 3), values)
    assert [rotated_run(n) for n in (1, 7, 12, 96, 4096, 11008)] == [1, 1, 4, 32, 4096, 256]


def test_seeds_give_different_rotations_and_the_same_one_twice() -> None:
    values = torch.randn(3, 64)
    assert torch.equal(rotate(values, 5), rotate(values, 5))
    assert not torch.equal(rotate(values, 5), rotate(values, 6))


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", named_dtypes())
def test_the_weight_is_what_is_dequantized_of_the_rotated_one_rotated_back(dtype: str, storage: torch.dtype) -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)).to(storage)
    spec = QuantSpec(bits=4, dtype=dtype, blocksize=32, rotation=7)
    q, h = quantize(weight, spec), matrix(96, 7)
    turned = weight.double().numpy() @ h.T
    absmax = q.absmax.float().double().numpy()
    assert np.allclose(absmax, np.abs(turned.reshape(-1, 32)).max(1), rtol=1e-3)
    values = q.codebook.double().numpy()
    y = (turned.reshape(-1, 32) / absmax[:, None]).reshape(-1)
    codes = np.searchsorted((values[:-1] + values[1:]) / 2, y)
    back = (values[codes].reshape(-1, 32) * absmax[:, None]).reshape(24, 96) @ h
    found = dequantize(q)
    assert (found.dtype, found.shape) == (storage, weight.shape)
    gap = np.abs(found.double().numpy() - back)
    # One value on a midpoint, which float32 rounds the other way, changes its run of the row a little.
    assert np.mean(gap <= 2.0 ** (-8 if storage == torch.bfloat16 else -10) * np.abs(back) + 1e-5) > 0.97
    assert gap.max() < 0.2
    assert np.array_equal(weight.double().numpy() @ h.T, turned)  # the weight is as it was


def test_outliers_of_a_few_inputs_cost_less_rotated() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weight[:, ::64] *= 20
    plain, rotated = (QuantSpec(bits=3, dtype="int", blocksize=64, rotation=seed) for seed in (None, 0))
    errors = [(dequantize(quantize(weight, spec)) - weight).square().mean() for spec in (plain, rotated)]
    assert errors[1] < 0.6 * errors[0]
    assert quantize(weight, plain).nbits == quantize(weight, rotated).nbits


def test_kept_columns_stay_as_they_are_and_leave_the_rotation() -> None:
    weight = torch.randn(8, 64).half()
    weight[:, 5] = 1000
    q = quantize(weight, QuantSpec(bits=4, dtype="normal", blocksize=32, rotation=1), outlier_columns=[5, 9])
    back = dequantize(q)
    assert torch.equal(back[:, [5, 9]], weight[:, [5, 9]])
    assert q.absmax.max() < 5
    rest = [i for i in range(64) if i not in (5, 9)]
    assert (back - weight)[:, rest].abs().max() < 1


def test_centering_and_zero_points_are_of_the_rotated_weight() -> None:
    weight = torch.randn(16, 64) + 0.3
    for spec in (
        QuantSpec(bits=6, dtype="int", rotation=1, center=True),
        QuantSpec(bits=6, dtype="int", rotation=1, zero_point=True),
        QuantSpec(bits=6, dtype="int", rotation=1, clip=True, absmax_dtype="nested"),
    ):
        assert (dequantize(quantize(weight, spec)) - weight).abs().mean() < 0.06


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_quantized_and_comes_back_bit_for_bit(name: str) -> None:
    model = tiny(name, torch.float16)
    before = bits_of(model)
    with quantize_model(model, INT4) as handle:
        for layer in handle.layers:
            weight, held = before[f"{layer}.weight"], model.get_submodule(layer).weight.detach()
            weight, held = (weight.t(), held.t()) if name == "gpt2" else (weight, held)
            assert torch.equal(held, dequantize(quantize(weight, INT4)))
    assert identical(bits_of(model), before)


def test_it_runs_dense_and_says_why() -> None:
    with pytest.raises(SpecError, match="would have to rotate its inputs"):
        quantize_model(tiny("opt"), INT4, packed=True)
    with pytest.raises(ValueError, match="would have to rotate its inputs"):
        KBitLinear.from_quantized(quantize(torch.randn(16, 32), INT4))
    with pytest.raises(ValueError, match="impl='triton': its kernels know no rotations"):
        quantize(torch.randn(16, 32), INT4, impl="triton")


@pytest.mark.parametrize("seed", [-1, 1.5, True, "random"])
def test_a_bad_seed_is_refused(seed: object) -> None:
    with pytest.raises(SpecError, match="null, or a seed: a whole number of at least 0"):
        QuantSpec(bits=4, dtype="int", rotation=seed)  # type: ignore[arg-type]


def test_a_weight_that_is_not_finite_is_refused() -> None:
    weight = torch.randn(4, 64)
    weight[1, 1] = torch.inf
    with pytest.raises(WeightError, match="NaN or infinite"):
        quantize(weight, INT4)


@needs_gpu
@pytest.mark.parametrize("dtype", ["int", "normal", "lloyd", "quantile"])
def test_a_gpu_gives_the_same(dtype: str) -> None:
    weight = torch.randn(96, 768, generator=torch.Generator().manual_seed(0)).half()
    spec = QuantSpec(bits=4, dtype=dtype, rotation=3, clip=True)
    cpu, gpu = quantize(weight, spec), quantize(weight.cuda(), spec)
    assert torch.equal(cpu.absmax, gpu.absmax.cpu())
    assert torch.equal(cpu.codes, gpu.codes.cpu())
    assert torch.equal(dequantize(cpu), dequantize(gpu).cpu())
