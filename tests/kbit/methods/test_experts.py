"""Mixtures of experts under every method: each expert's matrix is quantized by itself, from the inputs sent to it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kbit import SpecError, dequantize, ggml_dequantize, ggml_quantize, quantize, quantize_model
from kbit.errors import ArchitectureError
from kbit.methods.awq import StoredScaled, quantize_layers, scales_of
from kbit.models.architectures import block_layers
from kbit.models.quantize import Calibrated, QuantHandle
from kbit.models.whole import WholeModel
from kbit.quantizer.block_float import dequantize_block_float, quantize_block_float
from kbit.quantizer.blockwise import quantize_wide
from kbit.quantizer.hqq import dequantize_hqq, quantize_hqq
from kbit.spec import METHODS, QuantSpec, Spec, spec_of
from kbit.specs.awq import AwqSpec
from sweeps.study.reading import unfit
from tests.kbit.architectures import VOCABULARY, build
from tests.kbit.tiny_models import bits_of, identical

NAMES = ("mixtral", "qwen2_moe", "gpt_oss")  # gpt_oss has its experts' matrices transposed
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = torch.randint(0, VOCABULARY, (10, 24), generator=torch.Generator().manual_seed(5)).to(DEVICE)

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
CALIBRATED: Mapping[str, Spec] = {
    "gptq": spec_of({"method": "gptq", "bits": 3, "dtype": "int", "blocksize": 16}),
    "rotated": spec_of({"method": "gptq", "bits": 3, "dtype": "int", "blocksize": "row", "rotation": 1}),
    "awq": spec_of({"method": "awq", "bits": 3, "dtype": "int", "blocksize": 16}),
    "lloyd": QuantSpec(bits=3, dtype="lloyd", weighting="activation"),
    "kept": QuantSpec(bits=3, dtype="int", outlier_fraction=0.1, outlier_criterion="activation"),
    "mixed": spec_of({"method": "mixed", "budget": 4.25, "dtype": "int", "candidates": "3+4+8"}),
}
PROXY = QuantSpec(bits=3, dtype="int", outlier_fraction=0.1)
ROUNDED = QuantSpec(bits=3, dtype="int", blocksize=16, scheme="group")


def test_every_method_is_either_tried_or_refused() -> None:
    # A checkpoint brings its own weights: there is nothing to quantize.
    assert {*WEIGHTS, *(s.method for s in CALIBRATED.values()), "llm_int8", "baseline", "checkpoint"} >= set(METHODS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", WEIGHTS)
def test_each_experts_matrix_is_quantized_by_itself_and_comes_back(method: str, name: str) -> None:
    values, alone = WEIGHTS[method]
    spec, model = spec_of({"method": method, **values}), build(name).half().to(DEVICE)
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


def test_what_replaces_layers_is_refused_at_planning_and_by_the_model() -> None:
    spec, model = spec_of({"method": "llm_int8"}), build("mixtral")
    error = unfit(model.config.to_dict(), spec)
    assert str(error).startswith("method='llm_int8' is not valid: one that quantizes weights alone")
    before = bits_of(model)
    with pytest.raises(SpecError, match="method='llm_int8' is not valid: one that quantizes weights alone"):
        quantize_model(model, spec)
    assert identical(bits_of(model), before)
    assert all(unfit(model.config.to_dict(), of) is None for of in CALIBRATED.values())


class Unstacked(nn.Module):
    """A mixture's experts as linear layers of their own, which any hook sees; token after token in plain Python."""

    def __init__(self, of: Any) -> None:
        super().__init__()
        self.of, self.up, self.down = of, nn.ModuleList(), nn.ModuleList()
        for stack, layers in ((of.gate_up_proj, self.up), (of.down_proj, self.down)):
            for matrix in stack.detach():
                weight = matrix.t() if of.is_transposed else matrix
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight.data = weight.clone()
                layers.append(linear)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for token, chosen in enumerate(index.tolist()):
            for place, expert in enumerate(chosen):
                both = self.up[expert](hidden[token : token + 1])
                both = both + self.of.gate_up_proj_bias[expert] if self.of.has_bias else both
                made = self.down[expert](self.of._apply_gate(both))
                made = made + self.of.down_proj_bias[expert] if self.of.has_bias else made
                out[token] += weights[token, place] * made[0]
        return out


@cache
def true_inputs(name: str) -> dict[str, Tensor]:
    """The inputs of each expert's matrix in the first block of a model, float64, by hooks on an unstacked copy."""
    model = copy.deepcopy(float32(name)).double()
    for block in model.model.layers:
        block.mlp.experts = Unstacked(block.mlp.experts)
    block = model.model.layers[0]
    found: dict[str, list[Tensor]] = {}
    for kind, layers in (("gate_up", block.mlp.experts.up), ("down", block.mlp.experts.down)):
        for number, layer in enumerate(layers):
            into = found.setdefault(f"model.layers.0.mlp.experts.{kind}_proj.{number}", [])
            layer.register_forward_pre_hook(lambda _, given, into=into: into.append(given[0]))
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def float32(name: str) -> Any:
    return build(name).float().to(DEVICE)


