"""AWQ: against its search written out in float64 on a small model, its limits, whole models, bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kbit import QuantSpec, quantize_model
from kbit.errors import ActivationError, SpecError
from kbit.methods.awq import EXPONENTS, quantize_layers
from kbit.methods.inputs import BlockInputs
from kbit.models.architectures import block_layers
from kbit.models.originals import Originals
from kbit.models.quantize import Calibrated
from kbit.models.whole import WholeModel
from kbit.spec import spec_from_canonical, spec_of
from kbit.specs.awq import AwqSpec
from tests.kbit.methods.test_protocol import inputs_of, tokens
from tests.kbit.tiny_models import NAMES, bits_of, identical, tiny

SPEC = AwqSpec(bits=3, dtype="int", blocksize=16)
PLAIN = AwqSpec(bits=3, dtype="int", blocksize=16, clip=False)


def rounded(weight: np.ndarray, limit: np.ndarray | None = None, size: int = 16) -> np.ndarray:
    """3-bit integers in groups of rows, float64; absmax in float16, of the group or as given [out, groups]."""
    grouped = weight.reshape(len(weight), -1, size)
    absmax = np.abs(grouped).max(-1) if limit is None else limit
    absmax = absmax.astype(np.float16).astype(np.float64)[..., None]
    y = np.clip(grouped / absmax, -1, 1) * 3
    return (np.ceil(y - 0.5).clip(-3, 3) / 3 * absmax).reshape(weight.shape)  # a tie goes to the lower code


def scales_by_hand(x: np.ndarray, exponent: float) -> np.ndarray:
    scale = np.maximum(np.abs(x).mean(0) ** exponent, 1e-4)
    return (scale / np.sqrt(scale.max() * scale.min())).astype(np.float16).astype(np.float64)


def output_of(block: nn.Module, number: int, model: nn.Module) -> np.ndarray:
    """What leaves a block in a forward pass of the whole model, float64."""
    found: list[Tensor] = []
    handle = block.register_forward_hook(lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(tokens(), use_cache=False)
    handle.remove()
    return torch.cat(found).double().numpy()


def lively(name: str) -> nn.Module:
    """A tiny model whose weights and inputs are of unlike sizes, so that scales matter."""
    model = tiny(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in block_layers(model):
            layer.working.mul_(6)
        for key, parameter in model.named_parameters():
            if "norm" in key and key.endswith("weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator).exp())
        for layer in block_layers(model):
            layer.working.copy_(layer.working.half().float())
    return model


@pytest.mark.parametrize("name", ["opt", "llama-gqa"])
def test_scales_and_clipping_are_those_of_a_search_in_float64(name: str) -> None:
    model, reference = lively(name), lively(name)
    with quantize_model(model, SPEC, calibration=Calibrated(tokens=tokens())) as handle:
        found = {layer.name: layer.weight.double().numpy().copy() for layer in block_layers(model)}
    assert list(handle.layers) == list(found)
    layers = block_layers(reference)
    x = {key: value.double().numpy() for key, value in inputs_of(reference, layers, tokens()).items()}
    path = layers[0].name[: layers[0].name.index(".0.") + 2]
    blocks = {number: reference.get_submodule(path[:-1] + str(number)) for number in (0, 1)}
    groups: dict[bytes, list] = {}
    for layer in layers:
        groups.setdefault(x[layer.name].tobytes() + bytes([layer.block]), []).append(layer)
    assert len(groups) == 8  # QKV, attention output, FFN 1 (with its gate), FFN 2 of two blocks
    chosen = []
    for same in groups.values():
        own, block = x[same[0].name], blocks[same[0].block]
        true = output_of(block, same[0].block, reference)
        weights = {layer.name: layer.weight.double().numpy().copy() for layer in same}
        errors = []
        for exponent in EXPONENTS:
            scale = scales_by_hand(own, exponent)
            for layer in same:
                layer.working.copy_(torch.from_numpy(rounded(weights[layer.name] * scale) / scale).half().float())
            errors.append(float(((output_of(block, same[0].block, reference) - true) ** 2).sum()))
            for layer in same:
                layer.working.copy_(torch.from_numpy(weights[layer.name]).float())
        best = int(np.argmin(errors))
        chosen.append(best)
        scale = scales_by_hand(own, EXPONENTS[best])
        for layer in same:
            expected = clipped_by_hand(weights[layer.name], scale, own)
            close = np.abs(found[layer.name] - expected) <= 2e-3 * np.abs(expected) + 1e-5
            assert close.mean() > 0.97, (layer.name, close.mean(), best)
    assert len(set(chosen)) > 2  # the search has something to find


def clipped_by_hand(weight: np.ndarray, scale: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The weight that is computed with: each group with the absmax of the least error of its part of the output."""
    scaled, size = weight * scale, 16
    largest = np.abs(scaled.reshape(len(weight), -1, size)).max(-1)
    least, limit = np.full(largest.shape, np.inf), largest.copy()
    for i in range(10):
        candidate = largest * (20 - i) / 20
        gap = (rounded(scaled, candidate) / scale - weight).reshape(len(weight), -1, size)
        parts = np.einsum("tgc,ogc->tog", x.reshape(len(x), -1, size), gap)
        error = (parts**2).sum(0)
        limit = np.where(error < least, candidate, limit)
        least = np.minimum(least, error)
    return (rounded(scaled, limit) / scale).astype(np.float16).astype(np.float64)


def test_the_error_of_a_layer_is_less_than_of_rounding() -> None:
    rounding, scaled, clipped = (
        output_error(spec) for spec in (QuantSpec(bits=3, dtype="int", blocksize=16, scheme="group"), PLAIN, SPEC)
    )
    assert scaled < 0.95 * rounding
    assert clipped < scaled


