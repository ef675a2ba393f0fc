"""GPTQ of one matrix against a textbook implementation in float64, and its properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import hadamard
from torch import Tensor

from kbit import dequantize, quantize
from kbit.errors import HessianError, SpecError
from kbit.quantizer.gptq import quantize_corrected
from kbit.quantizer.hessian import SecondMoments, correction
from kbit.quantizer.packing import unpack
from kbit.spec import spec_of
from kbit.specs.gptq import GptqSpec

Array = NDArray[np.float64]
ROWS, TOKENS = 12, 600


def gptq(**axes: Any) -> GptqSpec:
    spec = spec_of({"method": "gptq", "bits": 4, "dtype": "int", "blocksize": 32} | axes)
    assert isinstance(spec, GptqSpec)
    return spec


def layer(columns: int, *, dead: tuple[int, ...] = (), seed: int = 0) -> tuple[Tensor, Tensor]:
    """A float16 weight [ROWS, columns], and correlated inputs [TOKENS, columns] of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(ROWS, columns, generator=generator) * torch.rand(columns, generator=generator).add(0.2)
    mix = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(TOKENS, columns, generator=generator) @ mix * torch.rand(columns, generator=generator).add(0.1)
    x[:, list(dead)] = 0
    return w.half(), x.half()


def moments(x: Tensor) -> Tensor:
    found = SecondMoments(x.shape[1], x.device)
    for batch in torch.split(x, 250):
        found.add(batch)
    return found.take()


class Textbook:
    """Optimal brain surgeon, column by column, in float64: the inverse is eliminated from, nothing is blocked."""

    def __init__(self, w: Array, x: Array, spec: GptqSpec, codebook: Array) -> None:
        self.spec, self.codebook = spec, codebook
        h = 2 / len(x) * x.T @ x
        dead = np.diag(h) == 0
        h[dead, dead] = 1
        w = w.copy()
        w[:, dead] = 0
        turn = np.eye(len(h))
        if spec.rotation is not None:
            size = len(h) & -len(h)
            signs = 2 * np.random.default_rng(spec.rotation).integers(0, 2, size=len(h)) - 1
            turn = np.kron(np.eye(len(h) // size), hadamard(size) / size**0.5) * signs
            w, h = w @ turn.T, turn @ h @ turn.T
        columns = w.shape[1]
        size = columns if spec.blocksize == -1 else int(spec.blocksize or 0)
        order = np.argsort(-np.diag(h), kind="stable") if spec.act_order else np.arange(columns)
        inverse = np.linalg.inv(h + 0.01 * np.mean(np.diag(h)) * np.eye(columns))[order][:, order]
        original, w = w, w[:, order]
        self.codes = np.zeros(w.shape, int)
        self.values = np.zeros(w.shape)
        stale = w.copy()  # what the published code reads: corrected for whole lazy blocks only
        grid: Any = None
        for i in range(columns):
            if i % 128 == 0:
                stale = w.copy()
            if spec.static_groups:
                first = order[i] // size * size
                grid = self.grid(original[:, first : first + size])
            elif i % size == 0:
                source = stale if spec.group_scales == "reference" else w
                grid = self.grid(source[:, i : i + size])
            self.codes[:, order[i]], self.values[:, order[i]] = self.nearest(w[:, i], grid)
            error = (w[:, i] - self.values[:, order[i]]) / inverse[i, i]
            w[:, i + 1 :] -= np.outer(error, inverse[i, i + 1 :])
            inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        self.order = order
        self.values = (self.values @ turn).astype(np.float16).astype(float)

    def grid(self, part: Array) -> tuple[Array, Array]:
        """Scale and zero point of each row."""
        if not self.spec.zero_point:
            return np.abs(part).max(1).astype(self.spec.absmax_dtype).astype(float), np.zeros(len(part))
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        scale = ((high - low) / (2**self.spec.bits - 1)).astype(np.float16).astype(float)
        return scale, np.clip(np.round(-low / np.where(scale == 0, np.inf, scale)), 0, 2**self.spec.bits - 1)

    def nearest(self, x: Array, grid: tuple[Array, Array]) -> tuple[NDArray[np.int64], Array]:
        scale, zero = grid
        values = (self.codebook[None, :] - zero[:, None]) * scale[:, None]
        codes = np.abs(values - x[:, None]).argmin(1)
        codes[scale == 0] = np.abs(self.codebook).argmin()
        found = values[np.arange(len(x)), codes]
        return codes, found if self.spec.rotation is not None else found.astype(np.float16).astype(float)


@pytest.mark.parametrize("columns", [96, 300])
@pytest.mark.parametrize(
    "axes",
    [
        {},
        {"blocksize": "row", "bits": 3},
        {"blocksize": 64, "bits": 2, "zero_point": True},
        {"blocksize": 128, "dtype": "float"},
        {"blocksize": 48, "dtype": "quantile", "bits": 3},
        {"blocksize": 200, "dtype": "normal"},
        {"group_scales": "reference", "bits": 3},
        {"act_order": True, "bits": 3},
        {"act_order": True, "static_groups": True, "zero_point": True},
        {"act_order": True, "blocksize": "row"},
        {"static_groups": True, "bits": 8},
        {"absmax_dtype": "float32", "dtype": "dynamic"},
        {"rotation": 3, "bits": 3, "act_order": True, "blocksize": "row"},
        {"rotation": 3, "dtype": "quantile"},
    ],
    ids=str,
)
def test_codes_and_weights_are_those_of_the_textbook(columns: int, axes: dict[str, Any]) -> None:
    spec = gptq(**axes)
    w, x = layer(columns, dead=(5, 70))
    by = correction(moments(x), act_order=spec.act_order, rotation=spec.rotation)
    q, order = quantize_corrected(w, spec, by, impl="torch")
    own = quantize(w, spec.blockwise(columns)).codebook  # of the original tensor
    true = Textbook(w.double().numpy(), x.double().numpy(), spec, own.double().numpy())
    codes, values = unpack(q.codes, spec.bits, w.numel()).view(w.shape), dequantize(q).double()
    if order is not None:
        np.testing.assert_array_equal(order.numpy(), true.order)
        codes, values = codes[:, order.argsort()], values[:, order.argsort()]
    np.testing.assert_array_equal(codes.numpy(), true.codes)
    # A float32 absmax is of the working copy to its last bit, which float64 has otherwise.
    np.testing.assert_allclose(
        values.numpy(),
        true.values,
        rtol=0 if spec.absmax_dtype == "float16" and spec.rotation is None else 2e-3,
        atol=1e-4 if spec.rotation is not None else 0,
    )


@pytest.mark.parametrize(
    "axes", [{}, {"dtype": "quantile"}, {"zero_point": True, "blocksize": "row"}, {"dtype": "lloyd"}, {"rotation": 5}]
)
def test_without_correction_it_is_block_wise_quantization_with_groups(axes: dict[str, Any]) -> None:
    w, _ = layer(200)
    spec = gptq(**axes)
    q, order = quantize_corrected(w, spec, correction(torch.eye(200), rotation=spec.rotation))
    plain = quantize(w, spec.blockwise(200))
    assert order is None
    assert q.spec == plain.spec
    for name in ("codes", "absmax", "codebook", "zero_points"):
        ours, theirs = getattr(q, name), getattr(plain, name)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs), name
    assert q.nbits == plain.nbits


def test_second_moments_are_those_of_float64_whatever_the_batches() -> None:
    _, x = layer(96)
    true = 2 / TOKENS * x.double().T @ x.double()
    torch.testing.assert_close(moments(x).double(), true, rtol=1e-5, atol=1e-6)


def test_the_factor_is_that_of_the_inverse() -> None:
    _, x = layer(96)
    h = moments(x)
    damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(96)
    upper = correction(h).upper.double()
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper, damped.inverse(), rtol=1e-3, atol=1e-3)


