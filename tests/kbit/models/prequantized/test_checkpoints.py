"""A checkpoint that others quantized is a cell: its weights, its bits as stored, and what is refused of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kbit import QuantSpec, SpecError, quantize_model
from kbit.errors import NotStreamableError
from kbit.models.loading import load_model
from kbit.models.originals import Originals
from kbit.models.prequantized.words import pack_words
from kbit.models.streaming.streamed import open_streamed
from kbit.specs.checkpoint import CheckpointSpec
from sweeps import load_results
from sweeps.config import DEMO_DIR
from sweeps.study import hub
from tests.kbit import architectures
from tests.sweeps.commands.conftest import Ask, ask

__all__ = ["ask"]

MODEL = DEMO_DIR / "models" / "neox-xs"
Write = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A weight [out, in] in 4 bits and groups of 32 as tensors of GPTQ, and its values."""
    groups = weight.float().unflatten(1, (-1, 32))
    scale = (groups.abs().amax(-1) / 7).half()
    codes = (groups / scale.float()[..., None]).round().clamp(-8, 7) + 8
    values = ((codes - 8) * scale.float()[..., None]).flatten(1)
    zeros = torch.full((scale.shape[1], weight.shape[0]), 7, dtype=torch.uint8)  # 8 - 1
    tensors = {"qweight": pack_words(codes.flatten(1).to(torch.uint8), 4).t(), "qzeros": pack_words(zeros, 4)}
    return {**tensors, "scales": scale.t()}, values.half()


def int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A weight [out, in] with a scale per row as tensors of compressed-tensors, and its values."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).half()
    codes = (weight.float() / scale.float()).round().clamp(-128, 127)
    return {"weight": codes.to(torch.int8), "weight_scale": scale}, (codes * scale.float()).half()


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}},
}


def as_others(
    source: Path,
    target: Path,
    config: dict[str, Any],
    write: Write,
    chosen: Callable[[str], bool],
    *,
    turn: bool = False,
) -> tuple[dict[str, Tensor], int]:
    """Write a checkpoint with some weights quantized. Returns the 16-bit tensors that it stands for, and the bytes."""
    shutil.copytree(source, target)
    tensors, dense, nbytes = {}, {}, 0
    for name, tensor in load_file(source / "model.safetensors").items():
        dense[name] = tensor.half()
        if not chosen(name):
            tensors[name] = tensor
            continue
        parts, values = write(tensor.t() if turn else tensor)
        dense[name] = values.t() if turn else values
        tensors |= {f"{name.removesuffix('.weight')}.{role}": part.contiguous() for role, part in parts.items()}
        nbytes += sum(part.nbytes for part in parts.values())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    known = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(known | {"quantization_config": config}))
    return dense, nbytes


