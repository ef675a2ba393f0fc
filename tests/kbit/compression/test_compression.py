"""The compression report: bits as cells count them, errors as defined, and a model that comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kbit import quantize_model
from kbit.compression.__main__ import main
from kbit.compression.measure import VECTORS, measure
from kbit.models.architectures import block_layers
from kbit.models.quantize import Calibrated
from kbit.spec import spec_of
from tests import ROOT
from tests.kbit.architectures import build
from tests.kbit.methods.test_experts import TOKENS as SENT
from tests.kbit.methods.test_experts import true_inputs
from tests.kbit.tiny_models import NAMES, VOCABULARY, bits_of, identical, tiny

TOKENS = torch.arange(24).view(2, 12) % VOCABULARY
MODEL = ROOT / "sweeps" / "demo" / "models" / "neox-xs"
TEXT = ROOT / "sweeps" / "demo" / "text" / "jargon.jsonl"


@pytest.mark.parametrize("name", NAMES)
def test_bits_are_those_of_cells_and_the_model_comes_back(name: str) -> None:
    model = tiny(name)
    before = bits_of(model)
    for values in ({"bits": 4, "dtype": "int"}, {"method": "llm_int8"}, {"method": "ggml", "recipe": "Q4_0"}):
        spec = spec_of(values)
        with quantize_model(model, spec) as handle:
            bits, total = handle.bits_per_param, handle.total_bits
        found = measure(model, spec, tokens=TOKENS)
        assert (found.bits_per_param, found.total_bits) == (bits, total)
        assert sum(t.bits for t in found.tensors) == total
        assert {t.name for t in found.tensors if t.quantized} == set(handle.layers)
        assert identical(bits_of(model), before)


def test_errors_are_those_of_weights_and_outputs_in_float64() -> None:
    model = tiny("opt")
    given: dict[str, torch.Tensor] = {}
    name = "model.decoder.layers.1.fc2"
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: given.update(x=x[0].detach()))
    model(TOKENS)
    handle.remove()
    weight = model.get_submodule(name).weight.detach().double()
    x = given["x"].reshape(-1, weight.shape[1]).double()
    spec = spec_of({"bits": 3, "dtype": "int"})
    with quantize_model(model, spec):
        change = model.get_submodule(name).weight.detach().double() - weight
    of = next(t for t in measure(model, spec, tokens=TOKENS).tensors if t.name == name)
    assert of.weight_error == pytest.approx(float(change.norm() / weight.norm()), rel=1e-5)
    assert of.output_error == pytest.approx(float((x @ change.T).norm() / (x @ weight.T).norm()), rel=1e-4)
    assert (of.kind, of.block) == ("model.decoder.layers.*.fc2", 1)


def test_outputs_of_an_expert_are_compared_on_the_tokens_that_are_sent_to_it() -> None:
    model, true = build("gpt_oss").float(), true_inputs("gpt_oss")
    weights = {layer.name: layer.weight.double() for layer in block_layers(model)}
    spec = spec_of({"bits": 3, "dtype": "int"})
    with quantize_model(model, spec, storage_dtype=torch.float16):
        changed = {layer.name: layer.working.double() for layer in block_layers(model)}
    found = {t.name: t for t in measure(model, spec, tokens=SENT, storage_dtype=torch.float16).tensors}
    for name, x in true.items():
        before, after = x @ weights[name].T, x @ changed[name].T
        error = found[name].output_error
        assert error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3), name


def test_rounding_that_is_corrected_loses_less_of_outputs_and_more_of_weights() -> None:
    model = tiny("opt")
    windows = torch.randint(VOCABULARY, (32, 16), generator=torch.Generator().manual_seed(0))
    plain = spec_of({"bits": 3, "dtype": "int", "scheme": "group", "blocksize": 32})
    gptq = spec_of({"method": "gptq", "bits": 3, "dtype": "int", "blocksize": 32})
    rounded = measure(model, plain, tokens=windows)
    corrected = measure(model, gptq, tokens=windows, calibration=Calibrated(tokens=windows))
    pairs = list(zip(rounded.tensors, corrected.tensors, strict=True))
    outputs = [(a.output_error or 0, b.output_error or 0) for a, b in pairs if a.quantized]
    weights = [(a.weight_error or 0, b.weight_error or 0) for a, b in pairs if a.quantized]
    assert sum(b for _, b in outputs) < sum(a for a, _ in outputs)
    assert sum(b for _, b in weights) > sum(a for a, _ in weights)


def test_the_command_writes_every_number_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    specs = ["{bits: 4, dtype: float}", "{method: gptq, bits: 3, dtype: int, blocksize: 32}", "{bits: 16}"]
    options = ["--text", str(TEXT), "--calibration", str(TEXT), "--length", "64", "--device", "cpu"]
    assert main([str(MODEL), "--spec", *specs, *options, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "float4 e3 b64: 4.2500 bits a quantized weight" in said
    assert VECTORS in said
    written = {path.name for path in tmp_path.iterdir()}
    assert {"compression.json", "compression.png", "compression.svg", "compression-1.csv"} <= written
    numbers = json.loads((tmp_path / "compression.json").read_text())["compression-2"]
    assert {r["block"] for r in numbers if r["quantized"]} == {0, 1, 2}
    assert all(0 < r["output_error"] < 1 for r in numbers if r["quantized"])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("{bits: 9, dtype: int}", "bits=9 is not valid"),
        ("4", "axes as a study writes them"),
        ("{bits: [4", "axes as a study writes them"),
        ("{method: gptq, bits: 3, dtype: int, blocksize: 32}", "--calibration"),
    ],
)
def test_bad_specs_are_one_line(spec: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(MODEL), "--spec", spec, "--device", "cpu"]) == 2
    found = capsys.readouterr().err
    assert said in found
    assert found.count("\n") == 1
