"""Block-wise cells that calibrate: codebooks weighted by inputs, and kept dimensions of the largest inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kbit import QuantSpec, dequantize, quantize, quantize_model
from kbit.errors import SpecError
from kbit.methods.blockwise import largest_inputs
from kbit.models.architectures import block_layers
from kbit.models.originals import Originals
from kbit.models.outliers import outlier_columns
from kbit.models.quantize import Calibrated
from kbit.quantizer.weighted_lloyd import weighted_codebook
from kbit.spec import spec_from_canonical
from tests.kbit.methods.test_awq import lively
from tests.kbit.methods.test_protocol import inputs_of, tokens
from tests.kbit.tiny_models import NAMES, bits_of, identical, tiny

LEARNED = QuantSpec(bits=3, dtype="lloyd", blocksize=16, weighting="activation")
OUTLIERS = QuantSpec(bits=3, dtype="int", blocksize=16, outlier_fraction=0.1, outlier_criterion="activation")
CALIBRATION = Calibrated(tokens=tokens())


def held(model: nn.Module) -> dict[str, torch.Tensor]:
    return {layer.name: layer.weight.clone() for layer in block_layers(model)}


@pytest.mark.parametrize("name", ["opt", "llama-gqa", "gpt2"])
def test_layers_are_fitted_by_the_squares_of_the_16_bit_models_inputs(name: str) -> None:
    model = lively(name)
    x, before = inputs_of(model, block_layers(model), tokens()), held(model)
    with quantize_model(model, LEARNED, calibration=CALIBRATION) as handle:
        for layer, weight in held(model).items():
            squares = x[layer].double().square().mean(0)
            book = weighted_codebook(before[layer], LEARNED, squares)
            expected = dequantize(quantize(before[layer], LEARNED, fitted=book))
            assert ((weight - expected).abs() <= 1e-3 * expected.abs().max()).float().mean() > 0.99
        assert handle.codes_hash is not None
        bits = handle.bits_per_param
    with quantize_model(model, QuantSpec(bits=3, dtype="lloyd", blocksize=16)) as plain:
        assert plain.bits_per_param == pytest.approx(bits, abs=0.05)  # a codebook may have fewer distinct values
        assert plain.codes_hash is None


@pytest.mark.parametrize("name", ["neox", "opt", "llama-gqa", "gpt2"])
def test_kept_are_as_many_dimensions_as_by_proxy_those_of_the_largest_inputs(name: str) -> None:
    model = lively(name)
    x, before = inputs_of(model, block_layers(model), tokens()), held(model)
    proxy = outlier_columns(model, 0.1)
    with quantize_model(model, OUTLIERS, calibration=CALIBRATION) as handle:
        for layer, weight in held(model).items():
            columns, own = None, proxy[layer]
            if own is not None:
                columns = x[layer].double().abs().mean(0).sort(descending=True, stable=True).indices[: len(own)]
                assert torch.equal(weight[:, columns], before[layer].half().float()[:, columns])
            assert torch.equal(weight, dequantize(quantize(before[layer], OUTLIERS, outlier_columns=columns)))
        bits = handle.bits_per_param
    assert sum(own is None for own in proxy.values()) > 0
    by_std = QuantSpec(bits=3, dtype="int", blocksize=16, outlier_fraction=0.1)
    with quantize_model(model, by_std) as handle:
        assert handle.bits_per_param == bits


def test_ties_go_to_the_lower_dimension() -> None:
    assert largest_inputs(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]


@pytest.mark.parametrize("spec", [LEARNED, OUTLIERS], ids=lambda s: s.label)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_comes_back_bit_for_bit_and_is_packed_as_it_is_dense(name: str, spec: QuantSpec) -> None:
    model = tiny(name, torch.float16)
    before = bits_of(model)
    with quantize_model(model, spec, calibration=CALIBRATION) as handle:
        dense, bits = held(model), handle.bits_per_param
    assert identical(bits_of(model), before)
    with quantize_model(model, spec, calibration=CALIBRATION, packed=True) as handle:
        assert handle.bits_per_param == bits
        for layer, weight in dense.items():
            assert torch.equal(model.get_submodule(layer).dequantize(), weight)
    assert identical(bits_of(model), before)


def test_what_one_cell_fitted_is_no_other_cells() -> None:
    model = lively("opt")
    originals = Originals(model=model)
    found = []
    for calibration in (CALIBRATION, Calibrated(tokens=tokens()[:1] * 0 + 5), CALIBRATION):
        quantize_model(model, LEARNED, calibration=calibration, originals=originals)
        found.append(held(model))
    name = next(iter(found[0]))
    assert not torch.equal(found[0][name], found[1][name])
    assert all(torch.equal(found[0][key], found[2][key]) for key in found[0])
    assert not originals.fitted
    originals.restore()


def test_whether_a_spec_calibrates_is_its_own() -> None:
    assert [s.calibrates for s in (LEARNED, OUTLIERS, QuantSpec(bits=3, dtype="lloyd"), QuantSpec(bits=16))] == [
        *(True, True, False, False)
    ]
    assert LEARNED.calibrating == ("weighting", "activation")
    assert OUTLIERS.calibrating == ("outlier_criterion", "activation")
    for spec in (LEARNED, OUTLIERS):
        assert spec_from_canonical(spec.canonical()) == spec
        assert spec_from_canonical(spec.canonical()).calibrates
        with pytest.raises(SpecError, match=r"activation' is not valid: one that does not calibrate, or give calib"):
            quantize_model(tiny("opt"), spec)
    # What does not matter is normalised away, and calibrates nothing.
    assert QuantSpec(bits=3, dtype="int", weighting="activation") == QuantSpec(bits=3, dtype="int")
    assert QuantSpec(bits=3, dtype="int", outlier_criterion="activation") == QuantSpec(bits=3, dtype="int")


@pytest.mark.parametrize(
    ("values", "key", "said"),
    [
        ({"weighting": "fisher"}, "weighting", "one of activation, or null"),
        ({"weighting": "activation", "rotation": 1}, "weighting", "null with a rotation"),
        ({"outlier_criterion": "max"}, "outlier_criterion", "one of std, activation"),
    ],
)
def test_bad_values_are_named(values: dict[str, object], key: str, said: str) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        QuantSpec(bits=4, dtype="lloyd", **values)  # type: ignore[arg-type]
    assert caught.value.key == key
