"""Checkpoints become the 16-bit baseline, whatever their dtype; what can't be loaded safely says so."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kbit import QuantSpec, quantize_model
from kbit.errors import SpecError
from kbit.memory import is_out_of_memory
from kbit.models.architectures import decoder_blocks
from kbit.models.loading import load_model
from kbit.models.placement import device_map
from tests.kbit.tiny_models import NAMES, tiny


def write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(directory)


@pytest.fixture
def checkpoint(tmp_path):
    """Write a tiny model's directory in a dtype: checkpoint(name, dtype)."""

    def write(name: str, dtype: torch.dtype) -> Path:
        directory = tmp_path / name
        tiny(name, dtype).save_pretrained(directory)
        write_tokenizer(directory)
        return directory

    return write


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


@pytest.mark.parametrize("name", ["neox", "opt-350m", "gpt2", "bloom", "llama-tied"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_the_16_bit_ones_in_the_compute_dtype(checkpoint, name, dtype):
    directory = checkpoint(name, dtype)
    loaded = load_model(str(directory), device="cpu", compute_dtype="float32")
    storage = torch.float16 if dtype == torch.float32 else dtype
    assert loaded.storage_dtype == storage
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    expected = tiny(name, dtype).to(storage).float().state_dict()
    for key, value in loaded.model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[key]), key
    assert loaded.tokenizer("a b a")["input_ids"] == [0, 1, 0]


def test_what_is_no_weight_keeps_float32_precision(checkpoint):
    """Rotary frequencies rounded to 16 bits on the way would change every activation."""
    directory = checkpoint("neox", torch.float16)
    loaded = load_model(str(directory), device="cpu", compute_dtype="float32")
    direct = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert torch.equal(logits(loaded.model), logits(direct))


FAMILIES = ["neox", "opt", "opt-350m", "gpt2", "bloom", "llama-gqa", "llama-tied"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compute", ["storage", "float32"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_loaded_model_is_what_transformers_loads_with_its_parameters_cast_up(checkpoint, name, compute, dtype):
    directory = checkpoint(name, dtype)
    loaded = load_model(str(directory), device="cpu", compute_dtype=compute).model
    direct = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    buffers = {key: buffer.dtype for key, buffer in loaded.named_buffers()}
    assert buffers == {key: buffer.dtype for key, buffer in direct.named_buffers()}
    assert (name in ("neox", "llama-gqa", "llama-tied")) == (torch.float32 in buffers.values())
    if compute == "float32":
        for parameter in direct.parameters():
            parameter.data = parameter.data.float()
    assert {p.dtype for p in loaded.parameters()} == {torch.float32 if compute == "float32" else dtype}
    assert torch.equal(logits(loaded), logits(direct))


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_tied_parameters_stay_tied(checkpoint, name):
    loaded = load_model(str(checkpoint(name, torch.float16)), device="cpu", compute_dtype="float32").model
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_masks_and_indices_in_the_files_do_not_count_for_the_dtype(checkpoint):
    directory = checkpoint("gpt2", torch.bfloat16)
    file = directory / "model.safetensors"
    masks = {"transformer.h.0.attn.bias": torch.ones(2**18, dtype=torch.bool), "ids": torch.arange(2**16)}
    save_file(load_file(file) | masks, file, metadata={"format": "pt"})
    assert load_model(str(directory), device="cpu", compute_dtype="storage").storage_dtype == torch.bfloat16


def test_a_loaded_model_quantizes_as_the_16_bit_one(checkpoint):
    directory = checkpoint("llama-gqa", torch.bfloat16)
    wide = load_model(str(directory), device="cpu", compute_dtype="float32")
    narrow = load_model(str(directory), device="cpu", compute_dtype="bfloat16")
    spec = QuantSpec(bits=4, dtype="quantile")
    with quantize_model(wide.model, spec, storage_dtype=wide.storage_dtype), quantize_model(narrow.model, spec):
        narrow_weights = narrow.model.state_dict()
        assert all(torch.equal(v, narrow_weights[k].float()) for k, v in wide.model.state_dict().items())


def test_the_files_dtype_counts_and_not_the_configurations(checkpoint):
    directory = checkpoint("opt", torch.bfloat16)
    config = json.loads((directory / "config.json").read_text())
    for claimed in ("float32", "float16", None):
        config.pop("torch_dtype", None)
        config["dtype"] = claimed
        (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        assert load_model(str(directory), device="cpu", compute_dtype="bfloat16").storage_dtype == torch.bfloat16


def test_a_compute_dtype_that_cannot_hold_the_weights_is_refused(checkpoint):
    directory = checkpoint("opt", torch.bfloat16)
    with pytest.raises(SpecError, match=r"compute_dtype='float16'.*bfloat16.*or float32"):
        load_model(str(directory), device="cpu", compute_dtype="float16")
    with pytest.raises(SpecError, match="compute_dtype='int8'"):
        load_model(str(directory), device="cpu", compute_dtype="int8")


def test_torch_files_of_tensors_are_read(checkpoint):
    directory = checkpoint("gpt2", torch.float16)
    file = directory / "model.safetensors"
    expected = load_model(str(directory), device="cpu", compute_dtype="float16").model.state_dict()
    torch.save(load_file(file), directory / "pytorch_model.bin")
    file.unlink()
    loaded = load_model(str(directory), device="cpu", compute_dtype="float16")
    assert loaded.storage_dtype == torch.float16
    assert all(torch.equal(v, expected[k]) for k, v in loaded.model.state_dict().items())


class Hostile:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("format_", ["zip", "plain"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(checkpoint, tmp_path, format_):
    directory = checkpoint("gpt2", torch.float16)
    (directory / "model.safetensors").unlink()
    trace = tmp_path / "it ran"
    if format_ == "zip":
        torch.save({"wte.weight": Hostile(str(trace))}, directory / "pytorch_model.bin")
    else:
        (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"wte.weight": Hostile(str(trace))}))
    with pytest.raises(SpecError, match=r"pytorch_model\.bin.*refused"):
        load_model(str(directory), device="cpu", compute_dtype="float16")
    assert not trace.exists()


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "~/nowhere/at/all", "a/b/c"])
def test_a_missing_directory_is_named(path):
    with pytest.raises(SpecError) as caught:
        load_model(path, device="cpu", compute_dtype="float16")
    assert str(caught.value).startswith(f"path={path!r}")
    assert "existing directory" in str(caught.value)


def test_an_incomplete_directory_says_what_is_missing(checkpoint, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SpecError, match=r"no config\.json"):
        load_model(str(empty), device="cpu", compute_dtype="float16")
    directory = checkpoint("opt", torch.float16)
    file = directory / "model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if "layers.1.fc1" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(SpecError, match=r"missing or of another shape: .*layers\.1\.fc1"):
        load_model(str(directory), device="cpu", compute_dtype="float16")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"ffn_dim": 8}))
    with pytest.raises(SpecError, match="path="):
        load_model(str(directory), device="cpu", compute_dtype="float16")
    (directory / "config.json").write_text(json.dumps(config))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SpecError, match="path="):
        load_model(str(directory), device="cpu", compute_dtype="float16")
    file.unlink()
    with pytest.raises(SpecError, match=r"needs weights in model\.safetensors or pytorch_model\.bin.*found none"):
        load_model(str(directory), device="cpu", compute_dtype="float16")


