"""Agreement with the 16-bit model: its numbers against float64 from full logits, exact zeros, and what is kept."""

from __future__ import annotations

import math
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
)

from kbit.errors import SpecError
from kbit.evaluation import EvalSpec, agreement, prepare, reference, scoring
from kbit.evaluation.agreement import AgreementEval, WindowAgreement, compare_logits, prepare_agreement, summarize
from kbit.evaluation.perplexity import PerplexityEval
from kbit.evaluation.scoring import TokenScorer
from kbit.models.quantize import quantize_model
from kbit.sources import LocalFile
from kbit.spec import QuantSpec
from tests import ROOT
from tests.kbit.tiny_models import tiny

DEMO = ROOT / "sweeps" / "demo"
VOCAB = 2048
INT4, FLOAT8 = QuantSpec(bits=4, dtype="int"), QuantSpec(bits=8, dtype="float")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO / "models" / "neox-xs")


@pytest.fixture
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO / "models" / "neox-xs", dtype=torch.float32).eval()


def text_spec(kind: str = "agreement", **changes: Any) -> EvalSpec:
    source = LocalFile(path=str(DEMO / "text" / "jargon.jsonl"))
    fields: dict[str, Any] = {"dataset": "sha256:test", "compute_dtype": "float32", "window": 128, "source": source}
    return EvalSpec(kind=kind, name="jargon", **{**fields, **changes})


def prepared(tokenizer: Any, **changes: Any) -> AgreementEval:
    return prepare_agreement(text_spec(**changes), tokenizer, context=512, vocab_size=VOCAB)


def of_windows(windows: NDArray[np.int64], vocabulary: int) -> AgreementEval:
    """Any tokens as a text, for models without a tokenizer."""
    counts = np.full(len(windows), windows.shape[1], dtype=np.int64)
    text = PerplexityEval(windows=windows, window_bytes=counts, vocab_size=vocabulary, dataset_hash="")
    return AgreementEval(text=text)


@torch.inference_mode()
def log_probabilities(model: Any, windows: NDArray[np.int64]) -> NDArray[np.float64]:
    """The oracle's: float64 [windows, tokens, vocabulary], from the model's own logits."""
    each = [model(torch.from_numpy(w[None]), use_cache=False).logits[0, :-1].double() for w in windows]
    return np.asarray(torch.stack(each).log_softmax(-1).numpy())


