"""Mixtures of experts under every method: each expert's matrix is quantized by itself, or the method says why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from kbit import SpecError, dequantize, ggml_dequantize, ggml_quantize, quantize, quantize_model
from kbit.models.architectures import block_layers
from kbit.models.quantize import Calibrated
from kbit.quantizer.block_float import dequantize_block_float, quantize_block_float
from kbit.quantizer.hqq import dequantize_hqq, quantize_hqq
from kbit.spec import METHODS, QuantSpec, Spec, spec_of
from sweeps.study.reading import unfit
from tests.kbit.architectures import build
from tests.kbit.tiny_models import bits_of, identical

NAMES = ("mixtral", "qwen2_moe", "gpt_oss")  # gpt_oss has its experts' matrices transposed
WINDOWS = torch.zeros((1, 8), dtype=torch.int64)

Alone = Callable[[Tensor, Any], Tensor]
WEIGHTS: Mapping[str, tuple[dict[str, object], Alone]] = {
    "hqq": ({"bits": 3, "blocksize": 16}, lambda w, spec: dequantize_hqq(quantize_hqq(w, spec))),
    "block_float": (
        {"format": "nvfp4"},
        lambda w, spec: dequantize_block_float(quantize_block_float(w, spec)),
    ),
    "ggml": (
        {"ggml_type": "q4_0"},
        lambda w, _: ggml_dequantize(ggml_quantize(w.float(), "q4_0"), "q4_0").to(w.dtype),
    ),
    "blockwise": (
        {"bits": 3, "dtype": "int", "blocksize": 16, "clip": True, "rotation": 1},
        lambda w, spec: dequantize(quantize(w, spec)),
    ),
}
REFUSED: Mapping[str, dict[str, object]] = {
    "gptq": {"bits": 4, "dtype": "int"},
    "awq": {"bits": 4, "dtype": "int"},
    "mixed": {"budget": 4.25, "dtype": "int"},
    "llm_int8": {},
}


def test_every_method_is_either_tried_or_refused() -> None:
    # A checkpoint brings its own weights: there is nothing to quantize.
    assert {*WEIGHTS, *REFUSED, "baseline", "checkpoint"} >= set(METHODS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", WEIGHTS)
def test_each_experts_matrix_is_quantized_by_itself_and_comes_back(method: str, name: str) -> None:
    values, alone = WEIGHTS[method]
    spec, model = spec_of({"method": method, **values}), build(name).half()
    before = bits_of(model)
    experts = {layer.name: layer.weight.clone() for layer in block_layers(model) if layer.stack is not None}
    assert len(experts) == 16
    with quantize_model(model, spec) as handle:
        assert set(experts) < set(handle.layers)
        for layer in block_layers(model):
            if layer.name in experts:
                weight = experts[layer.name].contiguous()
                assert torch.equal(layer.weight, alone(weight, spec)), layer.name
    assert identical(bits_of(model), before)


@pytest.mark.parametrize("method", REFUSED)
def test_what_can_not_be_had_of_experts_is_refused_at_planning_and_by_the_model(method: str) -> None:
    spec, model = spec_of({"method": method, **REFUSED[method]}), build("mixtral")
    error = unfit(model.config.to_dict(), spec)
    assert error is not None
    assert str(error).startswith(f"method='{method}' is not valid: one that")
    before = bits_of(model)
    with pytest.raises(SpecError, match=f"method='{method}' is not valid: one that"):
        quantize_model(model, spec, calibration=Calibrated(tokens=WINDOWS) if spec.calibrates else None)
    assert identical(bits_of(model), before)
    assert unfit({"model_type": "llama"}, spec) is None


def test_options_that_calibrate_are_refused_by_their_own_names() -> None:
    options: list[Spec] = [
        QuantSpec(bits=3, dtype="lloyd", weighting="activation"),
        QuantSpec(bits=3, dtype="int", outlier_fraction=0.1, outlier_criterion="activation"),
    ]
    said = [str(unfit(build("mixtral").config.to_dict(), spec)) for spec in options]
    assert said[0].startswith("weighting='activation' is not valid: one that does not calibrate, for mixtral")
    assert said[1].startswith("outlier_criterion='activation' is not valid: one that does not calibrate, for mixtral")