def test_code_in_a_repository_is_not_run_unless_asked_for(checkpoint, tmp_path):
    directory = checkpoint("opt", torch.float16)
    trace = tmp_path / "it ran"
    code = f"import pathlib; pathlib.Path({str(trace)!r}).touch()\nclass C: pass\n"
    (directory / "modeling_own.py").write_text(code)
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.C"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecError, match="trust_remote_code"):
        load_model(str(directory), device="cpu", compute_dtype="float16")
    assert not trace.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_named(checkpoint):
    directory = checkpoint("opt", torch.float16)
    with pytest.raises(SpecError, match="device='cuda'"):
        load_model(str(directory), device="cuda", compute_dtype="float16")


def homes(model: torch.nn.Module, placed: dict[str, int]) -> dict[str, int]:
    """The GPU of each parameter by name."""
    return {
        name: next(gpu for module, gpu in placed.items() if name.startswith(f"{module}."))
        for name, _ in model.named_parameters(remove_duplicate=False)
    }


@pytest.mark.parametrize("gpus", [2, 3, 8])
@pytest.mark.parametrize("name", NAMES)
def test_spreading_puts_every_parameter_in_one_place_and_tied_ones_together(name, gpus):
    model = tiny(name, torch.float16)
    placed = device_map(model, gpus)
    for module in placed:
        assert not any(other.startswith(f"{module}.") for other in placed)
    where = homes(model, placed)
    assert set(where.values()) <= set(range(gpus))
    by_tensor: dict[int, set[int]] = {}
    for parameter, gpu in where.items():
        by_tensor.setdefault(model.get_parameter(parameter).data_ptr(), set()).add(gpu)
    assert all(len(gpus_of) == 1 for gpus_of in by_tensor.values())