@pytest.mark.parametrize(("name", "implementation"), [*((n, "grouped_mm") for n in NAMES), ("mixtral", "eager")])
def test_each_expert_calibrates_on_the_tokens_that_are_sent_to_it(name: str, implementation: str) -> None:
    model, true = float32(name), true_inputs(name)
    model.config._experts_implementation = implementation
    whole = WholeModel(module=model)
    told: dict[str, list[Tensor]] = {}
    block = next(whole.blocks())
    block.look(whole.start(TOKENS), lambda layer, x: told.setdefault(layer.name, []).append(x))
    assert set(true) < set(told) == {layer.name for layer in block.layers}
    for layer, x in true.items():
        seen = torch.cat(told[layer]).double()
        assert seen.shape == x.shape
        torch.testing.assert_close(seen.T @ seen, x.T @ x, rtol=1e-4, atol=1e-5 * float((x.T @ x).abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_experts_calibrate_in_half_precision_too(name: str, dtype: torch.dtype) -> None:
    # A GPU has products of its own in these dtypes. Tokens may go elsewhere than in float32: truth is of what enters.
    model = build(name).to(DEVICE, dtype)
    entering: list[tuple[Tensor, ...]] = []
    whole, told = WholeModel(module=model), dict[str, list[Tensor]]()
    block = next(whole.blocks())
    experts = model.model.layers[0].mlp.experts
    kept = whole.start(TOKENS)
    with torch.no_grad():
        hook = experts.register_forward_pre_hook(lambda _, given: entering.append(given))
        block.look(kept, lambda layer, x: told.setdefault(layer.name, []).append(x))
        hook.remove()
        true, found = Unstacked(copy.deepcopy(experts).double()), dict[str, list[Tensor]]()
        for kind, layers in (("gate_up", true.up), ("down", true.down)):
            for number, layer in enumerate(layers):
                into = found.setdefault(f"model.layers.0.mlp.experts.{kind}_proj.{number}", [])
                layer.register_forward_pre_hook(lambda _, given, into=into: into.append(given[0]))
        for hidden, index, weights in entering:
            true(hidden.double(), index, weights.double())
    for layer_name, parts in found.items():
        x, seen = torch.cat(parts), torch.cat(told[layer_name]).double()
        assert seen.shape == x.shape
        near = 2e-2 if dtype == torch.bfloat16 else 2e-3
        torch.testing.assert_close(seen.T @ seen, x.T @ x, rtol=near, atol=near * float((x.T @ x).abs().max()))
    before = bits_of(model)
    with calibrated(model, CALIBRATED["gptq"]) as handle:
        assert handle.calibration_tokens[layer_name] == len(x)
        assert all(bool(layer.working.isfinite().all()) for layer in block_layers(model))
    assert identical(bits_of(model), before)


def test_products_that_are_not_seen_are_an_error_by_name() -> None:
    model = float32("mixtral")
    model.config._experts_implementation = "batched_mm"
    before = bits_of(model)
    with pytest.raises(ArchitectureError, match=r"layers\.0\.mlp\.experts\.gate_up_proj can't be seen: MixtralExperts"):
        quantize_model(model, CALIBRATED["gptq"], calibration=Calibrated(tokens=TOKENS))
    assert identical(bits_of(model), before)


def calibrated(model: nn.Module, spec: Spec, tokens: Tensor = TOKENS) -> QuantHandle:
    return quantize_model(model, spec, storage_dtype=torch.float16, calibration=Calibrated(tokens=tokens))


@pytest.fixture
def few_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kbit.methods.awq.EXPONENTS", (0.0, 0.5))


def corrected(weight: Tensor, x: Tensor, groups: int) -> Tensor:
    """GPTQ of float64 [out, in] by inputs [tokens, in], by the textbook: column by column, each with a new inverse."""
    h = 2 / len(x) * x.T @ x
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h)).to(h)
    upper, left = torch.linalg.cholesky(torch.linalg.inv(h), upper=True), weight.clone()
    for i in range(weight.shape[1]):
        if i % groups == 0:
            absmax = left[:, i : i + groups].abs().amax(1).half().double()
        rounded = ((left[:, i] / absmax * 3).round().clamp(-3, 3) / 3 * absmax).half().double()
        error = (left[:, i] - rounded) / upper[i, i]
        left[:, i] = rounded
        left[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]
    return left


