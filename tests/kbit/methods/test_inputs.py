"""What methods that calibrate learn of layers' inputs: of no tokens, and of tensors that change between layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kbit import QuantSpec, dequantize, quantize, quantize_model
from kbit.methods.gptq import BlockMoments
from kbit.methods.inputs import BlockInputs
from kbit.models.architectures import Layer, block_layers
from kbit.models.quantize import Calibrated
from kbit.quantizer.hessian import SecondMoments
from kbit.spec import Spec
from kbit.specs.awq import AwqSpec
from kbit.specs.gptq import GptqSpec
from tests.kbit.methods.test_protocol import tokens
from tests.kbit.tiny_models import tiny

PLAIN = QuantSpec(bits=3, dtype="int", blocksize=16, scheme="group")


@pytest.mark.parametrize(
    ("spec", "by"),
    [
        (GptqSpec(bits=3, dtype="int", blocksize=16), BlockMoments),
        (AwqSpec(bits=3, dtype="int", blocksize=16), BlockInputs),
        (QuantSpec(bits=3, dtype="lloyd", blocksize=16, weighting="activation"), BlockInputs),
    ],
    ids=lambda value: value.label if isinstance(value, Spec) else value.__name__,
)
def test_a_layer_that_is_called_with_no_tokens_is_rounded_as_if_it_was_not_called(
    spec: Spec, by: type[BlockMoments | BlockInputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    add: Callable[..., None] = by.add

    def without_tokens(self: BlockMoments, layer: Layer, x: Tensor) -> None:
        add(self, layer, x[:0] if layer.name.endswith("fc2") else x)

    monkeypatch.setattr(by, "add", without_tokens)
    model = tiny("opt")
    weights = {layer.name: layer.weight.clone() for layer in block_layers(model)}
    with quantize_model(model, spec, calibration=Calibrated(tokens=tokens()[:2])):
        for layer in block_layers(model):
            assert bool(layer.working.isfinite().all()), layer.name
            if layer.name.endswith("fc2") and spec.dtype == "int":  # type: ignore[attr-defined]
                plain = dequantize(quantize(weights[layer.name], PLAIN))
                torch.testing.assert_close(layer.working, plain.to(layer.working.dtype), rtol=2e-3, atol=1e-6)
            assert bool(layer.working.any()), layer.name


def test_no_tokens_come_before_and_after_others_without_a_trace() -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    first, second, *_ = block_layers(tiny("opt"))
    for inputs in (BlockInputs(group_size=16), BlockMoments()):
        inputs.add(first, x[:0])
        inputs.add(second, x[:0])
        assert inputs.shared == {}
        inputs.add(first, x)
        inputs.add(second, x)
        assert inputs.shared == {first.name: first.name, second.name: first.name}
    moments = SecondMoments(64, x.device)
    moments.add(x[:0])
    assert moments.tokens == 0


@pytest.mark.parametrize("inputs", [BlockInputs(), BlockMoments()], ids=lambda inputs: type(inputs).__name__)
def test_a_tensor_that_is_changed_between_two_layers_is_not_shared(inputs: BlockInputs | BlockMoments) -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    first, second, third, *_ = block_layers(tiny("opt"))
    inputs.add(first, x.view(-1, 64))
    x.mul_(2)
    inputs.add(second, x.view(-1, 64))
    inputs.add(third, x.view(-1, 64))
    assert inputs.shared == {first.name: first.name, second.name: second.name, third.name: second.name}
    if isinstance(inputs, BlockInputs):
        before, after = inputs.of(first.name), inputs.of(third.name)
        assert before is not None
        assert after is not None
        torch.testing.assert_close(after.squares, 4 * before.squares)
    else:
        torch.testing.assert_close(inputs.take(second.name), 4 * inputs.take(first.name))
