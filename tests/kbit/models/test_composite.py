"""Of models that also see, the language part is quantized and scored, never the tower, however large it is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, MptConfig

from kbit import QuantSpec, quantize_model
from kbit.evaluation.scoring import TokenBatch, TokenScorer
from kbit.models.architectures import block_layers, decoder_blocks
from kbit.models.limits import context_of, vocabulary_of
from kbit.models.loading import load_model
from kbit.models.placement import device_map
from tests.kbit.composite_models import CONTEXT, HIDDEN, NAMES, TOWER_LAYERS, VOCABULARY, composite
from tests.kbit.models.test_loading import write_tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Any, Path]:
    model = composite(request.param, torch.bfloat16)
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("checkpoint", NAMES, indirect=True)
def test_a_composite_checkpoint_is_read_whole_and_scored_by_its_language_part(checkpoint: tuple[Any, Path]) -> None:
    model, directory = checkpoint
    loaded = load_model(str(directory), device="cpu", compute_dtype="float32")
    assert (loaded.context, loaded.vocab_size) == (CONTEXT, VOCABULARY)
    expected = model.state_dict()
    assert expected.keys() == loaded.model.state_dict().keys()
    assert all(torch.equal(value, expected[name].float()) for name, value in loaded.model.state_dict().items())
    ids = np.arange(24).reshape(2, 12)
    rows, positions = np.indices((2, 11)).reshape(2, -1)
    nats, _ = TokenScorer(loaded.model).score(TokenBatch.of(ids, rows * 12 + positions, ids[:, 1:].reshape(-1)))
    with torch.inference_mode():
        logits = loaded.model(torch.from_numpy(ids)).logits[:, :-1].reshape(22, VOCABULARY)
    plain = functional.cross_entropy(logits, torch.from_numpy(ids[:, 1:].reshape(-1)), reduction="none")
    np.testing.assert_allclose(nats, plain, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_language_part_is_quantized_and_the_tower_is_not(name: str) -> None:
    model = composite(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path, blocks = decoder_blocks(model)
    assert len(blocks) == 2
    assert "language_model" in path
    matrices = {
        f"{path}.{key}.weight": module.weight.numel()
        for key, module in blocks.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert {f"{layer.name}.weight" for layer in block_layers(model)} == matrices.keys()
    tower = max(sum(p.numel() for p in m.parameters()) for m in model.modules() if is_tower(m))
    assert tower > sum(p.numel() for p in model.get_decoder().parameters())
    with quantize_model(model, QuantSpec(bits=4, dtype="int", blocksize=64)) as handle:
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == matrices.keys()
    total = sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    quantized = sum(matrices.values())
    scales = sum(-(-n // 64) for n in matrices.values())  # a short last block has one too
    assert handle.total_bits == 16 * (total - quantized) + 4 * quantized + 16 * scales


def is_tower(module: torch.nn.Module) -> bool:
    return any(isinstance(child, torch.nn.ModuleList) and len(child) == TOWER_LAYERS for child in module.children())


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "llava", "qwen2_5_vl"])
def test_outliers_of_the_language_part_are_found(name: str) -> None:
    spec = QuantSpec(bits=4, dtype="int", blocksize=64, outlier_fraction=0.05)
    with quantize_model(composite(name), spec) as handle:
        assert len(handle.layers) == 2 * 7


@pytest.mark.parametrize("name", NAMES)
def test_a_composite_model_is_spread_without_splitting_a_block(name: str) -> None:
    model = composite(name)
    placed = device_map(model, 2)
    for parameter, _ in model.named_parameters(remove_duplicate=False):
        assert sum(parameter == module or parameter.startswith(f"{module}.") for module in placed) == 1


def test_the_context_is_the_least_of_what_is_named_under_names_of_its_own() -> None:
    of_mpt = MptConfig(d_model=HIDDEN, n_heads=4, n_layers=2, max_seq_len=256, vocab_size=VOCABULARY)
    assert context_of(of_mpt, 10**30) == 256
    assert context_of(of_mpt, 128) == 128
    for name in ("max_sequence_length", "seq_length", "model_max_length"):
        assert context_of(SimpleNamespace(**{name: 100}), 10**30) == 100
        assert context_of(SimpleNamespace(**{name: 4096}), 10**30) == 2048
        assert context_of(SimpleNamespace(max_position_embeddings=512, **{name: 100}), 10**30) == 512
    assert context_of(SimpleNamespace(max_position_embeddings=-1), 10**30) == 2048
    with pytest.raises(AttributeError, match="SimpleNamespace has no vocab_size"):
        vocabulary_of(SimpleNamespace())


def test_the_perplexity_windows_of_mpt_fit_its_context(tmp_path: Path) -> None:
    config = MptConfig(d_model=HIDDEN, n_heads=4, n_layers=2, max_seq_len=256, vocab_size=VOCABULARY)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu", compute_dtype="float32")
    assert loaded.context == 256
    assert torch.isfinite(loaded.model(torch.zeros(1, loaded.context, dtype=torch.long)).logits).all()
