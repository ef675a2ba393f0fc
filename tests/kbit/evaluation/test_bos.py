"""Where the beginning-of-sequence token stands in the windows of a text (``eval.bos``), against a plain loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from kbit.errors import SpecError
from kbit.evaluation import EvalSpec, prepare
from kbit.evaluation.texts import read_documents
from kbit.sources import LocalFile
from tests import ROOT

DEMO = ROOT / "sweeps" / "demo"
JARGON = DEMO / "text" / "jargon.jsonl"
VOCAB, CONTEXT, WINDOW, LIMIT, BOS = 2048, 512, 64, 400, 0


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO / "models" / "neox-xs", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A tokenizer that begins a text with its beginning-of-sequence token, as Gemma's and Llama's do."""
    loaded = AutoTokenizer.from_pretrained(DEMO / "models" / "neox-xs")
    assert loaded.bos_token_id == BOS
    loaded.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{loaded.bos_token} $A", special_tokens=[(loaded.bos_token, BOS)]
    )
    assert loaded("valve")["input_ids"][0] == BOS
    return loaded


def spec(bos: str | None = None, **changes: Any) -> EvalSpec:
    fields: dict[str, Any] = {"dataset": "sha256:test", "compute_dtype": "float32", "window": WINDOW, "limit": LIMIT}
    fields["source"] = LocalFile(path=str(JARGON))
    return EvalSpec(kind="perplexity", name="jargon", bos=bos, **{**fields, **changes})


def text_tokens(tokenizer: Any) -> list[int]:
    text = "\n\n".join(read_documents(LocalFile(path=str(JARGON))))
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:LIMIT])


def windows_of(bos: str, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """(what the model sees, the tokens of text that are scored), written down as the definition says it."""
    tokens = text_tokens(tokenizer)
    if bos == "each":
        pieces = [tokens[i : i + WINDOW - 1] for i in range(0, len(tokens), WINDOW - 1)]
        return [([BOS, *p], p) for p in pieces if len(p) == WINDOW - 1]
    if bos == "first":
        tokens = [BOS, *tokens][:LIMIT]
    pieces = [tokens[i : i + WINDOW] for i in range(0, len(tokens), WINDOW)]
    return [(p, p[1:]) for p in pieces if len(p) == WINDOW]


@pytest.mark.parametrize("bos", ["first", "each", "none"])
@pytest.mark.parametrize("fast", [True, False])
def test_loss_and_bytes_are_those_of_a_plain_loop(model: Any, tokenizer: Any, bos: str, fast: bool) -> None:
    class Slow:
        """The same tokenizer, which keeps no offsets."""

        is_fast = False
        bos_token_id = BOS
        decode = staticmethod(tokenizer.decode)

        def __call__(self, text: str, return_offsets_mapping: bool, **options: Any) -> Any:
            assert not return_offsets_mapping
            return tokenizer(text, **options)

    used = tokenizer if fast else Slow()
    result = prepare(spec(bos), used, context=CONTEXT, vocab_size=VOCAB).run(model, batch_tokens=200)
    nats, count, size = 0.0, 0, 0
    expected = windows_of(bos, tokenizer)
    for seen, scored in expected:
        with torch.inference_mode():
            log_p = functional.log_softmax(model(torch.tensor([seen])).logits[0].double(), -1)
        first = len(seen) - len(scored)
        nats -= sum(float(log_p[first + i - 1, token]) for i, token in enumerate(scored))
        count += len(scored)
        size += len(tokenizer.decode(scored, skip_special_tokens=True).encode())
    assert len(expected) == 6
    assert result.metrics["loss"] == pytest.approx(nats / count, rel=1e-6)
    assert result.metrics["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-6)
    assert result.samples["tokens"].tolist() == [WINDOW - 1] * len(expected)
    assert result.n_tokens == WINDOW * len(expected)


def test_with_each_all_of_the_text_is_scored_and_no_byte_is_lost(tokenizer: Any, tmp_path: Path) -> None:
    text = "The valve turns the gear — près de 🙂. " * 40
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    window = next(w for w in range(3, 40) if len(tokens) % (w - 1) == 0)
    asked = spec("each", window=window, limit=None, source=LocalFile(path=str(tmp_path / "t.txt")))
    prepared: Any = prepare(asked, tokenizer, context=CONTEXT, vocab_size=VOCAB)
    assert prepared.windows[:, 1:].reshape(-1).tolist() == tokens
    assert np.all(prepared.windows[:, 0] == BOS)
    assert prepared.window_bytes.sum() == len(text.encode())


def test_the_default_is_first_and_no_axis_of_the_key() -> None:
    assert spec("first") == spec(None)
    assert "bos" not in spec("first").canonical()
    assert {spec(bos).canonical()["bos"] for bos in ("each", "none")} == {"each", "none"}


def test_other_values_and_tokenizers_without_the_token_are_refused() -> None:
    with pytest.raises(SpecError, match=r"eval\.bos='all' .*first, each, none"):
        spec("all")
    bare = AutoTokenizer.from_pretrained(DEMO / "models" / "neox-xs", bos_token=None)
    bare.bos_token = None
    with pytest.raises(SpecError, match=r"eval\.bos='each' .*first or none"):
        prepare(spec("each"), bare, context=CONTEXT, vocab_size=VOCAB)
