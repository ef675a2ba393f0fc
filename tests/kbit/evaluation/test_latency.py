"""Latency: the tokens are those of greedy generation, the times those of repetitions, the size that of the files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from kbit.errors import SpecError
from kbit.evaluation import EvalSpec, prepare
from kbit.evaluation.decoding import Decoder
from kbit.evaluation.evaluators import EVALUATORS
from kbit.evaluation.latency import LatencyEval, prepare_latency
from kbit.models.quantize import quantize_model
from kbit.packed.files import WEIGHTS, save_packed, saved_bytes
from kbit.sources import LocalFile
from kbit.spec import QuantSpec, Spec
from kbit.specs.block_float import BlockFloatSpec
from tests import ROOT
from tests.kbit.tiny_models import CONFIGS, NAMES, VOCABULARY, tiny

DEMO = ROOT / "sweeps" / "demo"
INT4 = QuantSpec(bits=4, dtype="int", blocksize=32)
PROMPT = torch.tensor([5, 17, 3, 88, 41, 2, 9])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def spec(**changes: Any) -> EvalSpec:
    source = LocalFile(path=str(DEMO / "text" / "jargon.jsonl"))
    values = {"dataset": "sha256:x", "compute_dtype": "float32", "device": "cpu (x)", "source": source}
    return EvalSpec(kind="latency", name="jargon_latency", **{**values, **changes})


def short(**changes: Any) -> LatencyEval:
    values = {"attention": "sdpa", "execution": "eager", "batches": (1, 3), "new_tokens": 6}
    return LatencyEval(prompt=PROMPT.numpy(), warm_ups=1, repetitions=4, **{**values, **changes})


def lively(name: str) -> Any:
    """A tiny model that does not say the same token again and again."""
    model: Any = tiny(name)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
        else:
            parameter.data.zero_()
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.weight.data.fill_(1)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.randn_like(head.weight))  # untied
    return model


def decoded(model: Any, *, batch: int, new: int, execution: str = "eager", repetitions: int = 2) -> torch.Tensor:
    decoder = Decoder(model=model, prompt=PROMPT, batch=batch, new_tokens=new, execution=execution)
    for _ in range(repetitions):  # later ones begin from a cache that was full
        decoder.begin()
        tokens = decoder.rest().clone()
    return tokens


def greedy(model: Any, new: int) -> torch.Tensor:
    """The oracle: the most probable token again and again, without a cache."""
    ids = PROMPT.to(model.device)[None]
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(PROMPT) :]


@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_are_those_of_greedy_generation(name: str) -> None:
    model = lively(name)
    expected = greedy(model, 12)
    assert len(set(expected.tolist())) > 2
    assert torch.equal(decoded(model, batch=2, new=12), expected.expand(2, -1))


def test_the_tokens_of_a_packed_model_are_those_of_its_weights() -> None:
    model = lively("neox")
    with quantize_model(model, INT4):
        expected = greedy(model, 12)
    with quantize_model(model, INT4, packed=True):
        assert torch.equal(decoded(model, batch=3, new=12), expected.expand(3, -1))


def test_attention_that_slides_can_be_timed_as_it_is_written_alone() -> None:
    config = MistralConfig(**{**CONFIGS["mistral"].to_dict(), "sliding_window": 9})
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    assert torch.equal(decoded(model, batch=1, new=12)[0], greedy(model, 12))
    with pytest.raises(SpecError, match=r"eval\.execution='compile' is not valid: eager for MistralForCausalLM"):
        decoded(model, batch=1, new=12, execution="compile")


def test_within_its_window_attention_does_not_slide() -> None:
    model = lively("mistral")
    assert model.config.sliding_window > len(PROMPT) + 12
    decoder = Decoder(model=model, prompt=PROMPT, batch=1, new_tokens=12)
    decoder.begin()
    # A sliding layer counts its tokens in Python, where no graph repeats it.
    assert not any(layer.is_sliding for layer in decoder._cache.layers)
    assert torch.equal(decoder.rest()[0], greedy(model, 12))


@needs_gpu
def test_what_no_graph_repeats_is_refused_by_name() -> None:
    model = lively("bloom").to("cuda")
    with pytest.raises(SpecError, match=r"eval\.execution='graph' is not valid: eager for BloomForCausalLM, whose"):
        decoded(model, batch=1, new=4, execution="graph")


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_tokens() -> None:
    model = lively("neox")
    assert torch.equal(decoded(model, batch=2, new=8, execution="compile"), greedy(model, 8).expand(2, -1))


@needs_gpu
@pytest.mark.parametrize("execution", ["graph", "compile"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "bloom"])  # makes its mask on the host
@pytest.mark.parametrize("packed", [False, True])
def test_a_graph_gives_the_same_tokens_on_a_gpu(name: str, execution: str, packed: bool) -> None:
    model = lively(name).to("cuda")
    with quantize_model(model, INT4 if packed else QuantSpec(bits=16), packed=packed):
        one_by_one = decoded(model, batch=2, new=8)
        assert torch.equal(decoded(model, batch=2, new=8, execution=execution), one_by_one)


def test_a_cpu_has_no_graphs() -> None:
    with pytest.raises(SpecError, match=r"eval\.execution='graph' is not valid: eager or compile on a CPU"):
        decoded(tiny("neox"), batch=1, new=2, execution="graph")


def test_it_measures_what_it_declares() -> None:
    model: Any = tiny("neox")
    with quantize_model(model, INT4, packed=True):
        result = short(batches=(1, 16)).run(model, batch_tokens=1)
    assert set(result.metrics) == {m.name for m in EVALUATORS["latency"].metrics}
    assert all(np.isfinite(v) and v > 0 for v in result.metrics.values())
    timed = [f"{name}_{batch}" for name in ("ttft", "tokens_per_second") for batch in (1, 16)]
    assert set(result.samples) == set(timed)
    for name in timed:
        values = result.samples[name]
        assert values.shape == (4,)
        assert result.metrics[name] == pytest.approx(np.median(values), rel=1e-6)
        assert values.min() <= result.metrics[f"{name}_q25"] <= result.metrics[name] <= result.metrics[f"{name}_q75"]
        assert result.metrics[f"{name}_q75"] <= values.max()
    assert result.metrics["peak_memory_16"] * 1e6 >= sum(t.nbytes for t in model.buffers())
    assert (result.n_samples, result.n_tokens) == (4, 5 * (7 + 6) * 17)
    assert not result.diverged


def test_seconds_are_those_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds to the first token, five for the rest of a repetition."""
    ticks = iter(t + 10.0 * n for n in range(100) for t in (0.0, 2.0, 7.0))
    monkeypatch.setattr("kbit.evaluation.latency.time.perf_counter", lambda: next(ticks))
    metrics = short(batches=(3,)).run(tiny("opt"), batch_tokens=1).metrics
    assert metrics["ttft_3"] == 2000
    assert metrics["tokens_per_second_3"] == pytest.approx(3 * 5 / 5)


