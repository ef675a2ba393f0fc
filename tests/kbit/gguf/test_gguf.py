"""GGUF files: read back as they were written, as the package gguf reads them, and as llama.cpp does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kbit import QuantSpec, SpecError, quantize_model
from kbit.errors import CheckpointError
from kbit.ggml.formats import FORMATS
from kbit.ggml.recipes import RECIPES
from kbit.gguf.export import read_gguf, rows_of, write_gguf
from kbit.gguf.file import Entry, read_file, write_file
from kbit.gguf.vocabulary import vocabulary_of
from kbit.models.loadable import LoadedModel
from kbit.models.loading import load_model
from kbit.spec import Spec
from kbit.specs.ggml import GgmlSpec
from sweeps.config import DEMO_DIR
from tests.kbit.ggml import llama
from tests.kbit.ggml.llama import needs_llama
from tests.kbit.tiny_models import tiny

Load = Callable[[str], Any]
LOSS = """
import sys, numpy as np
from llama_cpp import Llama
windows = np.load(sys.argv[1])
for path in sys.argv[2:]:
    model = Llama(path, n_ctx=windows.shape[1], logits_all=True, verbose=False, n_threads=1)
    nats = []
    for window in windows:
        model.reset()
        model.eval(window.tolist())
        logits = np.array(model.scores[: len(window)], dtype=np.float64)
        log_sum = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
        nats.append((log_sum - logits[np.arange(len(window)), np.append(window[1:], 0)])[:-1])
    print(np.mean(nats))
"""
QUANTIZE = """
import sys, llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.nthread = 1
for source, target, number in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    options.ftype = int(number)
    assert llama_cpp.llama_model_quantize(source.encode(), target.encode(), options) == 0
"""


@pytest.fixture(scope="module")
def loaded() -> Load:
    """Load a model: of the demo, one of the assets, or a small random Llama with the demo's tokenizer."""
    known: dict[str, Any] = {}

    def load(name: str, directory: Path = DEMO_DIR / "models") -> Any:
        if name not in known:
            known[name] = (
                random_llama()
                if name == "llama"
                else load_model(str(directory / name), device="cpu", compute_dtype="float32")
            )
        return known[name]

    return load


