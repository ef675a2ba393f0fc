"""The protocol of methods: a pass over a model carries one-shot methods, on every architecture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kbit import QuantSpec, SpecError, dequantize, quantize, quantize_model
from kbit.models.activations import Activations, BlockArguments
from kbit.models.architectures import Layer, block_layers
from kbit.models.quantize import Calibrated
from kbit.models.whole import WholeBlock, WholeModel, computing_in
from tests.kbit.methods.one_shot import ScaledSpec
from tests.kbit.tiny_models import NAMES, VOCABULARY, tiny

SPEC = ScaledSpec(bits=4, dtype="int", blocksize=32)


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (10, 16), generator=torch.Generator().manual_seed(0))


def inputs_of(model: nn.Module, layers: list[Layer], windows: Tensor) -> dict[str, Tensor]:
    """The input of each layer in a forward pass of the whole model: [tokens, in_features]."""
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    handles = [
        layer.module.register_forward_pre_hook(
            lambda _, given, name=layer.name: found[name].append(given[0].reshape(-1, given[0].shape[-1]))
        )
        for layer in layers
    ]
    with torch.no_grad():
        for batch in torch.split(windows, 8):
            model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_gives_each_layer_the_input_that_the_model_gives_it(name: str) -> None:
    model = tiny(name)
    true = inputs_of(model, block_layers(model), tokens())
    found: dict[str, list[Tensor]] = {}
    whole = WholeModel(module=model)
    kept = whole.start(tokens())
    for block in whole.blocks():
        kept = block.run(kept, watch=lambda layer, x: found.setdefault(layer.name, []).append(x))
    assert found.keys() == true.keys()
    for layer, parts in found.items():
        torch.testing.assert_close(torch.cat(parts), true[layer], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_one_shot_method_sees_the_inputs_of_the_quantized_blocks_before(name: str) -> None:
    model, original = tiny(name), tiny(name)
    with quantize_model(model, SPEC, calibration=Calibrated(tokens=tokens())) as handle:
        layers = block_layers(model)
        assert list(handle.layers) == [layer.name for layer in layers]
        # In the quantized model, inputs of the first layer of the last block depend on quantized blocks alone.
        last = max(layer.block for layer in layers)
        first = next(layer for layer in layers if layer.block == last)
        after = inputs_of(model, layers, tokens())[first.name]
        weight = {layer.name: layer.weight.clone() for layer in layers}
    before = inputs_of(model, block_layers(model), tokens())[first.name]
    assert not torch.allclose(before, after, rtol=1e-3)
    scale = after.float().abs().mean(0).clamp_min(1e-4) ** SPEC.strength
    mine = next(layer for layer in block_layers(original) if layer.name == first.name)
    q = quantize(mine.weight.float() * scale, SPEC)
    torch.testing.assert_close(weight[first.name], dequantize(q) / scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_comes_back_bit_for_bit_and_its_bits_are_what_the_method_says(name: str) -> None:
    model, original = tiny(name), tiny(name)
    with quantize_model(model, SPEC, calibration=Calibrated(tokens=tokens(), dtype=torch.bfloat16)) as handle:
        shapes = handle.layers.values()
        stored = sum(4 * n * k + 16 * -(-n * k // 32) + 16 * k for n, k in shapes)
        assert handle.bits_per_param == pytest.approx(stored / sum(n * k for n, k in shapes))
    for (key, value), (_, true) in zip(model.state_dict().items(), original.state_dict().items(), strict=True):
        assert torch.equal(value, true), key


def test_calibration_runs_in_its_own_dtype_and_leaves_parameters_and_buffers_as_they_were() -> None:
    model = tiny("neox", torch.bfloat16).float()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    with computing_in(model, torch.bfloat16):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert {k: v.dtype for k, v in model.named_buffers()} == {k: v.dtype for k, v in buffers.items()}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())


def test_what_a_pass_says_of_embedding_and_head() -> None:
    untied, tied = WholeModel(module=tiny("llama-gqa")), WholeModel(module=tiny("llama-tied"))
    assert untied.embedding is not None
    assert untied.head is not None
    assert (untied.embedding.weight.shape, untied.head.name) == ((VOCABULARY, 32), "lm_head")
    assert tied.head is None


def test_a_method_that_calibrates_needs_calibration_and_one_that_can_not_pack_is_refused() -> None:
    model = tiny("opt")
    with pytest.raises(SpecError, match="method='scaled' is not valid: one that does not calibrate"):
        quantize_model(model, SPEC)
    with pytest.raises(SpecError, match="method='scaled' is not valid: one whose layers can be held in k bits"):
        quantize_model(model, SPEC, calibration=Calibrated(tokens=tokens()), packed=True)
    with quantize_model(model, QuantSpec(bits=4, dtype="int")) as handle:
        assert handle.layers


def test_a_method_that_fails_leaves_the_model_as_it_was() -> None:
    model, original = tiny("opt"), tiny("opt")
    with torch.no_grad():
        block_layers(model)[-1].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        quantize_model(model, QuantSpec(bits=4, dtype="int"))
    first, same = block_layers(model)[0], block_layers(original)[0]
    assert torch.equal(first.weight, same.weight)


def test_a_block_that_writes_into_what_it_is_given_finds_it_again_as_it_was() -> None:
    class Doubling(nn.Module):
        """A block that changes its input in place."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.mul_(self.scale)

    block = WholeBlock(number=0, layers=(), module=Doubling())
    kept = Activations(hidden=[torch.ones(1, 3, 4)], arguments=[[BlockArguments(rest=(), named={})]])
    for _ in range(2):
        assert torch.equal(block.run(kept).hidden[0], torch.full((1, 3, 4), 2.0))
    assert torch.equal(kept.hidden[0], torch.ones(1, 3, 4))
