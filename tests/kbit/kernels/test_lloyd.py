"""Rounds of Lloyd's iteration by a kernel are those in torch, to the bit; in Triton's interpreter, or on a GPU."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from kbit.kernels.interpreter import interpreted
from kbit.quantizer.sorted_values import SortedValues
from tests.kbit.kernels.interpreted import passed_in_the_interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL = DEVICE == "cuda" or interpreted()
CASES = [(1, 2), (5, 2), (511, 3), (513, 4), (3000, 5), (70000, 3)]


@pytest.mark.skipif(KERNEL or find_spec("triton") is None, reason="runs in this process, or needs triton")
def test_the_kernel_passes_in_the_interpreter() -> None:
    assert passed_in_the_interpreter(__file__, "torch") >= len(CASES)


@pytest.mark.skipif(not KERNEL, reason="needs a GPU, or Triton's interpreter")
@pytest.mark.parametrize(("count", "bits"), CASES)
def test_rounds_are_those_in_torch(count: int, bits: int) -> None:
    from kbit.kernels.lloyd import lloyd_rounds

    torch.manual_seed(count)
    # Ties, zeros of both signs, extremes, and values that no float32 midpoint separates.
    values = torch.randn(count).div_(4).clamp_(-1, 1)
    values[::7] = values[0]
    values[: count // 9] *= 1e-9
    values[-1:] = -0.0
    in_torch = SortedValues(values)
    in_kernel = SortedValues(values.to(DEVICE))
    begin = in_torch.quantiles([(2 * i + 1) / 2 ** (bits + 1) for i in range(2**bits)])
    history = lloyd_rounds(in_kernel, begin.to(DEVICE), 3).cpu()
    for of_round in history[:-1]:
        assert torch.equal(of_round[0], begin)
        in_one, begin = in_torch.round(begin)
        assert torch.equal(of_round, in_one)
    assert torch.equal(history[-1, 0], begin)