def expected(
    log_p16: NDArray[np.float64], log_p: NDArray[np.float64], windows: NDArray[np.int64]
) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics and standard errors, written out."""
    kl = (np.exp(log_p16) * (log_p16 - log_p)).sum(-1)
    same = (log_p16.argmax(-1) == log_p.argmax(-1)).astype(float)
    target = windows[:, 1:, None]
    change = (np.exp(np.take_along_axis(log_p, target, -1)) - np.exp(np.take_along_axis(log_p16, target, -1)))[..., 0]
    ordered, n = np.sort(kl.reshape(-1)), kl.size
    at = 0.99 * (n - 1)
    p99 = ordered[int(at)] + (at - int(at)) * (ordered[int(at) + 1] - ordered[int(at)])
    metrics = {
        "kl": kl.mean(),
        "kl_median": (ordered[(n - 1) // 2] + ordered[n // 2]) / 2,
        "kl_p99": p99,
        "top_token": same.mean(),
        "p_change": change.mean(),
        "p_change_rms": math.sqrt((change**2).mean()),
    }

    def error(tokens: NDArray[np.float64]) -> float:
        means = tokens.mean(1)
        return math.sqrt(((means - means.mean()) ** 2).sum() / (len(means) - 1) / len(means))

    stderr = {"kl": error(kl), "top_token": error(same), "p_change": error(change)}
    return metrics, stderr | {"p_change_rms": error(change**2) / (2 * metrics["p_change_rms"])}


@pytest.mark.parametrize("spec", [INT4, FLOAT8], ids=lambda s: s.label)
def test_metrics_are_those_of_float64_from_full_logits(model: Any, tokenizer: Any, spec: QuantSpec) -> None:
    evaluation = prepared(tokenizer, limit=1300)
    windows = evaluation.text.windows
    before, compared = log_probabilities(model, windows), evaluation.refer(model, batch_tokens=500)
    with quantize_model(model, spec, storage_dtype=torch.float16):
        result = compared.run(model, batch_tokens=500)
        metrics, stderr = expected(before, log_probabilities(model, windows), windows)
    assert list(result.metrics) == list(metrics)
    assert result.metrics == pytest.approx(metrics, rel=1e-3, abs=1e-6)
    assert result.stderr == pytest.approx(stderr, rel=1e-3, abs=1e-7)
    assert metrics["kl"] > 1e-4
    assert metrics["top_token"] < 1
    assert (result.n_samples, result.n_tokens, result.diverged) == (10, 1280, False)
    assert result.dataset_hash == evaluation.text.dataset_hash
    assert {name: (a.shape, a.dtype.name) for name, a in result.samples.items()} == {
        **dict.fromkeys(("kl", "top_token", "p_change", "p_change_squares"), ((10,), "float32")),
        "tokens": ((10,), "int32"),
    }
    # Samples are what the metric is the mean of, so two cells are compared by them as any others.
    for name in ("kl", "top_token", "p_change"):
        assert result.samples[name].mean(dtype=np.float64) == pytest.approx(result.metrics[name], rel=1e-5)
    assert math.sqrt(result.samples["p_change_squares"].mean()) == pytest.approx(result.metrics["p_change_rms"], 1e-5)


@pytest.mark.assets
@pytest.mark.parametrize("name", ["opt-xs", "gpt2-s", "bloom-xs"])
def test_every_family_agrees_as_by_its_own_logits(assets: Path, name: str) -> None:
    own = AutoTokenizer.from_pretrained(assets / "models" / name)
    model = AutoModelForCausalLM.from_pretrained(assets / "models" / name, dtype=torch.float32).eval()
    evaluation = prepared(own, limit=640)
    windows = evaluation.text.windows
    before, compared = log_probabilities(model, windows), evaluation.refer(model, batch_tokens=256)
    assert compared.run(model, batch_tokens=256).metrics["kl"] == 0
    with quantize_model(model, INT4, storage_dtype=torch.float16):
        result = compared.run(model, batch_tokens=256)
        metrics, stderr = expected(before, log_probabilities(model, windows), windows)
    assert result.metrics == pytest.approx(metrics, rel=1e-3, abs=1e-6)
    assert result.stderr == pytest.approx(stderr, rel=1e-3, abs=1e-6)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
CHANGE_LOGITS = {
    "tight cap": Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=0.5),
    "Gemma 2's cap": Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=30.0),
    "scale": CohereConfig(**SMALL, logit_scale=0.25),
    "scaling": GraniteConfig(**SMALL, logits_scaling=0.05),
}
WINDOWS = np.random.default_rng(0).integers(0, 64, (5, 21))


def changing(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model that does more to its logits than apply its head, with logits of a few units."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CHANGE_LOGITS[name]).eval()
    model.get_input_embeddings().weight.data.mul_(10)
    return model.to(dtype)


def disturb(model: Any) -> None:
    """As quantization does: in the blocks' matrices."""
    torch.manual_seed(1)
    for parameter in model.base_model.layers.parameters():
        parameter.data.add_(0.3 * parameter.data.std() * torch.randn_like(parameter) if parameter.dim() == 2 else 0)


@pytest.mark.parametrize("name", CHANGE_LOGITS)
def test_a_model_that_changes_its_logits_is_compared_by_its_own(name: str) -> None:
    model = changing(name)
    assert not TokenScorer(model).separable
    before = log_probabilities(model, WINDOWS)
    compared = of_windows(WINDOWS, 64).refer(model, batch_tokens=64)
    disturb(model)
    result = compared.run(model, batch_tokens=64)
    metrics, stderr = expected(before, log_probabilities(model, WINDOWS), WINDOWS)
    assert metrics["kl"] > 1e-4
    assert result.metrics == pytest.approx(metrics, rel=1e-3, abs=1e-6)
    assert result.stderr == pytest.approx(stderr, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["neox", "opt-350m", "gpt2", "bloom", "llama-tied", *CHANGE_LOGITS])
def test_the_16_bit_model_agrees_with_itself_to_the_bit(name: str, dtype: torch.dtype) -> None:
    model = changing(name, dtype) if name in CHANGE_LOGITS else tiny(name, dtype)
    compared = of_windows(WINDOWS, 64).refer(model, batch_tokens=45)  # type: ignore[arg-type]
    assert compared.reference is not None
    assert compared.reference.states.dtype == dtype
    result = compared.run(model, batch_tokens=45)  # type: ignore[arg-type]
    assert result.metrics == {"kl": 0, "kl_median": 0, "kl_p99": 0, "top_token": 1, "p_change": 0, "p_change_rms": 0}
    assert result.stderr == dict.fromkeys(("kl", "top_token", "p_change", "p_change_rms"), 0)
    assert not result.diverged


