"""Kinds of evaluations: each is declared whole, in one place, and none is anybody's default."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from inspect import signature

import pytest
from omegaconf import OmegaConf

from kbit.axes import Axis
from kbit.doors import load
from kbit.errors import SpecError
from kbit.evaluation import EVALUATORS, EvalSpec
from kbit.evaluation.evaluators import Evaluator, MetricSpec, declared_metrics
from kbit.evaluation.spec import eval_axes
from kbit.sources import HubData, LocalFile, NamedFiles, Source, TaskSource, source_from_dict, source_to_dict
from sweeps.config import EvalConfig, eval_config
from sweeps.study.evals import FIND, LISTS

FILE = LocalFile(path="/x.jsonl", sha256="0" * 64, bytes=3_500, documents=10)


def spec(kind: str, **changes: object) -> EvalSpec:
    device = "cpu" if EVALUATORS[kind].identity_of_device else None
    values = {"kind": kind, "name": "x", "dataset": "sha256:x", "compute_dtype": "float32", "device": device}
    return EvalSpec(**{**values, **changes})


@pytest.mark.parametrize("kind", EVALUATORS)
def test_each_kind_is_declared_whole(kind: str) -> None:
    evaluator = EVALUATORS[kind]
    module, _, name = evaluator.prepare.partition(":")
    assert list(signature(getattr(import_module(module), name)).parameters) == [
        "spec",
        "tokenizer",
        "context",
        "vocab_size",
    ]
    assert evaluator.data in FIND
    assert load(evaluator.tokens)(spec(kind, source=FILE, limit=5)) > 0
    assert set(evaluator.settings) <= {f.name for f in fields(EvalSpec)}
    assert set(evaluator.settings.values()) <= {f.name for f in fields(EvalConfig)}
    for dependency in evaluator.modules:
        import_module(dependency)
    assert evaluator.metrics
    for metric in evaluator.metrics:
        assert metric.name
        assert metric.title
        assert isinstance(metric.unit, str)
        # What is measured of baselines alone ranks no cells: it is neither good nor bad.
        assert isinstance(metric.higher_is_better, type(None) if evaluator.baseline_only else bool)
        assert metric.decimals >= 0


def test_every_list_of_the_configuration_is_of_a_kind() -> None:
    assert set(LISTS) <= {f.name for f in fields(EvalConfig)}
    assert set(LISTS.values()) <= set(EVALUATORS)


def test_an_unknown_kind_is_refused_with_those_that_exist() -> None:
    with pytest.raises(SpecError, match=r"eval\.kinds='latency2' is not valid: one of perplexity, task"):
        EvalSpec(kind="latency2", name="x", dataset="x", compute_dtype="float32")


def test_a_metric_means_the_same_in_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {m.name for e in EVALUATORS.values() for m in e.metrics} == set(declared_metrics())
    upside_down = MetricSpec(name="acc", title="Accuracy", higher_is_better=False)
    other = Evaluator(data="none", prepare="", tokens=lambda _: 0, metrics=(upside_down,))
    monkeypatch.setitem(EVALUATORS._entries, "other", other)
    with pytest.raises(SpecError, match=r"eval\.kinds\.other: the metric acc"):
        declared_metrics()


def test_a_later_field_is_in_no_key_at_its_neutral_value(monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"kind", "name", "version", "num_fewshot", "window", "limit", "dataset", "compute_dtype"}
    assert set(spec("perplexity").canonical()) == first
    timed = Evaluator(data="none", prepare="", tokens=lambda _: 0, metrics=(), identity_of_device=True)
    monkeypatch.setitem(EVALUATORS._entries, "timed", timed)
    assert spec("timed", device="NVIDIA H100").canonical()["device"] == "NVIDIA H100"
    with pytest.raises(SpecError, match="device=None is not valid: the name of the device"):
        spec("timed", device=None)
    with pytest.raises(SpecError, match="device='NVIDIA H100' is not valid: null"):
        spec("perplexity", device="NVIDIA H100")


def test_a_later_field_is_a_key_of_the_configuration() -> None:
    later = Axis(name="batch", type="int64", doc="sequences at once", neutral=1, since=2)
    composed = OmegaConf.structured(eval_config({**eval_axes(), "batch": later}))
    assert composed.batch == 1
    assert not {"device", "definition"} & set(composed)
    assert set(OmegaConf.structured(EvalConfig)) == set(composed) - {"batch"}


@pytest.mark.parametrize(
    ("source", "written"),
    [
        (None, {}),
        (FILE, {"path": "/x.jsonl", "sha256": "0" * 64, "bytes": 3_500, "documents": 10}),
        (HubData(hub="o/n", revision="c", field="text"), {"hub": "o/n", "revision": "c", "field": "text"}),
        (
            TaskSource(task_file="/t.yaml", documents=HubData(hub="o/n", revision="c", config="d", kwargs={})),
            {"task_file": "/t.yaml", "hub": "o/n", "revision": "c", "config": "d", "kwargs": {}},
        ),
        (TaskSource(task_file="/t.yaml", documents=NamedFiles(sha256="a")), {"task_file": "/t.yaml", "sha256": "a"}),
        (TaskSource(task_file="/t.yaml"), {"task_file": "/t.yaml"}),
    ],
)
def test_sources_are_written_as_they_always_were(source: Source | None, written: dict[str, object]) -> None:
    assert source_to_dict(source) == written
    assert source_from_dict(written) == source


def test_a_null_in_an_older_manifest_is_no_configuration() -> None:
    old = {"task_file": "/t.yaml", "hub": "baber/piqa", "config": None, "revision": "c", "kwargs": {}}
    assert source_from_dict(old) == TaskSource(
        task_file="/t.yaml", documents=HubData(hub="baber/piqa", revision="c", kwargs={})
    )
