"""Zero-shot tasks: lm-eval's own numbers (HFLM), one encoding for many cells, few-shot, generation, bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from kbit.errors import SpecError
from kbit.evaluation import EvalSpec, prepare
from kbit.evaluation.lm import KbitLM
from kbit.evaluation.tasks import build_task
from kbit.sources import source_from_dict
from tests import ROOT

DEMO = ROOT / "sweeps" / "demo"
VOCAB, CONTEXT = 2048, 512
REAL = {
    "lambada_openai": ("lambada/lambada_openai.yaml", "lambada_openai_test.jsonl"),
    "piqa": ("piqa/piqa.yaml", "piqa_validation.jsonl"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag_validation.jsonl"),
    "winogrande": ("winogrande/default.yaml", "winogrande_xl_validation.jsonl"),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO / "models" / "neox-xs")


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO / "models" / "neox-xs", dtype=torch.float32).eval()


@pytest.fixture
def broken(model: Any) -> Iterator[Any]:
    """The model with a head that gives NaN."""
    head = model.get_output_embeddings().weight
    original = head.data.clone()
    head.data.fill_(float("nan"))
    yield model
    head.data.copy_(original)


def task_spec(name: str, task_file: Path, data: Path | None, **changes: Any) -> EvalSpec:
    source = {"task_file": task_file, **({"path": data} if data else {})}
    fields = {"dataset": "sha256:test", "compute_dtype": "float32", "source": source_from_dict(source), **changes}
    return EvalSpec(kind="task", name=name, **fields)


def demo_spec(name: str, **changes: Any) -> EvalSpec:
    return task_spec(name, DEMO / "tasks" / f"{name}.yaml", DEMO / "text" / f"{name}.jsonl", **changes)


def real_spec(name: str, assets: Path, **changes: Any) -> EvalSpec:
    task_file, data = REAL[name]
    return task_spec(name, lm_eval_tasks() / task_file, assets / "eval" / data, **changes)


def lm_eval_tasks() -> Path:
    package = find_spec("lm_eval")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "tasks"


def hflm(model: Any, tokenizer: Any) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)


def assert_same_as_hflm(spec: EvalSpec, model: Any, tokenizer: Any) -> None:
    ours = prepare(spec, tokenizer, context=CONTEXT, vocab_size=VOCAB).run(model, batch_tokens=1024)
    upstream = evaluate(
        lm=hflm(model, tokenizer), task_dict={spec.name: build_task(spec)}, limit=spec.limit, bootstrap_iters=1000
    )
    theirs = upstream["results"][spec.name]
    for metric, value in ours.metrics.items():
        assert value == pytest.approx(theirs[f"{metric},none"], rel=1e-4)
        # Of a perplexity theirs is a bootstrap, ours its first order.
        close = 0.25 if metric == "perplexity" else 1e-9
        assert ours.stderr[metric] == pytest.approx(theirs[f"{metric}_stderr,none"], rel=close)
    for metric in ("acc", "acc_norm"):
        if metric in ours.metrics:
            per_document = [sample[metric] for sample in upstream["samples"][spec.name]]
            assert ours.samples[metric].dtype == np.bool_
            assert ours.samples[metric].tolist() == per_document


@pytest.mark.parametrize("name", ["jargon_lastword", "jargon_choice"])
def test_demo_task_gives_what_hflm_gives(
    name: str, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    assert_same_as_hflm(demo_spec(name, limit=16), model, tokenizer)


@pytest.mark.assets
@pytest.mark.parametrize("name", list(REAL))
def test_real_task_gives_what_hflm_gives(
    name: str, assets: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    model = AutoModelForCausalLM.from_pretrained(assets / "models" / "neox-s", dtype=torch.float32).eval()
    assert_same_as_hflm(real_spec(name, assets, limit=40), model, tokenizer)


def test_requests_are_encoded_and_cut_as_hflm_does(model: Any, tokenizer: Any) -> None:
    long = "a word and another one " * 300
    pairs = [
        ("The quick brown", " fox"),
        ("The quick brown ", "fox jumps"),
        ("The quick brown\n\n", "fox"),
        ("", "Once upon a time"),
        ("", "<|endoftext|>Once"),
        ("<|endoftext|>Once", " upon"),
        (long, " that is cut on the left"),
        ("short", long[:1500]),
        ("Yes or no?", " yes"),
        ("Yes or no?", " no"),
        ("Tränen 漢字", " für dich"),
    ]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    ours = KbitLM(model, tokenizer, context=CONTEXT, batch_tokens=600).loglikelihood(requests)
    theirs = hflm(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    for (value, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert greedy == expected_greedy


def test_answers_that_differ_in_their_last_token_share_a_forward_pass(model: Any, tokenizer: Any) -> None:
    lm = KbitLM(model, tokenizer, context=CONTEXT, batch_tokens=600)
    answers = [answer for answer in (" A", " B", " C", " D") if len(tokenizer(answer)["input_ids"]) == 1]
    plan = lm.encoder.plan([("Which one?", answer) for answer in answers])
    assert len(answers) > 1
    assert len(plan.inputs) == 1
    assert plan.count_tokens(share=False) == len(tokenizer("Which one?")["input_ids"])


def test_rolling_loglikelihood_is_that_of_hflm(model: Any, tokenizer: Any) -> None:
    rows = [json.loads(line)["text"] for line in (DEMO / "text" / "jargon.jsonl").open(encoding="utf-8")]
    texts = [max(rows, key=len), "short", rows[0]]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    ours = KbitLM(model, tokenizer, context=CONTEXT, batch_tokens=2048).loglikelihood_rolling(requests)
    theirs = hflm(model, tokenizer).loglikelihood_rolling(requests, disable_tqdm=True)
    assert len(tokenizer(texts[0], verbose=False)["input_ids"]) > CONTEXT
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_generation_is_that_of_hflm(model: Any, tokenizer: Any) -> None:
    arguments = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    contexts = ["The computer is", "A hacker", "He opened the door and said that", "word " * 600]
    requests = [Instance("generate_until", {}, (context, arguments), 0) for context in contexts]
    ours = KbitLM(model, tokenizer, context=CONTEXT, batch_tokens=2048).generate_until(requests)
    theirs = hflm(model, tokenizer).generate_until(requests, disable_tqdm=True)
    assert ours == theirs
    assert any(ours)
    assert not any("." in text for text in ours)


def test_one_preparation_serves_many_cells(model: Any, tokenizer: Any) -> None:
    prepared = prepare(demo_spec("jargon_choice", limit=12), tokenizer, context=CONTEXT, vocab_size=VOCAB)
    first = prepared.run(model, batch_tokens=2048)
    weight = model.get_output_embeddings().weight
    original = weight.data.clone()
    weight.data.mul_(0.25)
    other = prepared.run(model, batch_tokens=2048)
    weight.data.copy_(original)
    again = prepared.run(model, batch_tokens=300)
    assert other.samples["acc_norm"].tolist() != first.samples["acc_norm"].tolist() or other.metrics != first.metrics
    assert again.metrics == first.metrics
    assert again.samples["acc"].tolist() == first.samples["acc"].tolist()
    assert (again.n_samples, again.n_tokens, again.dataset_hash) == (12, first.n_tokens, first.dataset_hash)


def test_limit_is_the_first_documents(model: Any, tokenizer: Any) -> None:
    some, all_ = (
        prepare(demo_spec("jargon_lastword", limit=limit), tokenizer, context=CONTEXT, vocab_size=VOCAB).run(
            model, batch_tokens=2048
        )
        for limit in (8, None)
    )
    assert some.samples["acc"].tolist() == all_.samples["acc"][:8].tolist()
    np.testing.assert_allclose(some.samples["perplexity"], all_.samples["perplexity"][:8], rtol=1e-4)
    assert (some.n_samples, all_.n_samples) == (8, 100)
    assert some.dataset_hash != all_.dataset_hash


@pytest.mark.parametrize("name", ["jargon_lastword", "jargon_choice"])
def test_a_diverged_model_has_undefined_metrics_never_a_number(name: str, broken: Any, tokenizer: Any) -> None:
    prepared = prepare(demo_spec(name, limit=5), tokenizer, context=CONTEXT, vocab_size=VOCAB)
    result = prepared.run(broken, batch_tokens=2048)
    assert result.diverged
    assert all(math.isnan(value) for value in result.metrics.values())
    assert all(math.isnan(value) for value in result.stderr.values())
    assert all(np.isnan(values).all() for values in result.samples.values())


def test_exploded_perplexity_of_a_task_is_inf(model: Any, tokenizer: Any) -> None:
    head = model.get_output_embeddings().weight
    original = head.data.clone()
    head.data.mul_(1e4)
    prepared = prepare(demo_spec("jargon_lastword", limit=10), tokenizer, context=CONTEXT, vocab_size=VOCAB)
    result = prepared.run(model, batch_tokens=2048)
    head.data.copy_(original)
    assert result.metrics["perplexity"] == math.inf
    assert 0 <= result.metrics["acc"] <= 1
    assert not result.diverged


def write_task(directory: Path, rows: list[dict[str, Any]], **config: Any) -> tuple[Path, Path]:
    data, task_file = directory / "own.jsonl", directory / "own.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = {"task": "own", "dataset_path": "json", "test_split": "test", "metadata": {"version": 2.0}}
    # JSON is YAML.
    task_file.write_text(json.dumps({**base, **config}), encoding="utf-8")
    return task_file, data


def test_fewshot_examples_come_before_the_question(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"q": f"Number {i}?", "a": str(i)} for i in range(8)]
    task_file, data = write_task(
        tmp_path, rows, output_type="loglikelihood", doc_to_text="{{q}}", doc_to_target="{{a}}", fewshot_split="test"
    )
    task = prepare(
        task_spec("own", task_file, data, num_fewshot=2, limit=3), tokenizer, context=CONTEXT, vocab_size=VOCAB
    ).task
    for index, instance in enumerate(task.instances):
        prompt = instance.args[0]
        examples = prompt.split("\n\n")
        assert len(examples) == 3
        assert examples[-1] == f"Number {index}?"
        assert f"Number {index}?" not in examples[:-1]
        assert all(" " in example for example in examples[:-1])


def test_generation_task_is_scored_by_lm_evals_metrics(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    arguments = {"until": ["."], "max_gen_toks": 4, "do_sample": False}
    prompts = ["The computer is", "A hacker", "It was a dark and"]
    requests = [Instance("generate_until", {}, (prompt, arguments), 0) for prompt in prompts]
    said = KbitLM(model, tokenizer, context=CONTEXT, batch_tokens=2048).generate_until(requests)
    rows = [{"q": prompt, "a": text} for prompt, text in zip(prompts, [*said[:2], "nothing"], strict=True)]
    task_file, data = write_task(
        tmp_path,
        rows,
        output_type="generate_until",
        doc_to_text="{{q}}",
        doc_to_target="{{a}}",
        generation_kwargs=arguments,
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    prepared = prepare(task_spec("own", task_file, data), tokenizer, context=CONTEXT, vocab_size=VOCAB)
    result = prepared.run(model, batch_tokens=2048)
    assert result.samples["exact_match"].tolist() == [True, True, False]
    assert result.metrics["exact_match"] == pytest.approx(2 / 3)
    model.get_output_embeddings().weight.data[0, 0] = float("nan")
    undefined = prepared.run(model, batch_tokens=2048)
    model.get_output_embeddings().weight.data[0, 0] = 0.0
    assert undefined.diverged
    assert math.isnan(undefined.metrics["exact_match"])


def test_rows_that_are_processed_already_bypass_process_docs(tmp_path: Path, tokenizer: Any) -> None:
    task_file = lm_eval_tasks() / "hellaswag" / "hellaswag.yaml"
    endings = ["goes home.", "is [title] blue.", "sings.", "sleeps."]
    raw = {"ctx_a": "A man sits.", "ctx_b": "he", "activity_label": "Sitting", "endings": endings, "label": "2"}
    done = {"query": "Sitting: A man sits. He", "endings": ["goes home.", "is. blue.", "sings.", "sleeps."], "label": 2}
    prompts = []
    for name, row in (("raw", raw), ("done", done)):
        data = tmp_path / f"{name}.jsonl"
        data.write_text(json.dumps(row) + "\n", encoding="utf-8")
        task = prepare(task_spec("hellaswag", task_file, data), tokenizer, context=CONTEXT, vocab_size=VOCAB).task
        prompts.append([instance.args for instance in task.instances])
        assert task.doc_to_target(task.instances[0].doc) == 2
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    ("task", "row", "says"),
    [
        ("piqa/piqa.yaml", {"goal": "g", "sol1": "a", "label": 0}, "'sol2'"),
        ("piqa/piqa.yaml", {"goal": "g", "sol1": "a", "sol2": "b"}, "'label'"),
        ("hellaswag/hellaswag.yaml", {"endings": ["a"], "label": 0}, "'query'"),
        ("winogrande/default.yaml", {"sentence": "a _ b", "option1": "x", "answer": "1"}, "'option2'"),
        ("lambada/lambada_openai.yaml", {"body": "x"}, "'text'"),
    ],
)
def test_local_data_without_a_field_name_file_and_field(
    tmp_path: Path, tokenizer: Any, task: str, row: dict[str, Any], says: str
) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=says) as caught:
        prepare(task_spec("t", lm_eval_tasks() / task, data), tokenizer, context=CONTEXT, vocab_size=VOCAB)
    assert "mine.jsonl" in str(caught.value)


def test_a_later_row_without_a_field_is_named(tmp_path: Path, tokenizer: Any) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text('{"text": "one two"}\n\n{"txt": "three"}\n', encoding="utf-8")
    spec = task_spec("lambada_openai", lm_eval_tasks() / "lambada" / "lambada_openai.yaml", data)
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 3: no field 'text'"):
        prepare(spec, tokenizer, context=CONTEXT, vocab_size=VOCAB)


def test_fewshot_that_can_not_be_had_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    data = tmp_path / "p.jsonl"
    data.write_text(json.dumps({"goal": "g", "sol1": "a", "sol2": "b", "label": 0}) + "\n", encoding="utf-8")
    spec = task_spec("piqa", lm_eval_tasks() / "piqa" / "piqa.yaml", data, num_fewshot=5)
    with pytest.raises(SpecError, match=r"num_fewshot=5 .*'train'"):
        prepare(spec, tokenizer, context=CONTEXT, vocab_size=VOCAB)
    task_file, own = write_task(tmp_path, [{"q": "a", "a": "b"}], output_type="loglikelihood", num_fewshot=0)
    with pytest.raises(SpecError, match="without examples"):
        prepare(task_spec("own", task_file, own, num_fewshot=1), tokenizer, context=CONTEXT, vocab_size=VOCAB)


def test_a_continuation_longer_than_the_context_is_refused(model: Any, tokenizer: Any) -> None:
    lm = KbitLM(model, tokenizer, context=16, batch_tokens=600)
    with pytest.raises(ValueError, match="context of 16"):
        lm.encoder.plan([("a", " word" * 100)])