def output_error(spec: QuantSpec) -> float:
    """Squared error of the last block's output."""
    model = lively("opt")
    block = model.get_submodule(block_layers(model)[-1].name.rsplit(".", 1)[0])
    true = output_of(block, 1, model)
    with quantize_model(model, spec, calibration=Calibrated(tokens=tokens())):
        return float(((output_of(block, 1, model) - true) ** 2).sum())


@pytest.mark.parametrize("name", NAMES)
def test_a_model_comes_back_bit_for_bit_and_shared_scales_count_once(name: str) -> None:
    model = tiny(name, torch.float16)
    before = bits_of(model)
    with quantize_model(model, SPEC, calibration=Calibrated(tokens=tokens(), dtype=torch.float32)) as handle:
        assert not identical(bits_of(model), before)
        count = sum(3 * n * k + 16 * n * -(-k // 16) for n, k in handle.layers.values())
        shared: dict[bytes, int] = {}
        for layer in block_layers(model):
            _, columns = handle.layers[layer.name]
            shared.setdefault(f"{layer.block} {first_of(layer.name)}".encode(), columns)
        count += 16 * sum(shared.values())
        assert handle.bits_per_param * sum(n * k for n, k in handle.layers.values()) == pytest.approx(count)
    assert identical(bits_of(model), before)


def first_of(layer: str) -> str:
    """The layers that share an input have one name."""
    end = layer.rsplit(".", 1)[1]
    return "qkv" if end in ("q_proj", "k_proj", "v_proj") else "up" if end in ("gate_proj", "up_proj") else layer


@pytest.mark.parametrize("dtype", ["normal", "quantile"])
def test_any_codebook_zero_points_rows_and_short_groups_are_taken(dtype: str) -> None:
    calibration = Calibrated(tokens=tokens()[:2])
    for spec in (
        AwqSpec(bits=4, dtype=dtype, blocksize=24),
        AwqSpec(bits=2, dtype="int", zero_point=True, blocksize=24),
        AwqSpec(bits=4, dtype=dtype, blocksize="row", absmax_dtype="float32"),
    ):
        model = lively("opt")
        before = bits_of(model)
        with quantize_model(model, spec, calibration=calibration):
            gap = max(
                float((bits_of(model)[k] - v).abs().max() / v.abs().max()) for k, v in before.items() if "fc" in k
            )
            assert 0 < gap < 0.9
        assert identical(bits_of(model), before)


def test_cells_of_one_model_leave_its_originals_as_they_are() -> None:
    model = tiny("opt", torch.float16)
    before, originals = bits_of(model), Originals(model=model)
    calibration = Calibrated(tokens=tokens()[:2])
    alone = tiny("opt", torch.float16)
    quantize_model(alone, SPEC, calibration=calibration)
    quantize_model(model, QuantSpec(bits=4, dtype="int"), packed=True, originals=originals)
    for _ in range(2):
        quantize_model(model, SPEC, calibration=calibration, originals=originals)
        assert identical(bits_of(model), bits_of(alone))
    originals.restore()
    assert identical(bits_of(model), before)


def test_inputs_that_are_not_finite_are_named_and_the_model_comes_back() -> None:
    model = tiny("opt")
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight[tokens()[0, 0]] = torch.inf
    before = bits_of(model)
    with pytest.raises(ActivationError, match=r"inputs of .*layers\.0\..* on calibration data are NaN or infinite"):
        quantize_model(model, SPEC, calibration=Calibrated(tokens=tokens()))
    assert identical(bits_of(model), before)


def test_layers_that_share_an_input_are_found() -> None:
    model = tiny("llama-gqa")
    whole, inputs = WholeModel(module=model), BlockInputs(group_size=16)
    block = next(iter(whole.blocks()))
    block.run(whole.start(tokens()), watch=inputs.add)
    names = [[layer.name.rsplit(".", 1)[1] for layer in group] for group in inputs.groups(block.layers)]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    x = inputs_of(model, list(block.layers), tokens())[block.layers[0].name].double()
    sums = inputs.of(block.layers[1].name)
    assert sums is not None
    assert sums.products is not None
    assert sums.tokens == len(x) == 160
    torch.testing.assert_close(sums.magnitudes, x.abs().sum(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums.squares, x.square().sum(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums.products[1].double(), x[:, 16:].T @ x[:, 16:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "key", "said"),
    [
        ({"scheme": "block"}, "scheme", "group with method=awq"),
        ({"blocksize": None}, "blocksize", "row, or a whole number"),
        ({"center": True}, "center", "false with method=awq"),
        ({"outlier_fraction": 0.1}, "outlier_fraction", "0 with method=awq"),
        ({"rotation": 1}, "rotation", "method=awq does not obey it"),
        ({"clip": 1}, "clip", "true or false"),
    ],
)
def test_bad_values_are_named(values: dict[str, object], key: str, said: str) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        spec_of({"method": "awq", "bits": 4, "dtype": "int", **values})
    assert caught.value.key == key


def test_specs_come_back_and_say_what_they_are() -> None:
    specs = [spec_of({"method": "awq", "bits": 4, "dtype": "int", "clip": clip}) for clip in (True, False)]
    assert [spec.label for spec in specs] == ["awq int4 g64 clipped", "awq int4 g64"]
    assert [spec_from_canonical(spec.canonical()) for spec in specs] == specs
    assert specs[0].canonical() != specs[1].canonical()
    with pytest.raises(SpecError, match="held in k bits"):
        quantize_model(tiny("opt"), specs[0], packed=True, calibration=Calibrated(tokens=tokens()))
    assert next(iter(quantize_layers(WholeModel(module=tiny("opt")), SPEC, tokens()))) is not None