def test_attention_is_computed_as_asked_and_then_as_before() -> None:
    model: Any = tiny("llama-gqa")
    seen = []
    model.register_forward_hook(lambda m, *_: seen.append(m.config._attn_implementation))
    before = model.config._attn_implementation
    for attention in ("eager", "sdpa"):
        seen.clear()
        short(attention=attention, batches=(1,)).run(model, batch_tokens=1)
        assert set(seen) == {attention}
        assert model.config._attn_implementation == before


def file_bytes(directory: Path) -> int:
    """Bytes of the tensors in a saved model: the file without its header."""
    file = directory / WEIGHTS
    return file.stat().st_size - 8 - int(struct.unpack("<Q", file.read_bytes()[:8])[0])


@pytest.mark.parametrize("quant", [INT4, BlockFloatSpec(format="nvfp4")])
@pytest.mark.parametrize("name", ["neox", "opt", "gpt2", "llama-tied"])
def test_size_on_disk_is_that_of_the_saved_model_whatever_computes(name: str, quant: Spec, tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.float32):
        model: Any = tiny(name, torch.float16)
        model.to(dtype)
        with quantize_model(model, quant, storage_dtype=torch.float16, packed=True):
            size = saved_bytes(model)
            if dtype == torch.float16:
                save_packed(model, tmp_path)
        # Buffers are float32 in either, rotary frequencies among them.
        buffers = 4 * sum(b.numel() for b in model.buffers() if b.is_floating_point())
        assert size == pytest.approx(file_bytes(tmp_path), abs=buffers)
    model = tiny(name, torch.float32)
    sixteen = 2 * sum(p.numel() for p in model.parameters())
    assert sixteen <= saved_bytes(model) <= sixteen + sum(b.nbytes for b in model.buffers())