@pytest.mark.parametrize("batch_tokens", [1, 300, 10_000])
def test_perplexity_that_comes_along_is_the_one_measured_alone(model: Any, tokenizer: Any, batch_tokens: int) -> None:
    alone = prepare(text_spec("perplexity", limit=1300), tokenizer, context=512, vocab_size=VOCAB)
    compared = prepared(tokenizer, limit=1300).refer(model, batch_tokens=batch_tokens)
    with quantize_model(model, INT4, storage_dtype=torch.float16):
        along = compared.run(model, batch_tokens=batch_tokens).also["perplexity"]
        own = alone.run(model, batch_tokens=batch_tokens)
    assert (along.metrics, along.stderr) == (own.metrics, own.stderr)
    assert {name: a.tolist() for name, a in along.samples.items()} == {n: a.tolist() for n, a in own.samples.items()}
    assert (along.n_samples, along.n_tokens, along.dataset_hash) == (own.n_samples, own.n_tokens, own.dataset_hash)


def test_pieces_of_logits_change_nothing(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = prepared(tokenizer, limit=600).refer(model, batch_tokens=600)
    with quantize_model(model, INT4, storage_dtype=torch.float16):
        whole = compared.run(model, batch_tokens=600)
        monkeypatch.setattr(scoring, "HEAD_CHUNK", {"cpu": 7 * VOCAB})
        monkeypatch.setattr(agreement, "COMPARED_AT_ONCE", {"cpu": 3 * VOCAB})
        pieces = compared.run(model, batch_tokens=600)
    assert pieces.metrics == pytest.approx(whole.metrics, rel=1e-5, abs=1e-7)


def test_a_gpus_pieces_are_whole_tiles_where_they_are_larger(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, scorer = torch.device("cuda"), scoring.TokenScorer(model)
    for rows, expected_rows in ((535, 512), (512, 512), (256, 256), (200, 200), (1, 1)):
        monkeypatch.setattr(scoring, "HEAD_CHUNK", {"cuda": rows * VOCAB, "cpu": 7 * VOCAB})
        assert scorer.chunk(gpu) == expected_rows
    assert scorer.chunk(torch.device("cpu")) == 7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_states_that_are_sent_ahead_arrive_whole_and_in_order() -> None:
    kept, gpu = torch.randn(40, 1 << 18), torch.device("cuda")
    work, sums = torch.randn(2048, 2048, device=gpu), []
    for batch in reference.sent_ahead((kept[n : n + 3] for n in range(0, 40, 3)), gpu):
        for _ in range(20):  # the GPU lies behind the host
            work = work @ work / 64
        sums.append(batch.double().sum(1))
        del batch
    assert torch.allclose(torch.cat(sums).cpu(), kept.double().sum(1), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_reference_lies_in_a_file_and_gives_the_same_numbers(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(DEMO / "models" / "neox-xs", dtype=dtype).eval()
    evaluation = prepared(tokenizer, limit=600)
    in_memory = evaluation.refer(model, batch_tokens=300)
    assert not mapped_files(tmp_path)
    monkeypatch.setattr(reference, "MEMORY_BYTES", 1000)
    in_file = evaluation.refer(model, batch_tokens=300)
    assert len(mapped_files(tmp_path)) == 1
    with quantize_model(model, INT4, storage_dtype=torch.float16):
        a, b = (each.run(model, batch_tokens=300) for each in (in_memory, in_file))
    assert a.metrics == b.metrics
    assert a.metrics["kl"] > 0
    del in_file
    assert not mapped_files(tmp_path)


def mapped_files(directory: Path) -> list[str]:
    """What this process has mapped of a directory's files, with a name or without."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(directory) in line]


def test_a_full_disk_is_an_error_and_kills_nobody(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reference, "MEMORY_BYTES", 1000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    evaluation = prepared(tokenizer, limit=600)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # as under a quota
    try:
        with pytest.raises(OSError, match="too large"):
            evaluation.refer(model, batch_tokens=300)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system here whose size refuses a file at once")
def test_room_for_a_file_is_taken_up_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/dev/shm")
    there = os.statvfs("/dev/shm")
    with pytest.raises(OSError, match="No space left"):
        reference.host_rows((max(2**33, 2 * there.f_blocks * there.f_frsize),), torch.uint8)


@pytest.mark.parametrize("name", ["neox", "llama-tied", "Gemma 2's cap"])
def test_where_the_head_changes_too_the_16_bit_side_keeps_its_own(name: str) -> None:
    model: Any = changing(name) if name in CHANGE_LOGITS else tiny(name)
    before = log_probabilities(model, WINDOWS)
    compared = of_windows(WINDOWS, 64).refer(model, batch_tokens=64)
    head = model.get_output_embeddings().weight
    torch.manual_seed(2)
    head.data.add_(0.1 * head.data.std() * torch.randn_like(head))
    result = compared.run(model, batch_tokens=64)
    metrics, stderr = expected(before, log_probabilities(model, WINDOWS), WINDOWS)
    assert metrics["kl"] > 1e-6
    assert result.metrics == pytest.approx(metrics, rel=1e-3, abs=3e-7)
    assert result.stderr == pytest.approx(stderr, rel=1e-2, abs=1e-7)


def test_what_is_not_finite_diverges_and_is_never_compared_as_a_number(model: Any, tokenizer: Any) -> None:
    compared = prepared(tokenizer, limit=256).refer(model, batch_tokens=512)
    model.get_output_embeddings().weight.data.fill_(math.nan)
    result = compared.run(model, batch_tokens=512)
    assert result.diverged
    assert all(math.isnan(value) for value in result.metrics.values())
    assert np.isnan(result.samples["top_token"]).all()


def one(*logits: list[float], target: int = 0) -> tuple[float, float, float, float]:
    """What is compared at one token: of the cell's logits, then the 16-bit model's."""
    found = compare_logits(*(torch.tensor([row]) for row in logits), torch.tensor([target]))
    return tuple(float(getattr(found, name)[0]) for name in ("kl", "top_token", "p_change", "nats"))  # type: ignore[return-value]


def test_a_token_by_hand() -> None:
    # p16 = (3/4, 1/4), pk = (1/2, 1/2)
    kl, same, change, nats = one([0.0, 0.0], [math.log(3), 0.0])
    assert kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)
    assert (change, nats) == (pytest.approx(-0.25), pytest.approx(math.log(2)))
    assert same == 1  # of two equals it is the lower
    assert one([0.0, 0.0], [0.0, math.log(3)])[1] == 0
    assert one([1.0, 5.0, 5.0], [1.0, 2.0, 2.0])[1] == 1
    assert one([5.0, 1.0, 5.0], [1.0, 2.0, 2.0])[1] == 0


def test_tokens_without_probability_add_nothing_where_both_leave_them_out() -> None:
    none = -math.inf
    assert one([1.0, 2.0, none], [1.0, 2.0, none])[:2] == (0.0, 1.0)
    assert one([math.log(3), 0.0, 0.0], [0.0, 0.0, none])[0] == pytest.approx(
        0.5 * math.log(0.5 / 0.6) + 0.5 * math.log(0.5 / 0.2), rel=1e-5
    )
    assert one([1.0, none, 2.0], [1.0, 2.0, 3.0])[0] == math.inf


def test_standard_errors_match_resampling_of_windows() -> None:
    random = np.random.default_rng(0)
    scale = random.gamma(4.0, 1.0, (300, 1))
    kl, change = random.exponential(scale, (300, 40)), random.normal(0.01, 0.02 * scale, (300, 40))
    same = (random.random((300, 40)) < 1 / (1 + 0.1 * scale)).astype(np.float32)
    tokens = {"kl": kl.astype(np.float32), "top_token": same, "p_change": change.astype(np.float32)}
    _, stderr, _ = summarize(WindowAgreement(**tokens, nats=tokens["kl"]))
    resampled = random.integers(0, 300, (2000, 300))
    spread = {name: values[resampled].mean((1, 2)).std() for name, values in tokens.items()}
    spread["p_change_rms"] = np.sqrt((change**2).mean(1)[resampled].mean(1)).std()
    assert stderr == pytest.approx(spread, rel=0.1)
    first = WindowAgreement(**{name: values[:1] for name, values in {**tokens, "nats": tokens["kl"]}.items()})
    assert summarize(first)[1] == {}


def test_without_the_16_bit_model_it_does_not_run(model: Any, tokenizer: Any) -> None:
    evaluation = prepare(text_spec(limit=256), tokenizer, context=512, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="call refer with it first"):
        evaluation.run(model, batch_tokens=512)


def test_a_text_is_refused_as_perplexity_refuses_it(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"eval\.tokens=100 .*window of 128"):
        prepared(tokenizer, limit=100)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(ValueError, match=r"short\.txt.*less than one window of 128"):
        prepared(tokenizer, source=LocalFile(path=str(short)))


class OwnHead(Gemma2ForCausalLM):
    """A model whose logits don't come from the head that it names."""

    def get_output_embeddings(self) -> nn.Module:
        return nn.Linear(32, 64, bias=False)


class NoHead(Gemma2ForCausalLM):
    """A model that names no head."""

    def get_output_embeddings(self) -> None:
        return None


@pytest.mark.parametrize(("cls", "says"), [(OwnHead, "OwnHead runs its output"), (NoHead, "NoHead has no output")])
def test_a_model_that_hides_its_head_is_refused_by_name(cls: type[Any], says: str) -> None:
    model = cls(CHANGE_LOGITS["Gemma 2's cap"]).eval()
    with pytest.raises(ValueError, match=says):
        of_windows(WINDOWS, 64).refer(model, batch_tokens=64)