def in_blocks(name: str) -> bool:
    return ".layers." in name and name.endswith(("query_key_value.weight", "dense.weight", "h.weight"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """neox-xs with GPTQ's tensors in its blocks and for its head."""
    directory = tmp_path_factory.mktemp("gptq") / "neox-xs-gptq"
    dense, nbytes = as_others(MODEL, directory, GPTQ, gptq, lambda name: in_blocks(name) or name == "embed_out.weight")
    save_file(dense, directory.parent / "dense.safetensors")
    (directory.parent / "bytes").write_text(str(nbytes))
    return directory


def test_weights_and_bits_are_those_of_the_files(quantized: Path) -> None:
    loaded = load_model(str(quantized), device="cpu", compute_dtype="float32")
    dense = load_file(quantized.parent / "dense.safetensors")
    own = loaded.model.state_dict()
    own["embed_out.weight"] = own.pop("lm_head.weight")  # transformers' own name for it
    assert loaded.storage_dtype == torch.float16
    assert all(torch.equal(own[name], values.float()) for name, values in dense.items())
    nbytes = int((quantized.parent / "bytes").read_text())
    inside = sum(t.numel() for name, t in dense.items() if in_blocks(name))
    head = dense["embed_out.weight"].numel()
    with quantize_model(loaded.model, CheckpointSpec(bits=4), storage_dtype=loaded.storage_dtype) as handle:
        assert handle.total_bits == 8 * nbytes + 16 * (sum(t.numel() for t in dense.values()) - inside - head)
        assert handle.bits_per_param == 8 * nbytes / (inside + head)
        assert len(handle.layers) == 13
    assert hub.local_model(quantized).params == hub.local_model(MODEL).params == sum(t.numel() for t in dense.values())


def test_a_cell_has_the_files_weights_after_one_that_quantized_them(quantized: Path) -> None:
    loaded = load_model(str(quantized), device="cpu", compute_dtype="float32")
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    originals = Originals(model=loaded.model)
    for spec in (QuantSpec(bits=3, dtype="int"), CheckpointSpec(bits=4), QuantSpec(bits=16)):
        quantize_model(loaded.model, spec, storage_dtype=loaded.storage_dtype, originals=originals)
        same = all(torch.equal(value, before[key]) for key, value in loaded.model.state_dict().items())
        assert same is (spec.bits != 3)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_weights_that_are_stored_turned_and_experts(name: str, tmp_path: Path) -> None:
    architectures.write(name, tmp_path / "dense")

    def chosen(tensor: str) -> bool:
        ends = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "_proj.weight", "w1.weight", "w2.weight", "w3.weight")
        return tensor.endswith(ends)

    dense, nbytes = as_others(tmp_path / "dense", tmp_path / "m", INT8, int8, chosen, turn=name == "gpt2")
    shutil.copytree(tmp_path / "dense", tmp_path / "reference")
    save_file(dense, tmp_path / "reference" / "model.safetensors", metadata={"format": "pt"})
    loaded, reference = (
        load_model(str(tmp_path / d), device="cpu", compute_dtype="storage") for d in ("m", "reference")
    )
    expected = dict(reference.model.named_parameters())
    assert all(torch.equal(p, expected[key]) for key, p in loaded.model.named_parameters())
    with quantize_model(loaded.model, CheckpointSpec(bits=8)) as handle:
        quantize = sum(dense[key].numel() for key in dense if chosen(key))
        assert handle.total_bits == 8 * nbytes + 16 * (sum(p.numel() for p in expected.values()) - quantize)
        assert sum(rows * columns for rows, columns in handle.layers.values()) == quantize


def test_biases_of_zeros_that_tools_add_are_left_out_and_no_others(tmp_path: Path) -> None:
    architectures.write("llama", tmp_path / "dense")

    def biased(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, values = int8(weight)
        return tensors | {"bias": torch.zeros(len(weight)).half()}, values

    as_others(tmp_path / "dense", tmp_path / "m", INT8, biased, lambda name: name.endswith("_proj.weight"))
    load_model(str(tmp_path / "m"), device="cpu", compute_dtype="storage")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.bias"][3] = 1e-3
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(SpecError, match=r"LlamaForCausalLM has none for model\.layers\.1\.mlp\.up_proj\.bias\. "):
        load_model(str(tmp_path / "m"), device="cpu", compute_dtype="storage")


def test_a_study_measures_it_as_a_cell(quantized: Path, tmp_path: Path, ask: Ask) -> None:
    study = ["eval.tokens=1024", "eval.tasks=[]", "executor.device=cpu", "executor.workers=1", "out=r", "sweep.name=s"]
    checkpoint = "{method: checkpoint, bits: 4}"
    other = ask(*study, f"path={MODEL}", f"sweep.quant=[{checkpoint}]", "mode=plan")
    assert "no 'quantization_config', which checkpoints have that others quantized (gptq, awq, " in other.error
    for blocks, said in (
        ("{bits: 4, dtype: int}", "method='blockwise' is not valid: checkpoint for this model, whose weights are quan"),
        ("{method: checkpoint, bits: 8}", "bits=8 is not valid: 4 for this model, by its quantization_config"),
    ):
        refused = ask(*study, f"path={quantized}", f"sweep.quant=[{blocks}]", "mode=plan")
        assert refused.code == 2, refused.out
        assert said in " ".join(refused.error.split())
    done = ask(*study, f"path=[{MODEL},{quantized}]", f"sweep.quant=[{{bits: 16}},{checkpoint}]", "report=false")
    assert done.code == 0, done
    rows = load_results(tmp_path / "r").set_index(["model", "label"])
    stored, values, original = (
        rows.loc[key]
        for key in (("neox-xs-gptq", "as stored, 4-bit"), ("neox-xs-gptq", "16-bit"), ("neox-xs", "16-bit"))
    )
    assert stored["jargon_loss"] == values["jargon_loss"] > original["jargon_loss"]
    assert stored["bits_per_param"] == 4.625  # codes, scale and zero point of 32, as the layout has them
    assert stored["params"] == original["params"]
    assert len(rows) == 3


def test_what_can_not_be_read_is_refused(quantized: Path, tmp_path: Path) -> None:
    shutil.copytree(quantized, tmp_path / "m")
    config = json.loads((quantized / "config.json").read_text())
    tensors = load_file(quantized / "model.safetensors")
    with pytest.raises(NotStreamableError, match="holds weights that others quantized"):
        open_streamed(str(tmp_path / "m"), compute_dtype="storage")
    first = "gpt_neox.layers.0.attention.dense"
    save_file(tensors | {f"{first}.scales": tensors[f"{first}.scales"] * torch.inf}, tmp_path / "m/model.safetensors")
    with pytest.raises(SpecError, match=rf"finite weights; values of {first}\.weight are not"):
        load_model(str(tmp_path / "m"), device="cpu", compute_dtype="storage")
    del tensors[f"{first}.qzeros"]
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(SpecError, match=rf"the tensors of {first} do not fit together: qweight I32"):
        load_model(str(tmp_path / "m"), device="cpu", compute_dtype="storage")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(SpecError, match=r"are read from safetensors alone, and pytorch_model\.bin is none"):
        load_model(str(tmp_path / "m"), device="cpu", compute_dtype="storage")
    config["quantization_config"]["bits"] = 5
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(hub.HubError, match=r"quantization_config\.bits=5 is not read here: 2, 3, 4, 8 are"):
        hub.local_model(tmp_path / "m")
