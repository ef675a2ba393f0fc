"""What scoring reads of logits, in one reading: against torch in float64; in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from kbit.kernels.interpreter import interpreted
from kbit.kernels.logits import summarize_logits
from tests import ROOT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL = DEVICE == "cuda" or interpreted()
IMPLS = ("torch", "triton") if KERNEL else ("torch",)
SHAPES = [(1, 1), (3, 7), (5, 4096), (4, 4097), (2, 10007), (0, 64)]


@pytest.mark.skipif(KERNEL or find_spec("triton") is None, reason="runs in this process, or needs triton")
def test_the_kernel_passes_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rp", "-k", "triton", __file__, "-p", "no:cacheprovider"]
    ran = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.count("PASSED") >= 3 * len(SHAPES)


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
