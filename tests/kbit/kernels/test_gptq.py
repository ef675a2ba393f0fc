"""GPTQ's columns rounded by a kernel are those in torch, to the bit; in Triton's interpreter, or on a GPU."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from kbit.kernels.interpreter import interpreted
from kbit.quantizer.gptq import quantize_corrected, round_by_definition
from kbit.quantizer.grids import Grids
from kbit.quantizer.hessian import correction
from kbit.spec import spec_of
from kbit.specs.gptq import GptqSpec
from tests.kbit.kernels.interpreted import passed_in_the_interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL = DEVICE == "cuda" or interpreted()
CASES: list[dict[str, Any]] = [
    {"bits": 4, "dtype": "int", "blocksize": 32},
    {"bits": 2, "dtype": "int", "blocksize": 64, "zero_point": True},
    {"bits": 3, "dtype": "float", "blocksize": "row", "act_order": True},
    {"bits": 8, "dtype": "dynamic", "blocksize": 48, "absmax_dtype": "float32"},
    {"bits": 3, "dtype": "quantile", "blocksize": 32, "group_scales": "reference", "act_order": True},
    {"bits": 5, "dtype": "int", "blocksize": 32, "zero_point": True, "static_groups": True, "act_order": True},
]


@pytest.mark.skipif(KERNEL or find_spec("triton") is None, reason="runs in this process, or needs triton")
def test_the_kernel_passes_in_the_interpreter() -> None:
    assert passed_in_the_interpreter(__file__, "torch") >= len(CASES) + 1


@pytest.mark.skipif(not KERNEL, reason="needs a GPU, or Triton's interpreter")
@pytest.mark.parametrize(
    ("axes", "dtype"), [*((axes, torch.float16) for axes in CASES), (CASES[0], torch.bfloat16)], ids=str
)
def test_codes_and_errors_are_those_in_torch(
    axes: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kbit.kernels import gptq as kernels
    from tests.kbit.kernels.triton_cases import interpret_exactly

    if DEVICE == "cpu":
        interpret_exactly()
    spec = spec_of({"method": "gptq"} | axes)
    assert isinstance(spec, GptqSpec)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 150, generator=generator) @ torch.randn(150, 150, generator=generator)
    x[:, 7] = 0
    w = torch.randn(7, 150, generator=generator).mul(0.1).to(dtype)
    w[2, :40] = 0  # groups of zeros
    by = correction((x.T @ x / 400).to(DEVICE), act_order=spec.act_order)
    launches = 0

    def compared(w: Any, upper: Any, grids: Grids, groups: Any, codes: Any, *, refreshes: bool) -> torch.Tensor:
        """Both of each segment, from the same working copy: products between segments are cuBLAS's own."""
        nonlocal launches
        launches += 1
        scale, zero = grids.scale.clone(), None if grids.zero is None else grids.zero.clone()
        true = codes.clone()
        errors = round_by_definition(w, upper, grids, groups, true, refreshes=refreshes)
        found = launch(
            w, upper, Grids(**vars(grids) | {"scale": scale, "zero": zero}), groups, codes, refreshes=refreshes
        )
        assert torch.equal(codes, true)
        assert torch.equal(found, errors)
        assert torch.equal(scale, grids.scale)
        assert zero is None or torch.equal(zero, grids.zero)
        return found

    launch = kernels.round_segment
    monkeypatch.setattr(kernels, "round_segment", compared)
    q, _ = quantize_corrected(w.to(DEVICE), spec, by, impl="triton")
    assert launches >= 2
    assert q.codes.device.type == DEVICE


@pytest.mark.skipif(interpreted() or find_spec("triton") is None, reason="needs triton, and not its interpreter")
@pytest.mark.parametrize(
    ("refreshes", "asymmetric", "half"), [(True, True, True), (True, False, False), (False, False, True)]
)
def test_the_kernel_compiles_for_a_gpu_where_there_is_none_without_fused_products(
    refreshes: bool, asymmetric: bool, half: bool
) -> None:
    # The interpreter takes Python that the compiler refuses.
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kbit.kernels.gptq_jit import round_columns

    scales = "*fp16" if half else "*fp32"
    pointers = {"groups_ptr": "*i64", "scale_ptr": scales, "zero_ptr": "*fp32" if asymmetric else scales}
    pointers |= {"codes_ptr": "*u8"}
    constants = {"BITS": 3, "ROWS": 4, "WIDTH": 128, "REFRESHES": refreshes, "ASYMMETRIC": asymmetric}
    constants |= {"STORAGE": tl.bfloat16, "LIMIT": 3.3e38, "HALF_SCALES": half, "HALF_LIMIT": 65504.0}
    kinds = {
        name: "constexpr" if name in constants else pointers.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in round_columns.arg_names
    }
    places = {(round_columns.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(fn=round_columns, signature=kinds, constexprs=places),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "enable_fp_fusion": False},
    )
    assert "fma.rn" not in compiled.asm["ptx"]
    assert "div.rn.f32" in compiled.asm["ptx"]