def test_damping_rises_until_there_is_a_factor_and_then_the_layer_fails_by_name() -> None:
    # Eigenvalues 2 and -0.05 (mean diagonal 0.975): 0.01 and 0.1 times the mean are tried, and the second is enough.
    indefinite = torch.tensor([[0.975, 1.025], [1.025, 0.975]])
    upper = correction(indefinite.clone()).upper.double()
    damped = indefinite.double() + 0.1 * 0.975 * torch.eye(2)
    torch.testing.assert_close(upper.T @ upper, damped.inverse(), rtol=1e-4, atol=1e-4)
    with pytest.raises(HessianError, match=r"no Cholesky factor with 0\.01, 0\.1, 1 times"):
        correction(torch.tensor([[1.0, 9.0], [9.0, 1.0]]))


def test_infinite_inputs_fail_by_name() -> None:
    found = SecondMoments(4, torch.device("cpu"))
    found.add(torch.full((3, 4), torch.inf))
    with pytest.raises(HessianError, match=r"NaN or infinite.*compute_dtype=bfloat16"):
        found.take()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_output_error_is_below_roundings(bits: int) -> None:
    w, x = layer(160)
    spec = gptq(bits=bits, zero_point=True)
    q, _ = quantize_corrected(w, spec, correction(moments(x)))
    plain = quantize(w, spec.blockwise(160))
    ours, theirs = (float((x.float() @ (dequantize(t) - w).float().T).square().sum()) for t in (q, plain))
    assert ours < 0.9 * theirs


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"blocksize": None}, "blocksize=None is not valid: row, or a whole number of at least 1, with method=gptq"),
        ({"scheme": "block"}, "scheme='block' is not valid: group with method=gptq"),
        ({"absmax_dtype": "nested"}, "absmax_dtype='nested' is not valid: float16 or float32 with method=gptq"),
        ({"center": True}, "center=True is not valid: false with method=gptq"),
        ({"rotation": 1, "act_order": True}, "rotation=1 is not valid: null with method=gptq and act_order=true"),
        ({"clip": True}, "clip=True is not valid: leave it out: method=gptq does not obey it"),
        ({"outlier_fraction": 0.02}, "outlier_fraction=0.02 is not valid: 0 with method=gptq"),
        ({"act_order": "yes"}, "act_order='yes' is not valid: true or false"),
        ({"static_groups": 1}, "static_groups=1 is not valid: true or false"),
        ({"group_scales": "new"}, "group_scales='new' is not valid: one of fresh, reference"),
        ({"bits": 1}, "bits=1 is not valid"),
    ],
)
def test_bad_parameters_are_refused_by_name(axes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        gptq(**axes)
    assert said in str(caught.value)


def test_axes_that_can_not_matter_are_normalised_away() -> None:
    assert gptq(blocksize="row", static_groups=True, group_scales="reference") == gptq(blocksize="row")
    assert gptq(blocksize=256, group_scales="reference") == gptq(blocksize=256)
    assert gptq(blocksize=64, group_scales="reference") != gptq(blocksize=64)
    assert gptq(static_groups=True, group_scales="reference") == gptq(static_groups=True)
