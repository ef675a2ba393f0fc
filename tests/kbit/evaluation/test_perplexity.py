"""Perplexity: its number against a plain computation, its windows, its text sources, and its bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
)

from kbit.errors import SpecError
from kbit.evaluation import EvalSpec, prepare, scoring
from kbit.evaluation.perplexity import summarize
from kbit.evaluation.scoring import TokenBatch, TokenScorer
from kbit.evaluation.texts import encode_text, read_documents
from kbit.sources import LocalFile
from tests import ROOT
from tests.kbit.tiny_models import tiny

DEMO = ROOT / "sweeps" / "demo"
JARGON = DEMO / "text" / "jargon.jsonl"
VOCAB = 2048


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO / "models" / "neox-xs")


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO / "models" / "neox-xs", dtype=torch.float32).eval()


def text_spec(path: Path, **changes: Any) -> EvalSpec:
    fields: dict[str, Any] = {"dataset": "sha256:test", "compute_dtype": "float32", "source": LocalFile(path=path)}
    return EvalSpec(kind="perplexity", name="jargon", **{**fields, **changes})


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def documents() -> list[str]:
    return list(read_documents(LocalFile(path=JARGON)))


def test_perplexity_is_that_of_disjoint_windows_without_their_first_token(model: Any, tokenizer: Any) -> None:
    result = prepare(text_spec(JARGON, limit=1300, window=256), tokenizer, context=512, vocab_size=VOCAB).run(
        model, batch_tokens=700
    )
    ids = tokenizer("\n\n".join(documents()), verbose=False)["input_ids"][:1300]
    nats, byte_count = [], 0
    for start in range(0, 1280, 256):
        window = torch.tensor([ids[start : start + 256]])
        with torch.inference_mode():
            log_p = functional.log_softmax(model(window).logits[0, :-1].double(), -1)
        nats.append(-log_p.gather(1, window[0, 1:, None]).sum().item())
        byte_count += len(tokenizer.decode(window[0, 1:]).encode())
    loss = sum(nats) / (5 * 255)
    assert result.samples["nats"].dtype == np.float32
    assert result.samples["tokens"].dtype == np.int32
    np.testing.assert_allclose(result.samples["nats"], nats, rtol=1e-5)
    assert result.samples["tokens"].tolist() == [255] * 5
    assert result.metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert result.metrics["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / byte_count, rel=1e-6)
    assert result.stderr["loss"] == pytest.approx(np.std(np.array(nats) / 255, ddof=1) / math.sqrt(5), rel=1e-4)
    assert (result.n_samples, result.n_tokens, result.diverged) == (5, 1280, False)


def test_batch_size_changes_nothing(model: Any, tokenizer: Any) -> None:
    prepared = prepare(text_spec(JARGON, limit=600, window=64), tokenizer, context=512, vocab_size=VOCAB)
    one, many = prepared.run(model, batch_tokens=1), prepared.run(model, batch_tokens=10_000)
    np.testing.assert_allclose(one.samples["nats"], many.samples["nats"], rtol=1e-5)
    assert one.dataset_hash == many.dataset_hash


def test_window_is_cut_to_the_context_and_defaults_to_it(tokenizer: Any) -> None:
    for window in (None, 4096):
        spec = text_spec(JARGON, limit=1100, window=window)
        assert prepare(spec, tokenizer, context=512, vocab_size=VOCAB).windows.shape == (2, 512)


def test_limit_reads_only_a_beginning_and_gives_the_tokens_of_the_whole(tokenizer: Any) -> None:
    texts = documents()
    whole = encode_text(texts, tokenizer)
    for limit in (1, 700, 5000):
        taken: list[str] = []
        first = encode_text((taken.append(t) or t for t in texts), tokenizer, limit=limit)
        assert first.tokens.tolist() == whole.tokens[:limit].tolist()
        assert first.ends is not None
        assert whole.ends is not None
        assert first.ends.tolist() == whole.ends[:limit].tolist()
        assert len(taken) < len(texts) / 4
    assert len(encode_text(texts[:2], tokenizer, limit=10**6).tokens) == len(encode_text(texts[:2], tokenizer).tokens)


def test_limit_cuts_one_long_document(tokenizer: Any) -> None:
    text = "\n\n".join(documents())
    whole = encode_text([text], tokenizer).tokens
    assert encode_text([text], tokenizer, limit=900).tokens.tolist() == whole[:900].tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet=st.sampled_from("ab e\n\té漢🙂."), max_size=40), min_size=1, max_size=5))
def test_token_ends_count_the_bytes_of_any_text(tokenizer: Any, texts: list[str]) -> None:
    encoded = encode_text(texts, tokenizer)
    text = "\n\n".join(texts)
    if text:
        assert encoded.ends is not None
        assert encoded.ends[-1] == len(text.encode())
        assert (np.diff(encoded.ends) >= 0).all()


def test_tokenizer_without_offsets_counts_the_bytes_of_decoded_tokens(model: Any, tokenizer: Any) -> None:
    class Slow:
        """The same tokenizer, which keeps no offsets."""

        is_fast = False
        decode = staticmethod(tokenizer.decode)

        def __call__(self, text: str, **options: Any) -> Any:
            assert not options["return_offsets_mapping"]
            return tokenizer(text, verbose=False)

    spec = text_spec(JARGON, limit=512, window=128)
    fast = prepare(spec, tokenizer, context=512, vocab_size=VOCAB).run(model, batch_tokens=512)
    slow = prepare(spec, Slow(), context=512, vocab_size=VOCAB).run(model, batch_tokens=512)
    assert slow.metrics == fast.metrics


def test_text_file_is_one_document(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\n\ntwo\n", encoding="utf-8")
    assert list(read_documents(LocalFile(path=path))) == ["one\n\ntwo\n"]


def test_another_field_can_be_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"content": "x"}, {"content": "y"}])
    assert list(read_documents(LocalFile(path=path, field="content"))) == ["x", "y"]


def test_what_the_model_does_not_know_diverges_and_keeps_its_number(model: Any, tokenizer: Any) -> None:
    prepared = prepare(text_spec(JARGON, limit=256, window=128), tokenizer, context=512, vocab_size=VOCAB)
    head = model.get_output_embeddings().weight
    original = head.data.clone()
    try:
        head.data.mul_(100)
        exploded = prepared.run(model, batch_tokens=512)
        head.data.fill_(float("nan"))
        undefined = prepared.run(model, batch_tokens=512)
    finally:
        head.data.copy_(original)
    assert exploded.diverged
    assert math.log(VOCAB) + 1 < exploded.metrics["loss"] < math.inf
    assert undefined.diverged
    assert math.isnan(undefined.metrics["loss"])
    assert np.isnan(undefined.samples["nats"]).all()
    assert not prepared.run(model, batch_tokens=512).diverged


def test_overflowing_perplexity_is_inf() -> None:
    metrics, _ = summarize(np.array([9e4, 9e4]), 100, np.array([300, 300]))
    assert (metrics["loss"], metrics["perplexity"]) == (900.0, math.inf)


def test_standard_errors_match_resampling_of_windows() -> None:
    random = np.random.default_rng(0)
    window_bytes = random.integers(350, 450, 400)
    nats = window_bytes * random.normal(1.0, 0.1, 400)
    _, stderr = summarize(nats, 100, window_bytes)
    resampled = random.integers(0, 400, (4000, 400))
    loss = nats[resampled].mean(1) / 100
    bits = nats[resampled].sum(1) / window_bytes[resampled].sum(1) / math.log(2)
    assert stderr["loss"] == pytest.approx(loss.std(), rel=0.1)
    assert stderr["perplexity"] == pytest.approx(np.exp(loss).std(), rel=0.1)
    assert stderr["bits_per_byte"] == pytest.approx(bits.std(), rel=0.1)
    assert summarize(nats[:1], 100, window_bytes[:1])[1] == {}


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def capped(cap: float) -> Any:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=cap)).eval()


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=0.5),
        Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=30.0),
        CohereConfig(**SMALL, logit_scale=0.99),
        GraniteConfig(**SMALL, logits_scaling=1.01),
    ],
    ids=["tight cap", "Gemma 2's cap", "scale", "scaling"],
)
def test_a_model_that_changes_its_logits_is_scored_by_its_own(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = np.arange(24).reshape(2, 12) % 64
    rows, positions = np.indices((2, 11)).reshape(2, -1)
    scorer = TokenScorer(model)
    nats, greedy = scorer.score(TokenBatch.of(ids, rows * 12 + positions, ids[:, 1:].reshape(-1)))
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids)).logits[:, :-1].reshape(22, 64)
    expected = functional.cross_entropy(logits, torch.from_numpy(ids[:, 1:].reshape(-1)), reduction="none")
    assert not scorer.separable
    np.testing.assert_allclose(nats, expected, rtol=1e-5)
    assert greedy.tolist() == (logits.argmax(-1).numpy() == ids[:, 1:].reshape(-1)).tolist()


def test_a_weak_cap_shows_without_a_word_of_it_in_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "LOGIT_CHANGES", ())
    model = capped(30.0)
    model.get_output_embeddings().weight.data.mul_(10)
    with torch.inference_mode():
        assert 1 < float(model(torch.arange(4)[None]).logits.abs().max()) < 10
    assert not TokenScorer(model).separable


def test_a_cell_that_diverged_does_not_decide_how_the_next_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "LOGIT_CHANGES", ())
    model = capped(0.5)
    weight = model.get_output_embeddings().weight.data
    before = weight.clone()
    weight.fill_(math.nan)
    TokenScorer(model)
    weight.copy_(before)
    assert not TokenScorer(model).separable


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["neox", "opt-350m", "gpt2", "bloom", "llama-tied"])
def test_the_head_of_a_plain_model_is_applied_to_scored_positions_only(name: str, dtype: torch.dtype) -> None:
    assert TokenScorer(tiny(name, dtype)).separable


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"text": "a"}, {"body": "b", "id": 3}], ["line 2", "'text'", "body, id"]),
        ([{"text": 5}], ["line 1", "'text'"]),
        ([{"text": "too short"}], ["less than one window of 512"]),
    ],
)
def test_bad_text_sets_are_named(tmp_path: Path, tokenizer: Any, rows: list[dict[str, Any]], says: list[str]) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=r"bad\.jsonl") as caught:
        prepare(text_spec(path), tokenizer, context=512, vocab_size=VOCAB)
    assert all(part in str(caught.value) for part in says)


def test_bad_files_are_named(tmp_path: Path, tokenizer: Any) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    table = tmp_path / "text.csv"
    table.write_text("text\n", encoding="utf-8")
    for path, says in ((broken, "line 2: not JSON"), (table, r"text\.csv"), (tmp_path / "none.jsonl", "no such file")):
        with pytest.raises(ValueError, match=says):
            prepare(text_spec(path), tokenizer, context=512, vocab_size=VOCAB)


def test_limit_below_one_window_and_a_foreign_tokenizer_are_refused(tokenizer: Any) -> None:
    with pytest.raises(SpecError, match=r"eval\.tokens=100 .*window of 512"):
        prepare(text_spec(JARGON, limit=100), tokenizer, context=512, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="vocabulary has 50 entries"):
        prepare(text_spec(JARGON, limit=512), tokenizer, context=512, vocab_size=50)


@pytest.mark.assets
@pytest.mark.parametrize("name", ["opt-s", "gpt2-s", "bloom-s"])
def test_every_family_is_scored_as_by_its_own_logits(assets: Path, name: str) -> None:
    family = AutoModelForCausalLM.from_pretrained(assets / "models" / name, dtype=torch.float32).eval()
    scorer = TokenScorer(family)
    random = np.random.default_rng(1)
    ids = random.integers(2, VOCAB, (3, 40))
    lengths = [40, 25, 9]
    for row, length in enumerate(lengths):
        ids[row, length:] = 0
    rows = np.concatenate([np.full(length - 1, row) for row, length in enumerate(lengths)])
    positions = np.concatenate([np.arange(length - 1) for length in lengths])
    nats, _ = scorer.score(TokenBatch.of(ids, rows * 40 + positions, ids[rows, positions + 1]))
    expected = []
    for row, length in enumerate(lengths):
        alone = torch.from_numpy(ids[row : row + 1, :length])
        with torch.inference_mode():
            logits = family(alone).logits[0, :-1]
        expected.append(functional.cross_entropy(logits, alone[0, 1:], reduction="none"))
    assert scorer.separable
    np.testing.assert_allclose(nats, torch.cat(expected), rtol=2e-4, atol=2e-4)


@pytest.mark.assets
def test_real_text_gives_the_expected_order_of_models(assets: Path) -> None:
    text = assets / "eval" / "commoncrawl_sample.jsonl"
    losses = {}
    for name in ("neox-xs", "neox-s"):
        directory = assets / "models" / name
        own = AutoTokenizer.from_pretrained(directory)
        loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        prepared = prepare(text_spec(text, limit=4096), own, context=512, vocab_size=VOCAB)
        losses[name] = prepared.run(loaded, batch_tokens=2048).metrics["loss"]
    assert 3 < losses["neox-s"] < losses["neox-xs"] < 4.5
