"""format=compressed-tensors: the values of a cell come back, and what the layout can't hold is refused by name.

That transformers loads such a directory, with the same logits, was seen with the package compressed-tensors 0.20.1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kbit import QuantSpec, SpecError, quantize_model
from kbit.exporting.base import EXPORTS, Export
from kbit.exporting.compressed_tensors import settings_of
from kbit.models.architectures import block_layers
from kbit.models.loadable import LoadedModel
from kbit.models.loading import load_model
from kbit.models.quantize import Calibrated, QuantHandle
from kbit.spec import Spec, spec_of
from kbit.specs.checkpoint import CheckpointSpec
from kbit.specs.gptq import GptqSpec
from sweeps.config import DEMO_DIR
from tests.kbit import architectures

MODEL = DEMO_DIR / "models" / "neox-xs"
EXPORTER = EXPORTS["compressed-tensors"]
GROUPS = {"bits": 4, "dtype": "int", "scheme": "group"}


def load(directory: Path) -> LoadedModel:
    return load_model(str(directory), device="cpu", compute_dtype="float32")


def written(loaded: LoadedModel, spec: Any, to: Path) -> Callable[[], Any]:
    def quantize(packed: bool) -> QuantHandle:
        raise AssertionError("its layers' codes are asked for, and no quantized model")

    EXPORTER.check(spec, {"model_type": "gpt_neox"}, to)
    asked = Export(loaded=loaded, spec=spec, to=to, quantize=quantize, calibration=lambda: calibration(spec))
    return EXPORTER.write(asked).load


def calibration(spec: Spec) -> Calibrated | None:
    tokens = torch.randint(0, 500, (4, 32), generator=torch.Generator().manual_seed(0))
    return Calibrated(tokens=tokens) if spec.calibrates else None


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(MODEL)


CELLS: dict[str, dict[str, Any]] = {
    "groups": {"blocksize": 32},
    "clipped": {"blocksize": 96, "bits": 5, "clip": True},
    "rows with zero points": {"blocksize": "row", "bits": 3, "zero_point": True},
    "groups with zero points": {"blocksize": 32, "zero_point": True},
    "8 bits by row": {"blocksize": "row", "bits": 8},
    "gptq": {"method": "gptq", "blocksize": 32, "bits": 3},
    "gptq in its order": {
        **{"method": "gptq", "blocksize": 32, "act_order": True, "static_groups": True},
        "zero_point": True,
    },
    "gptq by row": {"method": "gptq", "blocksize": "row", "act_order": True},
}


@pytest.mark.parametrize("case", CELLS)
def test_a_cell_comes_back(case: str, loaded: LoadedModel, tmp_path: Path) -> None:
    spec = spec_of(GROUPS | CELLS[case])
    assert isinstance(spec, QuantSpec)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    again = written(loaded, spec, tmp_path / "m")()
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    with quantize_model(
        loaded.model, spec, storage_dtype=loaded.storage_dtype, calibration=calibration(spec)
    ) as handle:
        own = {layer.name: layer.working.clone() for layer in block_layers(loaded.model)}
        for layer in block_layers(again):
            if spec.zero_point:
                assert torch.equal(layer.working, own[layer.name])
            else:  # scales are absmax / (2^(k-1) - 1) in float16: a rounding more than the cell has
                torch.testing.assert_close(layer.working, own[layer.name], rtol=1.5 * 2**-10, atol=2**-24)
    others = [name for name, _ in loaded.model.named_parameters() if name.removesuffix(".weight") not in own]
    assert all(torch.equal(again.get_parameter(name), before[name]) for name in others)
    read = load(tmp_path / "m")
    assert read.tokenizer("Some words.")["input_ids"] == loaded.tokenizer("Some words.")["input_ids"]
    with quantize_model(read.model, CheckpointSpec(bits=spec.bits), storage_dtype=read.storage_dtype) as counted:
        shapes = 128 * len(handle.layers)  # weight_shape, two int64
        assert counted.total_bits == handle.total_bits + shapes


def test_config_says_what_was_done(loaded: LoadedModel, tmp_path: Path) -> None:
    written(loaded, spec_of(GROUPS | {"blocksize": 32, "zero_point": True}), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    own = config["quantization_config"]
    assert (config["dtype"], own["format"], own["quantization_status"]) == ("float16", "pack-quantized", "compressed")
    assert own["ignore"] == ["lm_head"]
    weights = own["config_groups"]["group_0"]["weights"]
    assert "actorder" not in weights
    act_order = GptqSpec(bits=4, dtype="int", blocksize=32, act_order=True, static_groups=True)
    assert settings_of(act_order, [])["config_groups"]["group_0"]["weights"]["actorder"] == "weight"
    assert {key: weights[key] for key in ("num_bits", "type", "symmetric", "strategy", "group_size")} == {
        **{"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    }
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    of_layer = {
        n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith("gpt_neox.layers.0.mlp.dense_4h_to_h.")
    }
    assert {name: (t.dtype, list(t.shape)) for name, t in of_layer.items() if name != "bias"} == {
        "weight_packed": (torch.int32, [96, 48]),
        "weight_scale": (torch.float16, [96, 12]),
        "weight_zero_point": (torch.int32, [12, 12]),
        "weight_shape": (torch.int64, [2]),
    }


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "floats": ({"dtype": "float"}, "for 'float4 e3 row': the format has integers, and no codes of float"),
    "blocks": ({"scheme": "block", "blocksize": 64}, "its blocks are groups of a row"),
    "outliers": ({"outlier_fraction": 0.02}, r"it has no place for outlier_fraction=0\.02"),
    "centering": ({"center": True}, "it has no place for center=True"),
    "nested": ({"absmax_dtype": "nested"}, "it has no place for absmax_dtype='nested'"),
    "rotated": ({"rotation": 1}, "it has no place for rotation=1"),
    "hqq": ({"method": "hqq"}, "this one holds a cell of method=blockwise or gptq with dtype=int and scheme=group"),
    "awq": ({"method": "awq", "dtype": "int"}, "this one holds a cell of method=blockwise or gptq with dtype=int"),
    "gptq of floats": ({"method": "gptq", "dtype": "normal"}, "the format has integers, and no codes of normal"),
    "gptq, permuted": (
        {"method": "gptq", "dtype": "int", "blocksize": 32, "act_order": True},
        "has removed groups of permuted columns: static_groups=true leaves them in place",
    ),
    "gptq, rotated": ({"method": "gptq", "dtype": "int", "rotation": 1}, "it has no place for rotation=1"),
    "the baseline": ({"bits": 16}, "for '16-bit': this one holds a cell of method=blockwise"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_layout_can_not_hold_is_refused_by_name(case: str, tmp_path: Path) -> None:
    values, says = REFUSED[case]
    if "method" in values:
        spec = spec_of({"bits": 4, **values})
    else:
        spec = spec_of({**GROUPS, "blocksize": "row", **values} if "bits" not in values else values)
    with pytest.raises(SpecError, match=rf"format='compressed-tensors' is not valid: gguf or packed .*{says}"):
        EXPORTER.check(spec, {}, tmp_path / "m")


def test_models_that_the_layout_can_not_hold_are_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    spec = spec_of(GROUPS | {"blocksize": 64})
    with pytest.raises(SpecError, match=r"rows of 96 values in gpt_neox\S+ do not hold groups of 64"):
        written(loaded, spec, tmp_path / "m")
    turned = load(architectures.write("gpt2", tmp_path / "gpt2"))
    with pytest.raises(
        SpecError, match=r"gguf for this model: transformer\.h\.0\.\S+ is a Conv1D, and no linear layer"
    ):
        written(turned, spec, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    with pytest.raises(SpecError, match="gguf for a mixture of experts"):
        EXPORTER.check(spec, {"model_type": "mixtral", "num_local_experts": 4}, tmp_path / "m")
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="a directory for format=compressed-tensors, and this is a file"):
        EXPORTER.check(spec, {}, tmp_path / "file")