def test_the_prompt_is_the_first_tokens_of_the_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "models" / "neox-xs")
    ready: Any = prepare(spec(), tokenizer, context=512, vocab_size=2048)
    first = json.loads((DEMO / "text" / "jargon.jsonl").open().readline())["text"]
    tokens = tokenizer(first)["input_ids"]
    assert len(ready.prompt) == 128
    common = min(len(tokens), 128)
    assert ready.prompt[: common - 2].tolist() == tokens[: common - 2]
    assert (ready.batches, ready.new_tokens, ready.warm_ups, ready.repetitions) == ((1, 16), 128, 3, 10)


def test_a_text_or_a_context_that_is_too_short_is_refused(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "models" / "neox-xs")
    with pytest.raises(SpecError, match="for a context of 255: 256 are used"):
        prepare_latency(spec(), tokenizer, context=255, vocab_size=2048)
    (tmp_path / "few.txt").write_text("few words")
    few = spec(source=LocalFile(path=str(tmp_path / "few.txt")))
    with pytest.raises(ValueError, match="a prompt of 128 is needed"):
        prepare_latency(few, tokenizer, context=512, vocab_size=2048)
    with pytest.raises(ValueError, match="vocabulary has 50 entries"):
        prepare_latency(spec(), tokenizer, context=512, vocab_size=VOCABULARY - 46)


def test_how_a_step_runs_is_identity_and_follows_the_device() -> None:
    assert spec().canonical() | {"attention": "sdpa", "execution": "eager"} == spec().canonical()
    on_gpu = spec(device="NVIDIA H100 80GB HBM3")
    assert (on_gpu.attention, on_gpu.execution) == ("sdpa", "graph")
    assert spec(execution="eager") == spec()
    assert spec(attention="eager").canonical() != spec().canonical()
    other = {"name": "x", "dataset": "x", "compute_dtype": "float32"}
    assert "execution" not in EvalSpec(kind="perplexity", **other).canonical()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention": "flash"}, r"eval\.attention='flash' is not valid: one of sdpa, eager"),
        ({"execution": "fast"}, r"eval\.execution='fast' is not valid: one of eager, compile"),
        ({"execution": "graph"}, r"eval\.execution='graph' is not valid: one of eager, compile"),
        ({"device": "NVIDIA H100", "execution": "no"}, "one of eager, graph, compile"),
        ({"kind": "perplexity", "device": None, "attention": "sdpa"}, "null, for an evaluation of kind perplexity"),
    ],
)
def test_an_unknown_way_is_refused_with_those_that_exist(changes: dict[str, Any], said: str) -> None:
    values = {"kind": "latency", "name": "x", "dataset": "x", "compute_dtype": "float32", "device": "cpu (x)"}
    with pytest.raises(SpecError, match=said):
        EvalSpec(**{**values, **changes})
