"""A codebook fitted by weighted squared errors: against the iteration written out in float64; what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kbit import QuantSpec, codebook, dequantize, quantize
from kbit.errors import SpecError, WeightError
from kbit.quantizer.weighted_lloyd import weighted_codebook

SPEC = QuantSpec(bits=3, dtype="lloyd", blocksize=32, weighting="activation")
PLAIN = QuantSpec(bits=3, dtype="lloyd", blocksize=32)


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(48, 96, generator=generator)
    importance = torch.randn(96, generator=generator).exp().pow(2).double()
    weight[:, importance > 5] *= 0.2
    return weight, importance


def fitted_by_hand(weight: Tensor, importance: Tensor, bits: int, size: int) -> np.ndarray:
    """Weighted Lloyd's iteration in float64, a cell at a time."""
    x = weight.half().double().numpy().reshape(-1, size)
    absmax = np.abs(x).max(1, keepdims=True).astype(np.float16).astype(np.float64)
    y, w = (x / absmax).ravel(), np.tile(importance.numpy(), len(weight))
    book, before = np.quantile(y, [(2 * i + 1) / 2 ** (bits + 1) for i in range(2**bits)]), np.inf
    for _ in range(100):
        cell = np.searchsorted((book[:-1] + book[1:]) / 2, y)
        error = float((w * (y - book[cell]) ** 2).sum())
        if before - error <= 1e-6 * before < np.inf:
            break
        before = error
        for i in range(len(book)):
            if w[cell == i].sum() > 0:
                book[i] = np.average(y[cell == i], weights=w[cell == i])
    return book


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_codebook_is_that_of_the_iteration_in_float64(bits: int) -> None:
    weight, importance = drawn(bits)
    spec = QuantSpec(bits=bits, dtype="lloyd", blocksize=32, weighting="activation")
    found = weighted_codebook(weight, spec, importance)
    assert np.allclose(found.numpy(), fitted_by_hand(weight, importance, bits, 32), atol=2e-4)


def test_equal_weights_give_lloyds_codebook() -> None:
    weight, _ = drawn()
    for spec in (
        PLAIN,
        QuantSpec(bits=4, dtype="lloyd", blocksize=None),
        QuantSpec(bits=3, dtype="lloyd", center=True),
    ):
        for equal in (1.0, 7.5, 0.0):  # of zeros all count alike
            found = weighted_codebook(weight, spec, torch.full((96,), equal))
            torch.testing.assert_close(found, codebook(spec, weight), rtol=0, atol=1e-4)


def test_errors_of_inputs_that_matter_are_smaller() -> None:
    weight, importance = drawn()
    errors = []
    for fitted in (codebook(PLAIN, weight), weighted_codebook(weight, SPEC, importance)):
        gap = dequantize(quantize(weight, PLAIN, fitted=fitted)) - weight
        errors.append(float((gap.square() * importance).sum()))
    assert errors[1] < 0.9 * errors[0]


def test_dead_inputs_kept_columns_and_blocks_of_zeros_are_left_out() -> None:
    weight, importance = drawn()
    kept = torch.tensor([3, 50])
    other = weight.clone()
    other[:, 7] = other[:, 7].sign() * 0.001  # its input is always zero
    importance[7] = 0
    other[:, kept] *= 0.5
    other[5] = weight[5] = 0
    books = [weighted_codebook(w, SPEC, importance, outlier_columns=kept) for w in (weight, other)]
    assert (books[0] - books[1]).abs().max() < 0.05  # absmax may change, and with it what is scaled
    assert torch.equal(weighted_codebook(torch.zeros(4, 32), SPEC, torch.ones(32)), torch.tensor([0.0, 1.0]))
    single = weighted_codebook(torch.full((4, 32), 0.5), SPEC, torch.ones(32))
    assert single.tolist() == [0.0, 1.0]


def test_without_weights_it_is_refused() -> None:
    weight, importance = drawn()
    for call in (lambda: quantize(weight, SPEC), lambda: codebook(SPEC, weight)):
        with pytest.raises(SpecError, match="weighting='activation' is not valid: null, or quantize with fitted="):
            call()
    q = quantize(weight, SPEC, fitted=weighted_codebook(weight, SPEC, importance))
    assert q.nbits == quantize(weight, PLAIN).nbits
    weight[0, 0] = torch.nan
    with pytest.raises(WeightError, match="NaN"):
        weighted_codebook(weight, SPEC, importance)
