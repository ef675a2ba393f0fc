"""Mixed bits: slopes by hand, the budget, what cells share, restoring, packing, bad values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kbit import QuantSpec, quantize_model
from kbit.errors import ActivationError, SpecError
from kbit.methods import noise
from kbit.methods.noise import LEVELS, SEEDS, loss_slopes, noise_of
from kbit.models.architectures import block_layers
from kbit.models.originals import Originals
from kbit.models.quantize import Calibrated
from kbit.models.whole import WholeModel
from kbit.packed.files import load_packed, save_packed
from kbit.quantizer.blockwise import dequantize, quantize
from kbit.spec import spec_from_canonical, spec_of
from kbit.specs.mixed import MixedSpec
from tests.kbit.methods.test_awq import lively
from tests.kbit.methods.test_protocol import tokens
from tests.kbit.tiny_models import NAMES, bits_of, identical, tiny

SPEC = MixedSpec(budget=4.5, dtype="int", blocksize=16)
CALIBRATION = Calibrated(tokens=tokens())


def loss_of(model: nn.Module, windows: Tensor) -> float:
    with torch.no_grad():
        logits = model(windows, use_cache=False).logits[:, :-1].double()
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


@pytest.mark.parametrize("name", NAMES)
def test_losses_from_a_block_on_are_those_of_the_whole_model(name: str) -> None:
    model, windows = tiny(name), tokens()
    before = bits_of(model)
    whole = WholeModel(module=model)
    with whole.scoring(windows) as losses:
        true = losses()
        assert float(true.mean()) == pytest.approx(loss_of(model, windows), abs=1e-5)
        kept = whole.start(windows)
        for block in whole.blocks():
            torch.testing.assert_close(losses(block.number, kept), true, rtol=1e-6, atol=1e-6)
            kept = block.run(kept)
    assert identical(bits_of(model), before)
    assert loss_of(model, windows) == pytest.approx(float(true.mean()), abs=1e-5)  # nothing of it is left behind


@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_slopes_are_least_squares_of_the_losses_with_noise(name: str) -> None:
    model, reference, windows = lively(name), lively(name), tokens()
    before, clean = bits_of(model), loss_of(reference, windows)
    slopes = loss_slopes(WholeModel(module=model), windows)
    layers = block_layers(reference)
    assert list(slopes) == [layer.name for layer in layers]
    assert identical(bits_of(model), before)
    for number in (0, len(layers) - 1):
        layer = layers[number]
        own = layer.working.clone()
        squares, changes = [], []
        for seed in SEEDS:
            for level in LEVELS:
                noise = noise_of(layer.shape, float(own.norm()), number, seed)
                layer.working.copy_(own + level * noise)
                assert float((layer.working - own).norm() / own.norm()) == pytest.approx(level, rel=1e-4)
                squares.append(level**2)
                changes.append(loss_of(reference, windows) - clean)
        layer.working.copy_(own)
        slope = np.linalg.lstsq(np.array(squares)[:, None], np.array(changes), rcond=None)[0][0]
        assert slopes[layer.name] == pytest.approx(slope, rel=0.01, abs=1e-3)
        assert slopes[layer.name] == float(f"{slopes[layer.name]:.2e}")


def test_noise_is_of_its_layer_and_seed() -> None:
    first = noise_of((8, 4), 2.0, 0, 0)
    assert torch.equal(first, noise_of((8, 4), 2.0, 0, 0))
    assert float(first.norm()) == pytest.approx(2.0)
    assert len({float(noise_of((8, 4), 2.0, n, s)[0, 0]) for n in (0, 1) for s in (0, 1)}) == 4


@pytest.mark.parametrize("name", NAMES)
def test_layers_have_their_own_bits_within_the_budget_and_come_back_bit_for_bit(name: str) -> None:
    model = tiny(name, torch.float16)
    before = bits_of(model)
    original = {layer.name: layer.weight.clone() for layer in block_layers(model)}
    with quantize_model(model, SPEC, calibration=Calibrated(tokens=tokens(), dtype=torch.float32)) as handle:
        assert list(handle.allocation) == list(handle.layers) == list(original)
        assert len(set(handle.allocation.values())) > 1
        for layer in block_layers(model):
            plain = QuantSpec(bits=handle.allocation[layer.name], dtype="int", blocksize=16)
            assert torch.equal(layer.weight, dequantize(quantize(original[layer.name], plain)))
        stored = sum((handle.allocation[key] + 1) * n * k for key, (n, k) in handle.layers.items())
        assert handle.bits_per_param == stored / sum(n * k for n, k in handle.layers.values()) <= 4.5
        assert handle.bits_per_param_nominal == 4.5
        assert handle.predicted_change is not None
        assert handle.predicted_change >= 0
        assert handle.codes_hash is not None
    assert identical(bits_of(model), before)


def test_no_uniform_allocation_within_the_budget_is_predicted_to_be_better() -> None:
    model = lively("opt")
    wide = MixedSpec(budget=5, dtype="int", blocksize=16)
    handles = [
        quantize_model(lively("opt"), spec, calibration=CALIBRATION)
        for spec in (wide, MixedSpec(budget=5, dtype="int", blocksize=16, candidates=4))
    ]
    chosen, uniform = (handle.predicted_change for handle in handles)
    assert set(handles[1].allocation.values()) == {4}
    assert chosen is not None
    assert uniform is not None
    assert chosen < 0.9 * uniform
    assert handles[0].allocation_hash != handles[1].allocation_hash
    assert loss_of(model, tokens()) > 0


def test_all_budgets_of_a_model_share_what_is_measured() -> None:
    model = lively("opt")
    before, originals = bits_of(model), Originals(model=model)
    alone = [lively("opt") for _ in range(2)]
    specs = [SPEC, MixedSpec(budget=3.5, dtype="int", blocksize=16)]
    for other, spec in zip(alone, specs, strict=True):
        quantize_model(other, spec, calibration=CALIBRATION)
    quantize_model(model, QuantSpec(bits=3, dtype="int"), originals=originals)
    with patch.object(noise, "loss_slopes", wraps=loss_slopes) as measured:
        for other, spec in zip(alone, specs, strict=True):
            quantize_model(model, spec, calibration=CALIBRATION, originals=originals)
            assert identical(bits_of(model), bits_of(other))
        assert measured.call_count == 1
        quantize_model(model, SPEC, calibration=Calibrated(tokens=tokens()[:2]), originals=originals)
        assert measured.call_count == 2  # other data
        other_dtype = Calibrated(tokens=tokens()[:2], dtype=torch.bfloat16)
        quantize_model(model, SPEC, calibration=other_dtype, originals=originals)
        assert measured.call_count == 3  # other arithmetic
    originals.restore()
    assert identical(bits_of(model), before)


def test_known_slopes_are_not_measured_again() -> None:
    model = lively("opt")
    slopes = list(loss_slopes(WholeModel(module=model), tokens()).values())
    with quantize_model(model, SPEC, calibration=CALIBRATION) as handle:
        measured = (handle.allocation, handle.predicted_change)
    known = replace(CALIBRATION, slopes=[float(np.float32(slope)) for slope in slopes])
    with (
        patch.object(noise, "loss_slopes", side_effect=AssertionError),
        patch.object(WholeModel, "scoring", side_effect=AssertionError),  # which may cast the whole model
        quantize_model(model, SPEC, calibration=known) as handle,
    ):
        assert (handle.allocation, handle.predicted_change) == measured
    # A layer that the loss feels gets more bits than one that it doesn't.
    dull = replace(known, slopes=[100.0, *[0.0] * (len(slopes) - 1)])
    with quantize_model(model, SPEC, calibration=dull) as handle:
        assert list(handle.allocation.values())[:2] == [8, 2]
    with pytest.raises(ValueError, match=f"slopes of 3 layers are another model's: OPTForCausalLM has {len(slopes)}"):
        quantize_model(model, SPEC, calibration=replace(known, slopes=[1.0] * 3))


def test_layers_of_unlike_bits_are_held_in_k_bits_and_stored(tmp_path: Path) -> None:
    model, dense = lively("opt"), lively("opt")
    before, originals = bits_of(model), Originals(model=model)
    spec = MixedSpec(budget=4.75, dtype="normal", blocksize=32)
    plain = quantize_model(dense, spec, calibration=CALIBRATION)
    handle = quantize_model(model, spec, packed=True, calibration=CALIBRATION, originals=originals)
    assert (handle.allocation, handle.bits_per_param, handle.codes_hash) == (
        plain.allocation,
        plain.bits_per_param,
        plain.codes_hash,
    )
    assert len(set(handle.allocation.values())) > 1
    assert loss_of(model, tokens()) == pytest.approx(loss_of(dense, tokens()), abs=1e-4)
    with torch.no_grad():
        logits = model(tokens(), use_cache=False).logits
        save_packed(model, tmp_path)
        assert torch.equal(load_packed(tmp_path)(tokens(), use_cache=False).logits, logits)
    originals.restore()
    assert identical(bits_of(model), before)


@pytest.mark.parametrize("dtype", ["quantile", "lloyd", "float", "dynamic"])
def test_any_data_type_is_taken(dtype: str) -> None:
    spec = MixedSpec(budget=6.5, dtype=dtype, blocksize=32, candidates="3+4+6")
    with quantize_model(tiny("opt"), spec, calibration=Calibrated(tokens=tokens()[:2])) as handle:
        assert set(handle.allocation.values()) <= {3, 4, 6}
        assert handle.bits_per_param <= 6.5


def test_a_budget_below_what_this_model_takes_is_refused_and_the_model_comes_back() -> None:
    model = tiny("opt")
    before = bits_of(model)
    spec = MixedSpec(budget=2.25, dtype="int", blocksize="row", scheme="group")
    with pytest.raises(SpecError, match=r"budget=2\.25 is not valid: at least 2\.4") as caught:
        quantize_model(model, spec, calibration=CALIBRATION)
    assert caught.value.key == "budget"
    assert identical(bits_of(model), before)


def test_losses_that_are_not_finite_are_named() -> None:
    model = tiny("opt")
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight[tokens()[0, 0]] = torch.inf
    with pytest.raises(ActivationError, match="the loss of the 16-bit model on calibration data is nan"):
        quantize_model(model, SPEC, calibration=CALIBRATION)


def test_a_layer_of_zeros_costs_nothing() -> None:
    model = tiny("opt")
    first = block_layers(model)[0]
    first.working.zero_()
    with quantize_model(model, SPEC, calibration=CALIBRATION) as handle:
        assert handle.allocation[first.name] == 2


@pytest.mark.parametrize(
    ("values", "key", "said"),
    [
        ({"budget": 2.0}, "budget", r"at least 2\.25: that many bits"),
        ({"budget": 8.5}, "budget", r"at most 8\.25: no more bits"),
        ({"budget": 2.9, "candidates": "3+4"}, "budget", r"at least 3\.25: .*candidates=3-4"),
        ({"budget": 3.4, "dtype": "int", "zero_point": True, "candidates": "4-8"}, "budget", r"at least 4\.3125"),
        ({"budget": True}, "budget", "a number of bits"),
        ({"budget": "4"}, "budget", "a number of bits"),
        ({"candidates": "1-4"}, "candidates", r"a range \(2-8\)"),
        ({"candidates": "4-3"}, "candidates", r"a range \(2-8\)"),
        ({"candidates": "four"}, "candidates", r"a range \(2-8\)"),
        ({"bits": 3}, "bits", "4, the whole bits of budget=4.25"),
        ({"dtype": "inty"}, "dtype", "one of"),
        ({"dtype": {"file": "my.json"}}, "dtype", "the name of a data type"),
        ({"outlier_fraction": 0.1}, "outlier_fraction", "has no such axis"),
    ],
)
def test_bad_values_are_named(values: dict[str, object], key: str, said: str) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        spec_of({"method": "mixed", "budget": 4.25, "dtype": "int", **values})
    assert caught.value.key == key


@pytest.mark.parametrize("missing", ["budget", "dtype"])
def test_what_has_no_default_must_be_given(missing: str) -> None:
    values = {"method": "mixed", "budget": 4.25, "dtype": "int"}
    with pytest.raises(SpecError, match="must be given with method=mixed") as caught:
        spec_of({name: value for name, value in values.items() if name != missing})
    assert caught.value.key == missing


def test_specs_come_back_and_say_what_they_are() -> None:
    plain = {"method": "mixed", "budget": 4.25, "dtype": "float"}
    more = {"candidates": "8+2+3", "blocksize": "row", "scheme": "group", "subnormals": "bnb", "clip": True}
    specs = [spec_of(plain), spec_of(plain | more), spec_of(plain | {"candidates": "2+3+4"})]
    assert [spec.label for spec in specs] == [
        "mixed float 4.25 b64",
        "mixed float 4.25 row candidates=2+3+8 bnb-subnormals clipped",
        "mixed float 4.25 b64 candidates=2-4",
    ]
    assert [spec_from_canonical(spec.canonical()) for spec in specs] == specs
    assert specs[0].bits == 4
    with pytest.raises(SpecError, match="recipe_version"):
        spec_from_canonical({**specs[0].canonical(), "recipe_version": "0"})


def test_what_can_not_be_is_refused() -> None:
    with pytest.raises(SpecError, match="calibration=Calibrated"):
        quantize_model(tiny("opt"), SPEC)
    rotated = MixedSpec(budget=4.5, dtype="int", rotation=1)
    with pytest.raises(SpecError, match="rotate its inputs"):
        quantize_model(tiny("opt"), rotated, packed=True, calibration=CALIBRATION)
    assert "loss of the whole model" in SPEC.why_not_layered
