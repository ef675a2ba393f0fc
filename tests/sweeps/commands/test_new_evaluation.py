"""A kind of evaluation that another package brings: found, planned, run by a worker, stored, ranked as it declares."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from analysis.metrics import direction_warnings, headline_metrics, metric_columns, parse_metric
from analysis.tables import bits_by_dtype, to_markdown
from kbit.evaluation import EVALUATORS, EvalSpec
from kbit.spec import QuantSpec
from sweeps import load_results
from sweeps.config import DEMO_DIR
from sweeps.errors import UserError
from sweeps.executors.base import chosen
from sweeps.plan.pack import Pack
from sweeps.store.parts import Store
from sweeps.study.cell import Cell, ModelRef
from sweeps.study.devices import cpu_name, is_device, local_device_name
from sweeps.study.hub import local_model
from sweeps.worker.worker import Worker
from tests.conftest import ROOT

PACKAGE = '''
"""The entropy of predictions over a text set, and the time of a forward pass of the packed model."""
import time
from dataclasses import dataclass
from typing import Any

from kbit.evaluation.evaluators import Evaluator, MetricSpec
from kbit.evaluation.perplexity import PerplexityEval, prepare_perplexity
from kbit.evaluation.predicted import text_tokens
from kbit.evaluation.spec import EvalResult

ENTROPY = Evaluator(
    data="text",
    prepare="entropy:prepare_entropy",
    tokens=text_tokens,
    metrics=(MetricSpec(name="uncertainty", title="Entropy", unit="nats/token", higher_is_better=False, decimals=4),),
    settings={"window": "window", "limit": "tokens"},
    suffix="_entropy",
)
FORWARD = Evaluator(
    data="none",
    prepare="entropy:prepare_forward",
    tokens=lambda spec: 64,
    metrics=(MetricSpec(name="forward", title="Forward pass", unit="s", higher_is_better=False, decimals=6),),
    packed=True,
    identity_of_device=True,
)


@dataclass
class EntropyEval:
    text: PerplexityEval

    def run(self, model, *, batch_tokens):
        import torch

        with torch.inference_mode():
            logp = model(torch.from_numpy(self.text.windows)).logits.log_softmax(-1)
        value = float(-(logp.exp() * logp).sum(-1).mean())
        count = len(self.text.windows)
        return EvalResult(metrics={"uncertainty": value}, stderr={}, samples={}, diverged=False, n_samples=count,
                          n_tokens=self.text.windows.size, dataset_hash=self.text.dataset_hash)


class ForwardEval:
    def run(self, model, *, batch_tokens):
        import torch

        packed = sum(type(module).__name__ == "KBitLinear" for module in model.modules())
        began = time.perf_counter()
        with torch.no_grad():
            model(torch.arange(64)[None])
        return EvalResult(metrics={"forward": time.perf_counter() - began, "packed_layers": float(packed)}, stderr={},
                          samples={}, diverged=False, n_samples=1, n_tokens=64, dataset_hash="")


def prepare_entropy(spec, tokenizer, *, context, vocab_size):
    return EntropyEval(prepare_perplexity(spec, tokenizer, context=context, vocab_size=vocab_size))


def prepare_forward(spec, tokenizer, *, context, vocab_size):
    return ForwardEval()
'''
ENTRY_POINTS = "[kbit_sweep.evaluations]\nentropy = entropy:ENTROPY\nforward = entropy:FORWARD\n"
GRID = "sweep.quant=[{bits: 16}, {bits: [3, 4], dtype: [int, float, quantile]}]"
KINDS = "eval.kinds={entropy: [jargon], forward: [prefill]}"
TASK = """
task: own_choice
dataset_path: json
output_type: multiple_choice
test_split: test
dataset_kwargs: {data_files: {test: %s}}
doc_to_text: query
doc_to_target: label
doc_to_choice: endings
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_bytes, aggregation: mean, higher_is_better: true}
"""


def run(cwd: Path, *args: str, package: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    if package is not None:
        environment["PYTHONPATH"] = str(package)
    command = [sys.executable, str(ROOT / "launch.py"), "out=r", "sweep.sizes=[neox-xs]", "eval.tokens=1024", *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installed package with two kinds: one file and its entry points."""
    directory = tmp_path_factory.mktemp("site-packages")
    (directory / "entropy.py").write_text(PACKAGE)
    about = directory / "entropy-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: entropy\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    return directory