@pytest.mark.parametrize("name", NAMES)
def test_gptq_of_experts_is_the_textbooks_and_better_than_rounding(name: str) -> None:
    model, true = float32(name), true_inputs(name)
    weights = {layer.name: layer.weight.double() for layer in block_layers(model)}
    # The experts' inputs are those of the 16-bit attention: theirs are taken before anything is rounded.
    ours = rounding = 0.0
    with calibrated(model, CALIBRATED["gptq"]) as handle:
        for layer in block_layers(model):
            if layer.name not in true:
                continue
            x, w = true[layer.name], weights[layer.name]
            assert handle.calibration_tokens[layer.name] == len(x)
            wanted = corrected(w, x, 16)
            assert (layer.working.double() == wanted).double().mean() > 0.97, layer.name
            ours += float((x @ (layer.working.double() - w).T).square().sum())
            rounding += float((x @ (dequantize(quantize(w.half(), ROUNDED)).double() - w).T).square().sum())
    assert 0 < ours < 0.8 * rounding


def test_awqs_scales_of_an_expert_have_the_least_error_of_its_own_output(monkeypatch: pytest.MonkeyPatch) -> None:
    exponents = (0.0, 0.2, 0.4, 0.6)
    monkeypatch.setattr("kbit.methods.awq.EXPONENTS", exponents)
    model, true = float32("mixtral"), true_inputs("mixtral")
    spec = CALIBRATED["awq"]
    assert isinstance(spec, AwqSpec)
    # The first block alone.
    found = {}
    for layer, stored in quantize_layers(WholeModel(module=model, storage_dtype=torch.float16), spec, TOKENS):
        if layer.block:
            break
        found[layer.name] = layer.weight.clone(), stored
    chosen = []
    for name, x in true.items():
        weight, stored = found[name]
        errors = []
        for exponent in exponents:
            scale = scales_of(x.abs().mean(0), exponent)
            q = quantize_wide(weight * scale.float(), spec.blockwise())
            off = StoredScaled(tensor=q, scale=scale, storage_dtype=torch.float16).weight().double() - weight.double()
            errors.append(float((x @ off.T).square().sum()))
        scales = torch.stack([scales_of(x.abs().mean(0), exponent).float() for exponent in exponents])
        best = int((scales - stored.scale.float()).abs().sum(1).argmin())
        assert errors[best] <= min(errors) * (1 + 1e-4), name
        chosen.append(best)
        assert stored.tokens == len(x)
        assert stored.has_scale
    assert len(set(chosen)) > 1


@pytest.mark.usefixtures("few_scales")
@pytest.mark.parametrize("name", CALIBRATED)
def test_a_method_that_calibrates_gives_experts_back_and_counts_their_bits(name: str) -> None:
    model, spec = float32("mixtral"), CALIBRATED[name]
    before = bits_of(model)
    with calibrated(model, spec, TOKENS[:1] if name == "mixed" else TOKENS) as handle:
        assert handle.codes_hash is not None
        assert not any(torch.equal(layer.working, before_of(before, layer)) for layer in block_layers(model))
        seen = handle.calibration_tokens
        assert list(seen) == ([] if name == "mixed" else list(handle.layers))
        if name == "gptq":
            assert handle.bits_per_param == 3 + 16 / 16
            assert sum(seen[f"model.layers.1.mlp.experts.down_proj.{n}"] for n in range(4)) == 2 * TOKENS.numel()
    assert identical(bits_of(model), before)


def before_of(before: Mapping[str, Tensor], layer: Any) -> Tensor:
    name = f"{layer.name}.weight" if layer.stack is None else layer.name.rpartition(".")[0]
    return layer.matrix(before[name])  # type: ignore[no-any-return]


@pytest.mark.usefixtures("few_scales")
@pytest.mark.parametrize("name", ["gptq", "awq", "lloyd", "kept"])
def test_an_expert_that_no_token_is_sent_to_is_rounded_and_the_handle_says_so(name: str) -> None:
    model, spec = float32("gpt_oss"), CALIBRATED[name]
    for block in model.model.layers:
        block.mlp.router.bias.data[2] = -1e4
    plain = {}
    for method, alike in {"gptq": ROUNDED, "awq": ROUNDED, "kept": PROXY}.items():
        with quantize_model(model, alike, storage_dtype=torch.float16):
            plain[method] = {layer.name: layer.working.half() for layer in block_layers(model)}
    with calibrated(model, spec) as handle:
        dead = [layer for layer in handle.layers if layer.endswith("_proj.2")]
        assert [layer for layer, tokens in handle.calibration_tokens.items() if not tokens] == dead
        assert (handle.unseen_layers, handle.least_tokens) == (4, 0)
        for layer in block_layers(model):
            assert bool(layer.working.isfinite().all()), layer.name
            if layer.name in dead and name in plain:
                assert torch.equal(layer.working.half(), plain[name][layer.name]), layer.name
