"""What scoring reads of logits, in one reading: against torch in float64; in Triton's interpreter, or on a GPU."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from kbit.evaluation.agreement import compare_logits
from kbit.kernels.interpreter import interpreted
from kbit.kernels.logits import summarize_both, summarize_logits
from tests.kbit.kernels.interpreted import passed_in_the_interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL = DEVICE == "cuda" or interpreted()
IMPLS = ("torch", "triton") if KERNEL else ("torch",)
SHAPES = [(1, 1), (3, 7), (5, 4096), (4, 4097), (2, 10007), (0, 64)]


@pytest.mark.skipif(KERNEL or find_spec("triton") is None, reason="runs in this process, or needs triton")
def test_the_kernel_passes_in_the_interpreter() -> None:
    assert passed_in_the_interpreter(__file__, "triton") >= 3 * len(SHAPES)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sum_is_that_of_float64(impl: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    logits = (5 * torch.randn(shape)).to(dtype).to(DEVICE)
    largest, log_sum, best = (part.cpu() for part in summarize_logits(logits, impl=impl))
    truth = logits.double().cpu()
    assert torch.equal(largest.double(), truth.max(-1).values if len(truth) else truth[:, 0])
    np.testing.assert_allclose(largest.double() + log_sum, truth.logsumexp(-1), rtol=3e-6)
    first = [(row == row.max()).nonzero()[0].item() for row in truth]
    assert best.tolist() == first


@pytest.mark.parametrize("impl", IMPLS)
def test_the_first_of_equal_logits_is_the_best(impl: str) -> None:
    logits = torch.zeros(3, 9000)
    logits[0, [4, 4100, 8200]] = 2.0
    logits[1, [8999, 300]] = 1.0
    assert summarize_logits(logits.to(DEVICE), impl=impl)[2].tolist() == [4, 300, 0]


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_finite_stays_so(impl: str) -> None:
    logits = torch.ones(3, 5000)
    logits[0, 4500], logits[1, 7], logits[2, 100:4900] = float("nan"), float("inf"), float("-inf")
    largest, log_sum, _ = (part.cpu() for part in summarize_logits(logits.to(DEVICE), impl=impl))
    assert log_sum[:2].isnan().all()
    assert float(largest[2] + log_sum[2]) == pytest.approx(1 + np.log(200), rel=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_may_lie_apart(impl: str) -> None:
    torch.manual_seed(0)
    wide = torch.randn(6, 300, device=DEVICE)
    for logits in (wide[:, :211], wide.T):
        found = summarize_logits(logits, impl=impl)
        assert all(torch.allclose(a, b) for a, b in zip(found, summarize_logits(logits.contiguous()), strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("distance", [0.0, 1e-2, 1.0])
def test_the_divergence_is_that_of_float64(
    impl: str, dtype: torch.dtype, shape: tuple[int, int], distance: float
) -> None:
    torch.manual_seed(0)
    reference = (3 * torch.randn(shape)).to(dtype)
    logits = (reference + distance * torch.randn(shape)).to(dtype)
    targets = torch.randint(0, shape[1], shape[:1])
    found = compare_logits(logits.to(DEVICE), reference.to(DEVICE), targets.to(DEVICE), impl=impl)
    log_q, log_p = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
    truth = (log_p.exp() * (log_p - log_q)).sum(-1)
    # By definition from log-softmax in float32, of which a logarithm of 10 has half a millionth of error.
    np.testing.assert_allclose(found.kl.cpu(), truth, rtol=1e-4, atol=5e-7)
    if distance == 0:
        assert not found.kl.any()
    if impl == "triton":  # perplexity's own, to the bit
        now, before, _ = summarize_both(logits.to(DEVICE), reference.to(DEVICE))
        for found_part, alone in zip(
            (*now, *before),
            (*summarize_logits(logits.to(DEVICE), impl=impl), *summarize_logits(reference.to(DEVICE), impl=impl)),
            strict=True,
        ):
            assert torch.equal(found_part, alone)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_has_no_probability_adds_nothing_and_what_is_not_finite_stays_so(impl: str) -> None:
    reference, logits = torch.zeros(4, 5000), torch.zeros(4, 5000)
    reference[0, 7] = logits[0, 7] = float("-inf")  # impossible to both
    logits[1, 8] = float("-inf")  # to the second alone
    reference[2, 9] = float("nan")
    logits[3, 9] = float("nan")
    found = compare_logits(
        logits.to(DEVICE), reference.to(DEVICE), torch.zeros(4, dtype=torch.int64).to(DEVICE), impl=impl
    )
    kl = found.kl.cpu()
    assert float(kl[0]) == 0.0
    assert kl[1] == float("inf")
    assert kl[2:].isnan().all()
    assert found.top_token.cpu()[2:].isnan().all()