@pytest.mark.parametrize("gpus", [1, 2, 3, 4])
def test_spreading_cuts_a_deep_model_into_runs_of_equal_size(gpus):
    from transformers import GPTNeoXConfig

    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=128, num_hidden_layers=24, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    placed = device_map(model, gpus)
    name, blocks = decoder_blocks(model)
    order = [placed[f"{name}.{number}"] for number in range(len(blocks))]
    assert order == sorted(order)
    names = {module: name for name, module in model.named_modules()}
    assert placed[names[model.get_input_embeddings()]] == 0
    assert placed[names[model.get_output_embeddings()]] == gpus - 1
    sizes = [0] * gpus
    for parameter, gpu in homes(model, placed).items():
        sizes[gpu] += model.get_parameter(parameter).nbytes
    block = sum(p.nbytes for p in blocks[0].parameters())
    assert max(sizes) - min(sizes) <= 2 * block


def test_more_gpus_than_there_are_is_named(checkpoint):
    directory = checkpoint("opt", torch.float16)
    with pytest.raises(SpecError, match="gpus=2"):
        load_model(str(directory), device="cpu", compute_dtype="float16", gpus=2)


def test_running_out_of_memory_is_told_from_other_failures():
    with pytest.raises(RuntimeError) as cpu:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(cpu.value)
    wrapped = ValueError("a model that can be loaded")
    wrapped.__cause__ = cpu.value
    assert is_out_of_memory(wrapped)
    for error in (MemoryError(), OSError(12, "Cannot allocate memory"), torch.OutOfMemoryError("CUDA out of memory")):
        assert is_out_of_memory(error)
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    for error in (other.value, OSError(28, "No space left on device"), RuntimeError("CUDA error: illegal memory")):
        assert not is_out_of_memory(error)


HUB = """
import sys
from kbit.models.loading import load_model
from kbit import SpecError
model = load_model("someone/tiny", revision=sys.argv[1], device="cpu", compute_dtype="float16").model
print(model.config.model_type)
for name, revision in (("someone/tiny", "0" * 40), ("someone/else", None), ("no such id!", None)):
    try:
        load_model(name, revision=revision, device="cpu", compute_dtype="float16")
    except SpecError as error:
        print(error.key, error.value)
"""


def test_a_hub_id_is_read_from_the_local_cache_at_its_commit(checkpoint, tmp_path):
    directory = checkpoint("opt", torch.float16)
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / commit
    shutil.copytree(directory, cached)
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", HUB, commit]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["opt", "model someone/tiny", "model someone/else", "model no such id!"]


@pytest.mark.assets
@pytest.mark.parametrize("name", ["neox-xs", "opt-xs", "gpt2-s", "bloom-xs"])
def test_real_checkpoints_load(assets, name):
    loaded = load_model(str(assets / "models" / name), device="cpu", compute_dtype="float32")
    assert loaded.storage_dtype == torch.float16
    assert len(loaded.tokenizer) == 2048
    text = "It was the best of times, it was the worst of times"
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    loss = loaded.model(ids, labels=ids).loss
    assert 1 < float(loss) < 6
