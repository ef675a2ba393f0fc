"""A GGUF file as a directory that studies take: the same tokens, the same loss, the bits of the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kbit import QuantSpec, SpecError, quantize_model
from kbit.errors import CheckpointError
from kbit.gguf.__main__ import main
from kbit.gguf.export import rows_of, write_gguf
from kbit.gguf.unpack import unpack
from kbit.gguf.vocabulary import CUTS, tokenizer_of, vocabulary_of
from kbit.models.loadable import LoadedModel
from kbit.models.loading import load_model
from kbit.models.originals import Originals
from kbit.spec import spec_from_canonical, spec_of
from kbit.specs.checkpoint import CheckpointSpec
from kbit.specs.ggml import GgmlSpec
from sweeps import load_results
from sweeps.config import DEMO_DIR
from tests.sweeps.commands.conftest import Ask, ask

__all__ = ["ask"]

MODEL = DEMO_DIR / "models" / "neox-xs"
SPEC = GgmlSpec(recipe="Q4_K_M")
TEXT = "Hackers' English: naïve   spaces,\n\n\ttabs <|endoftext|> 12345 — and “quotes”; don't won't.\r\n"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(str(MODEL), device="cpu", compute_dtype="float32")


@pytest.fixture(scope="module")
def unpacked(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory made of a file with a recipe's formats."""
    directory = tmp_path_factory.mktemp("unpacked")
    rows = rows_of(loaded.model, SPEC, loaded.storage_dtype)
    file = directory / "m.gguf"
    write_gguf(file, loaded.model, loaded.tokenizer, storage_dtype=loaded.storage_dtype, rows=rows, spec=SPEC)
    main([str(file), str(directory / "neox-q4km")])
    return directory / "neox-q4km"


def test_tokens_weights_and_bits_are_those_of_the_file(loaded: LoadedModel, unpacked: Path) -> None:
    again = load_model(str(unpacked), device="cpu", compute_dtype="float32")
    assert again.tokenizer(TEXT)["input_ids"] == loaded.tokenizer(TEXT)["input_ids"]
    assert again.tokenizer.decode(again.tokenizer(TEXT)["input_ids"]) == TEXT
    assert (again.context, again.vocab_size) == (loaded.context, loaded.vocab_size)
    assert again.tokenizer.eos_token_id == loaded.tokenizer.eos_token_id
    with quantize_model(loaded.model, SPEC, storage_dtype=loaded.storage_dtype) as handle:
        ours = dict(loaded.model.named_parameters())
        assert all(torch.equal(p, ours[name]) for name, p in again.model.named_parameters())
        with quantize_model(again.model, CheckpointSpec(bits=4), storage_dtype=again.storage_dtype) as counted:
            assert (counted.total_bits, counted.bits_per_param) == (handle.total_bits, handle.bits_per_param)
            assert counted.layers == handle.layers


def test_a_cell_has_the_files_weights_after_one_that_quantized_them(unpacked: Path) -> None:
    again = load_model(str(unpacked), device="cpu", compute_dtype="float32")
    before = {key: value.clone() for key, value in again.model.state_dict().items()}
    originals = Originals(model=again.model)
    for spec in (
        QuantSpec(bits=3, dtype="int"),
        CheckpointSpec(bits=4),
        GgmlSpec(recipe="Q4_0"),
        CheckpointSpec(bits=4),
    ):
        quantize_model(again.model, spec, storage_dtype=again.storage_dtype, originals=originals)
        same = all(torch.equal(value, before[key]) for key, value in again.model.state_dict().items())
        assert same is isinstance(spec, CheckpointSpec)


def test_a_study_of_the_directory_counts_the_files_bits(unpacked: Path, tmp_path: Path, ask: Ask) -> None:
    study = ["eval.tokens=1024", "eval.tasks=[]", "executor.device=cpu", "executor.workers=1", "out=r", "sweep.name=s"]
    study.append("sweep.quant=[{bits: 16}, {method: checkpoint, bits: 4}]")
    file = ask(*study, f"path={unpacked.parent / 'm.gguf'}", "mode=plan")
    assert file.code == 2
    assert "is a GGUF file: unpack it with `python -m kbit.gguf" in file.error
    other = ask(*study, f"path={MODEL}", "mode=plan")
    assert "its config.json has no 'stored_bits', which python -m kbit.gguf writes" in other.error
    done = ask(*study, f"path={unpacked}")
    assert done.code == 0, done
    rows = load_results(tmp_path / "r").set_index("label")
    stored = rows.loc["as stored, 4-bit"]
    assert stored["jargon_loss"] == rows.loc["16-bit", "jargon_loss"]
    assert stored["bits_per_param"] == pytest.approx(6.5805, abs=1e-3)


def test_each_known_way_of_cutting_texts_comes_back(loaded: LoadedModel) -> None:
    metadata = vocabulary_of(loaded.tokenizer, loaded.vocab_size)
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    tokens = {}
    for name in CUTS:
        about = tokenizer_of({**metadata, "tokenizer.ggml.pre": name}, 512)["tokenizer.json"]
        again = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(about)))
        assert vocabulary_of(again, loaded.vocab_size)["tokenizer.ggml.pre"] == name
        tokens[name] = tuple(again(TEXT)["input_ids"])
        assert again.decode(tokens[name]) == TEXT
    assert tokens["gpt-2"] == tuple(loaded.tokenizer(TEXT)["input_ids"])
    assert len(set(tokens.values())) > 1
    assert list(CUTS) == ["gpt-2", "smollm", "bloom", "llama-bpe", "qwen2"]


def test_what_is_not_counted_or_read_is_refused(loaded: LoadedModel, unpacked: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"method='checkpoint' is not valid: .* this config\.json has no stored_bits"):
        quantize_model(loaded.model, CheckpointSpec(bits=4))
    with pytest.raises(SpecError, match=r"bits=16 is not valid: 2 to 8, the bits of most of the file's codes"):
        spec_of({"method": "checkpoint", "bits": 16})
    spec = spec_of({"method": "checkpoint", "bits": 5})
    assert spec_from_canonical(spec.canonical()) == spec
    with pytest.raises(CheckpointError, match="is there already: name a new or an empty directory"):
        unpack(unpacked.parent / "m.gguf", unpacked)
    metadata = vocabulary_of(loaded.tokenizer, loaded.vocab_size)
    with pytest.raises(CheckpointError, match=r"the tokenizer is 'llama' with pre='gpt-2': byte-level BPE"):
        tokenizer_of({**metadata, "tokenizer.ggml.model": "llama"}, 512)
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "no.gguf"), str(tmp_path / "d")])
    assert ended.value.code == 2