@pytest.fixture
def installed(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, in this process."""
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setattr(EVALUATORS, "_others", None)
    monkeypatch.setattr(EVALUATORS, "_entries", dict(EVALUATORS._entries))


@pytest.fixture(scope="module")
def study(package: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    directory = tmp_path_factory.mktemp("study")
    done = run(directory, "eval.perplexity=[]", "eval.tasks=[]", GRID, KINDS, package=package)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory / "r", done


@pytest.mark.usefixtures("installed")
def test_new_kinds_run_end_to_end_and_are_stored_under_their_own_names(
    study: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, _ = study
    long = load_results(out, long=True)
    assert set(long["status"]) == {"done"}
    assert len(long) == 14
    kinds = long.drop_duplicates("eval").set_index("eval")
    assert kinds["eval_kind"].to_dict() == {"jargon_entropy": "entropy", "prefill": "forward"}
    assert kinds.loc["prefill", "eval_device"] == cpu_name()
    assert kinds["eval_device"].isna()["jargon_entropy"]
    wide = load_results(out)
    # The kind asked for a packed model, and only that kind got one.
    assert (wide.loc[wide["bits"] < 16, "prefill_packed_layers"] > 0).all()
    assert (wide.loc[wide["bits"] == 16, "prefill_packed_layers"] == 0).all()


@pytest.mark.usefixtures("installed")
def test_the_metric_is_ranked_as_its_kind_declares(study: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = study
    assert "Entropy on jargon_entropy (nats/token), lower is better" in done.stdout
    wide = load_results(out)
    table = (out / "tables" / "demo.md").read_text()
    for bits in (3, 4):
        best = wide.loc[wide["bits"] == bits, "jargon_entropy_uncertainty"].min()
        (row,) = [line for line in table.splitlines() if re.search(rf"\| +{bits} \|", line)]
        assert row.count("**") == 2
        assert f"**{best:.4f}**" in row


@pytest.mark.usefixtures("installed")
def test_where_the_package_is_installed_its_metrics_are_known() -> None:
    metric = parse_metric("jargon_entropy_uncertainty")
    assert (metric.eval, metric.unit, metric.higher_is_better) == ("jargon_entropy", "nats/token", False)


@pytest.mark.usefixtures("installed")
def test_a_measurement_of_another_device_is_refused_by_name(tmp_path: Path) -> None:
    model = DEMO_DIR / "models" / "neox-xs"
    ref = ModelRef(
        family="neox", name="neox-xs", path=str(model), weights_hash=local_model(model).content_hash, params=500_000
    )
    spec = EvalSpec(kind="forward", name="prefill", dataset="none", compute_dtype="float32", device="NVIDIA H200")
    here = EvalSpec(kind="forward", name="here", dataset="none", compute_dtype="float32", device=cpu_name())
    pack = Pack(
        id="p",
        sweep="s",
        model=ref,
        items=((Cell(model=ref, quant=QuantSpec(bits=16)), (spec, here)),),
        seconds=1,
        item_seconds=(1,),
    )
    # As it comes to a worker.
    pack = Pack.from_dict(pack.to_dict())
    store = Store(out=tmp_path)
    worker = Worker(store=store, device="cpu", batch_tokens=1024, provenance={}, emit=lambda _: None)
    worker.run_pack(pack)
    rows = {row["eval"]: row for row in store.read().to_pylist()}
    assert rows["here"]["status"] == "done"
    refused = rows["prefill"]
    assert (refused["status"], refused["error_type"]) == ("failed", "OtherDeviceError")
    assert "'NVIDIA H200'" in refused["error"]
    assert cpu_name() in refused["error"]
    assert not refused["metrics"]


def test_the_device_of_jobs_must_be_named_at_launch() -> None:
    assert chosen({"name": "slurm", "gpu_type": "a100", "device": "cuda"}).device_name() == "a100"
    assert chosen({"name": "local", "device": "cpu", "batch_tokens": "auto"}).device_name() == cpu_name()
    for unnamed in ({"gpu_type": None, "device": "cuda"}, {"gpu_type": "a", "device": "cpu"}):
        with pytest.raises(UserError, match=r"executor\.gpu_type=.*Give executor\.gpu_type=TYPE"):
            chosen({"name": "slurm", **unnamed}).device_name()


@pytest.mark.parametrize(
    ("visible", "names", "found"),
    [
        (None, ["NVIDIA H100 PCIe", "NVIDIA H100 PCIe"], "NVIDIA H100 PCIe"),
        ("1, 2", ["NVIDIA A10"], "NVIDIA A10"),
        (None, ["NVIDIA A10", "NVIDIA T4"], None),
        (None, [], None),
    ],
)
def test_the_gpu_here_is_named_without_torch_where_all_are_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str], found: str | None
) -> None:
    said = tmp_path / "nvidia-smi"
    lines = "".join(f"echo '{name}'\n" for name in names)
    said.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n{lines}')
    said.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if found is None:
        with pytest.raises(UserError, match=r"CUDA_VISIBLE_DEVICES=None is not valid.*Set it to GPUs of one kind"):
            local_device_name("cuda")
        return
    assert local_device_name("cuda") == found
    assert ("-i 1,2 " in (tmp_path / "asked").read_text()) == (visible is not None)


@pytest.mark.parametrize(
    ("named", "actual", "same"),
    [
        ("a100", "NVIDIA A100-SXM4-80GB", True),
        ("a100_80gb", "NVIDIA A100-SXM4-80GB", True),
        ("a10", "NVIDIA A100-SXM4-80GB", False),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3", True),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", False),
    ],
)
def test_a_type_of_gpus_stands_for_the_devices_that_have_its_words(named: str, actual: str, same: bool) -> None:
    assert is_device(named, actual) == same


def test_without_the_package_the_kind_is_refused_and_the_metric_never_ranked(
    study: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    refused = run(tmp_path, KINDS)
    assert refused.returncode == 2
    assert "eval.kinds='entropy' is not valid: one of perplexity, task" in refused.stderr
    wide = pd.read_csv(study[0] / "tables" / "demo.csv")
    column = "jargon_entropy_uncertainty"
    metric = parse_metric(column, wide)
    assert (metric.eval, metric.higher_is_better) == ("jargon_entropy", None)
    assert "**" not in to_markdown(bits_by_dtype(wide, metric=column), metric=metric)


def test_a_direction_that_only_a_task_declares_is_carried_and_one_that_nobody_declares_is_named(
    tmp_path: Path,
) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "own.yaml").write_text(TASK % (DEMO_DIR / "text" / "jargon_choice.jsonl"))
    quant = "sweep.quant=[{bits: 16}, {bits: 4, dtype: [int, float]}]"
    own = f"eval.task_dirs=[{tasks}]"
    done = run(tmp_path, "eval.perplexity=[]", "eval.tasks=[own_choice]", own, "eval.limit=10", quant, "report=false")
    assert done.returncode == 0, done.stdout + done.stderr
    wide = load_results(tmp_path / "r")
    found = {m.column: m for m in metric_columns(wide)}
    assert found["own_choice_acc"].higher_is_better
    assert "own_choice_acc_higher_is_better" not in wide
    assert found["own_choice_acc_bytes"].higher_is_better
    assert not direction_warnings(wide)
    # An older store has no such column.
    old = wide[[c for c in wide.columns if not c.endswith("_higher_is_better") and c != "own_choice_acc"]]
    (metric,) = headline_metrics(old)
    assert (metric.column, metric.eval, metric.higher_is_better) == ("own_choice_acc_bytes", "own_choice", None)
    (warning,) = direction_warnings(old)
    assert warning.startswith("own_choice_acc_bytes: shown, but not ranked or compared")
    shown = to_markdown(bits_by_dtype(old, metric=metric), metric=metric)
    assert "not ranked" in shown
    assert "**" not in shown
    assert f"{wide['own_choice_acc_bytes'].iloc[0]:.3f}" in shown
    with pytest.raises(ValueError, match="can't be ranked"):
        _ = metric.sign