def random_llama() -> Any:
    """A Llama with grouped heads, rows of 256 and FFN rows of 320, in bfloat16; every norm differs from 1."""
    torch.manual_seed(5)
    config = LlamaConfig(
        **{"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 3},
        **{"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 128},
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data = (1 + 0.1 * torch.randn_like(parameter)) if "norm" in name else 3 * parameter.data
        parameter.data = parameter.data.to(torch.bfloat16).float()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(DEMO_DIR / "models" / "neox-xs" / "tokenizer.json"))
    return SimpleNamespace(model=model, tokenizer=tokenizer, storage_dtype=torch.bfloat16)


def write(path: Path, of: LoadedModel, spec: Spec | None = None) -> Path:
    rows = rows_of(of.model, spec, of.storage_dtype) if spec is not None else {}
    size = write_gguf(path, of.model, of.tokenizer, storage_dtype=of.storage_dtype, rows=rows, spec=spec)
    assert path.stat().st_size == size
    return path


def same(model: nn.Module, other: nn.Module) -> bool:
    others = dict(other.named_parameters())
    pairs = [(value, others.pop(name)) for name, value in model.named_parameters()]
    return not others and all(torch.equal(a, b) for a, b in pairs)


SPECS = (None, GgmlSpec(recipe="Q4_K_M"), GgmlSpec(recipe="Q5_1"), GgmlSpec(ggml_type="q8_0"))


@pytest.mark.parametrize("name", ["neox-xs", "llama"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_model_is_read_back_as_it_was_quantized(name: str, spec: Spec | None, loaded: Load, tmp_path: Path) -> None:
    check_read_back(loaded(name), spec, tmp_path)


@pytest.mark.assets
@pytest.mark.parametrize("name", ["gpt2-s", "bloom-xs"])
@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
def test_other_architectures_are_too(name: str, spec: Spec | None, loaded: Load, tmp_path: Path, assets: Path) -> None:
    check_read_back(loaded(name, assets / "models"), spec, tmp_path)  # type: ignore[call-arg]


def check_read_back(of: LoadedModel, spec: Spec | None, directory: Path) -> None:
    path = write(directory / "m.gguf", of, spec)
    again = read_gguf(path, storage_dtype=of.storage_dtype, dtype=torch.float32)
    ids = torch.arange(2, 66)[None] * 7
    with quantize_model(of.model, spec or QuantSpec(bits=16), storage_dtype=of.storage_dtype), torch.no_grad():
        assert same(of.model, again)
        assert torch.equal(of.model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("name", ["neox-xs", "llama"])
def test_the_package_gguf_reads_the_same(name: str, loaded: Load, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    of = loaded(name)
    path = write(tmp_path / "m.gguf", of, GgmlSpec(recipe="Q4_K_M"))
    theirs, ours = gguf.GGUFReader(path), read_file(path)
    assert {t.name for t in theirs.tensors} == set(ours.tensors)
    for tensor in theirs.tensors:
        stored = ours.tensors[tensor.name]
        assert tensor.tensor_type.name.lower() == stored.format.name.lower()
        assert tuple(reversed(tensor.shape.tolist())) == stored.shape
        assert np.array_equal(tensor.data.view(np.uint8).reshape(-1), ours.read(tensor.name).reshape(-1))
    for key, value in ours.metadata.items():
        assert theirs.fields[key].contents() == value, key
    assert ours.metadata["tokenizer.ggml.tokens"][0] == "<|endoftext|>"
    types = ours.metadata["tokenizer.ggml.token_type"]
    assert (types[0], types[300], len(types)) == (3, 1, 2048)


@needs_llama
@pytest.mark.assets
@pytest.mark.parametrize("name", ["neox-s", "gpt2-s", "bloom-xs", "llama"])
def test_llama_cpp_opens_a_file_and_has_the_same_loss(name: str, loaded: Load, tmp_path: Path, assets: Path) -> None:
    """Of quantized layers it rounds activations to 8 bits, on a CPU; of the random Llama's to bfloat16."""
    of = loaded(name, assets / "models")  # type: ignore[call-arg]
    text = (assets / "eval" / "wikitext2_raw_test.jsonl").read_text().splitlines()[:40]
    ids = of.tokenizer("\n\n".join(json.loads(line)["text"] for line in text))["input_ids"]
    windows = np.array(ids[: 4 * 128]).reshape(4, 128)
    np.save(tmp_path / "windows.npy", windows)
    specs = {"f16": None, "Q4_K_M": GgmlSpec(recipe="Q4_K_M"), "q4_0": GgmlSpec(ggml_type="q4_0")}
    paths = [write(tmp_path / f"{kind}.gguf", of, spec) for kind, spec in specs.items()]
    said = llama.run(LOSS, str(tmp_path / "windows.npy"), *map(str, paths))
    tokens = torch.from_numpy(windows)
    for kind, path, theirs in zip(specs, paths, said.split(), strict=True):
        model = read_gguf(path, storage_dtype=of.storage_dtype, dtype=torch.float32)
        with torch.no_grad():
            nats = model(tokens).logits[:, :-1].double().log_softmax(-1).gather(2, tokens[:, 1:, None])
        assert abs(float(theirs) + float(nats.mean())) <= (2e-3 if kind == "f16" else 2e-2), kind


@needs_llama
@pytest.mark.parametrize("name", ["neox-m", "llama"])
def test_recipes_choose_and_write_what_llama_cpp_does(name: str, loaded: Load, tmp_path: Path) -> None:
    """Each tensor's format and bytes, by each recipe, are those of llama.cpp's own quantizer, given the 16-bit file."""
    of = loaded(name)
    source = write(tmp_path / "source.gguf", of)
    targets = {recipe: tmp_path / f"{recipe}-theirs.gguf" for recipe in RECIPES}
    arguments = [(str(source), str(path), str(RECIPES[r].number)) for r, path in targets.items()]
    llama.run(QUANTIZE, *(word for words in arguments for word in words))
    for recipe, target in targets.items():
        ours = read_file(write(tmp_path / f"{recipe}.gguf", of, GgmlSpec(recipe=recipe)))
        theirs = read_file(target)
        formats = [{n: t.format.name for n, t in file.tensors.items()} for file in (ours, theirs)]
        assert formats[0] == formats[1], recipe
        assert ours.metadata["general.file_type"] == theirs.metadata["general.file_type"]
        wrong = [n for n in ours.tensors if (ours.read(n) != theirs.read(n)).mean() > 1e-3]
        assert wrong == [], recipe


def test_what_gguf_does_not_have_is_refused_by_name(loaded: Load, tmp_path: Path) -> None:
    of = loaded("neox-xs")

    def refused(model: nn.Module) -> str:
        with pytest.raises(SpecError) as error:
            write_gguf(tmp_path / "x.gguf", model, of.tokenizer, storage_dtype=torch.float16)
        assert not list(tmp_path.iterdir())
        return str(error.value)

    assert "gguf is written for gpt_neox, gpt2, bloom, llama, mistral, and GGUF has no OPT" in refused(tiny("opt"))
    neox = tiny("neox")
    neox.config.hidden_act = "relu"  # type: ignore[union-attr]
    assert "the model has hidden_act='relu', and llama.cpp computes with 'gelu'" in refused(neox)
    scaled = tiny("llama-tied")
    scaled.config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}  # type: ignore[union-attr]
    assert "rope_type='linear'" in refused(scaled)


def test_texts_that_are_cut_in_another_way_are_refused(loaded: Load) -> None:
    about = json.loads(loaded("neox-xs").tokenizer.backend_tokenizer.to_str())
    about["pre_tokenizer"] = {"type": "Whitespace"}
    tokenizer = SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=lambda: json.dumps(about)))
    with pytest.raises(SpecError, match=r"a way that has no name in llama\.cpp .*Whitespace"):
        vocabulary_of(tokenizer, 2048)
    with pytest.raises(SpecError, match="the tokenizer is SimpleNamespace, and only byte-level BPE is written"):
        vocabulary_of(SimpleNamespace(), 2048)


def test_damaged_and_foreign_files_are_refused(loaded: Load, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", loaded("neox-xs"))
    data = path.read_bytes()
    for cut, said in ((3, "no GGUF file"), (100, "damaged"), (len(data) - 40, "ends within")):
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=said):
            read_file(path)
    path.write_bytes(data[:4] + b"\x01" + data[5:])
    with pytest.raises(CheckpointError, match="GGUF of version 1: 2 and 3 are read"):
        read_file(path)
    one = np.zeros((2, 4), np.float32)
    entry = Entry(name="x.weight", format=FORMATS["f32"], shape=(2, 4), data=lambda: one)
    write_file(path, {"general.architecture": "mamba"}, [entry])
    with pytest.raises(CheckpointError, match=r"architecture 'mamba': gptneox, gpt2, bloom, llama are read"):
        read_gguf(path, storage_dtype=torch.float16, dtype=torch.float16)


def test_nothing_stays_of_a_file_that_could_not_be_written(tmp_path: Path) -> None:
    def fail() -> Any:
        raise OSError("disk full")

    entry = Entry(name="x.weight", format=FORMATS["f32"], shape=(2, 4), data=fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(tmp_path / "x.gguf", {}, [entry])
    assert not list(tmp_path.iterdir())
