"""The Triton kernels that quantize and dequantize, against the reference: equal to the bit
(``tests.kbit.kernels.triton_cases``).

On the CPU a sample that covers every pair of choices runs in Triton's interpreter, in a process of its own; on a GPU
the full product, in one process for each width and dtype, which compile side by side.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from kbit import QuantSpec, dequantize, quantize
from kbit.errors import SpecError, WeightError
from tests import ROOT
from tests.kbit.kernels.triton_cases import WEIGHTS, same

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def run(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.kbit.kernels.triton_cases", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-4000:]


@needs_triton
@pytest.mark.parametrize("what", ["sample", "edges"])
def test_in_the_interpreter_kernels_and_reference_are_equal(what: str) -> None:
    finish(run(what, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"))


@needs_triton
def test_values_that_are_not_finite_are_refused_in_the_reference_s_words() -> None:
    finish(run("refused", TRITON_INTERPRET="1", OMP_NUM_THREADS="1"))


def test_an_impl_that_cannot_run_is_refused_with_the_reason() -> None:
    weight, spec = torch.ones(2, 64), QuantSpec(bits=4, dtype="int")
    q = quantize(weight, spec)
    for impl, why in (
        ("tritn", "not one of auto, torch, triton, cuda"),
        ("cuda", "only the matmul has"),
        ("triton", "CPU"),
    ):
        if impl == "triton" and find_spec("triton") is None:
            why = "not installed"
        with pytest.raises(ValueError, match=why):
            quantize(weight, spec, impl=impl)
        with pytest.raises(ValueError, match=why):
            dequantize(q, impl=impl)
    for impl in ("auto", "torch"):
        assert same(dequantize(q, impl=impl), dequantize(q))


@needs_gpu
def test_on_a_gpu_misuse_is_refused_before_any_launch() -> None:
    weight, spec = torch.ones(2, 64, device="cuda"), QuantSpec(bits=4, dtype="int")
    for bad, options in (
        (weight.int(), {}),
        (weight[:0], {}),
        (weight[0, 0], {}),
        (weight, {"outlier_columns": [64]}),
        (weight, {"outlier_columns": [1, 1]}),
    ):
        with pytest.raises(WeightError):
            quantize(bad, spec, impl="triton", **options)
    with pytest.raises(SpecError):
        quantize(weight, spec, impl="triton", storage_dtype=torch.float32)
    q = quantize(weight, spec, impl="triton")
    object.__setattr__(q, "codes", q.codes[:-1])
    with pytest.raises(ValueError, match="64 bytes, not 63"):
        dequantize(q, impl="triton")


@needs_gpu
@needs_triton
def test_on_a_gpu_the_full_product_is_equal() -> None:
    for process in [run("product", str(bits), name) for bits in range(2, 9) for name in WEIGHTS]:
        finish(process)


@needs_gpu
@needs_triton
@pytest.mark.parametrize("what", ["sample", "edges", "refused"])
def test_on_a_gpu_sample_edges_and_refusals_are_equal(what: str) -> None:
    finish(run(what))


@needs_gpu
@needs_triton
def test_on_a_gpu_auto_takes_the_kernels_and_makes_no_copy_of_the_weight() -> None:
    weight, spec = torch.randn(4096, 4096, device="cuda").half(), QuantSpec(bits=4, dtype="float")
    q = quantize(weight, spec)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    again = quantize(weight, spec)
    assert torch.cuda.max_memory_allocated() - before < weight.nbytes / 3
    assert same(q.codes, again.codes)
    assert same(q.codes, quantize(weight, spec, impl="torch").codes)


@needs_gpu
@needs_triton
@pytest.mark.parametrize("blocksize", [64, 100, None])
def test_on_a_gpu_more_than_two_to_the_31_values_are_indexed_rightly(blocksize: int | None) -> None:
    count, last = 2**31 + 4133, 64 * 100 * 8
    weight = torch.randn(2**24, device="cuda").half().repeat(count // 2**24 + 1)[:count]
    spec, tail = QuantSpec(bits=3, dtype="float", blocksize=blocksize), count - count // last * last + last
    weight[0] = 30.0  # the largest, also of the tail, where all are one block
    weight[-1] = 30.0
    q, end = quantize(weight, spec, impl="triton"), quantize(weight[-tail:], spec, impl="torch")
    assert same(q.codes[-end.codes.numel() :], end.codes)
    assert same(dequantize(q, impl="triton")[-tail:], dequantize(end, impl="torch"))
