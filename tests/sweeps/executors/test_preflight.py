"""Setup errors are found by one short job: each problem provoked, one line each, and the rest checked all the same."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download

from kbit.calibration import Calibration
from kbit.evaluation.spec import EvalSpec
from kbit.sources import HubData, LocalFile, TaskSource, documents_of
from sweeps.config import DEMO_DIR
from sweeps.executors.slurm.node import preflight
from sweeps.executors.slurm.node.preflight import Preflight
from sweeps.study import hub
from sweeps.study.cell import ModelRef
from tests.conftest import ROOT
from tests.sweeps.study.test_hub import COMMIT, HubServer, write_model

TASK = DEMO_DIR / "tasks" / "jargon_choice.yaml"


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def sound(tmp_path: Path) -> Preflight:
    """A study of a local model on a local text and a task, launched a moment ago; everything is as it should be."""
    out, model, text = tmp_path / "out", tmp_path / "neox-xs", tmp_path / "text.jsonl"
    out.mkdir()
    marker = out / "launched"
    marker.write_bytes(b"")
    shutil.copytree(DEMO_DIR / "models" / "neox-xs", model)
    shutil.copy(DEMO_DIR / "text" / "jargon.jsonl", text)
    source = LocalFile(path=str(text), sha256=hashlib.sha256(text.read_bytes()).hexdigest())
    task = TaskSource(task_file=str(TASK), documents=source)
    local = hub.local_model(model)
    evals = (
        EvalSpec(kind="perplexity", name="text", dataset="x", compute_dtype="float32", window=512, source=source),
        EvalSpec(kind="task", name="choice", dataset="x", compute_dtype="float32", source=task),
    )
    return Preflight(
        out=out,
        device="cpu",
        gpus=0,
        models=(ModelRef(family="neox", name="neox-xs", path=str(model), weights_hash=local.content_hash),),
        evals=evals,
        launched=time.time(),
        store_launched=marker.stat().st_mtime,
    )


def only_problem(case: Preflight) -> str:
    (problem,) = case.problems()
    assert "\n" not in problem
    return problem


def test_a_sound_setup_has_no_problems_and_says_what_it_checked(
    sound: Preflight, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sound.problems() == []
    lines = capsys.readouterr().out.splitlines()
    assert {line[:5].strip() for line in lines} <= {"node", "ok", "note"}
    for said in (
        "torch 2",
        "transformers 5",
        "lm_eval",
        "sweeps.worker.worker",
        "model neox-xs",
        "eval text",
        "eval choice",
    ):
        assert any(line.startswith(f"ok   {said}") for line in lines), said
    assert any(line.startswith(f"ok   store {sound.out}") for line in lines)
    assert lines[-1].startswith("ok   clock")
    assert [p.name for p in sound.out.iterdir()] == ["launched"]


def test_every_problem_is_told_not_only_the_first(sound: Preflight, capsys: pytest.CaptureFixture[str]) -> None:
    Path(documents_of(sound.evals[0].source).path).unlink()
    gone = replace(sound.models[0], path=str(sound.out / "gone"))
    case = replace(sound, models=(gone, *sound.models), launched=time.time() + 86400, out=sound.out / "launched" / "x")
    problems = case.problems()
    assert len(problems) == 5  # the model, both evaluations, the store, the clock
    lines = capsys.readouterr().out.splitlines()
    assert [line[5:] for line in lines if line.startswith("FAIL")] == problems
    assert any(line.startswith("ok   model neox-xs") for line in lines)


@pytest.mark.parametrize("module", ["torch", "lm_eval", "transformers"])
def test_a_missing_package_is_named_with_the_python_that_lacks_it(tmp_path: Path, module: str) -> None:
    code = f"""
import sys, time
from importlib.abc import MetaPathFinder
from pathlib import Path
class Missing(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}: raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from kbit.sources import TaskSource
from kbit.evaluation.spec import EvalSpec
from sweeps.executors.slurm.node.preflight import Preflight
task = EvalSpec(kind="task", name="t", dataset="x", compute_dtype="float32", source=TaskSource(task_file={str(TASK)!r}))
now = time.time()
case = Preflight(out=Path({str(tmp_path)!r}), device="cuda", gpus=1, models=(), evals=(task,), launched=now,
                 store_launched=now)
for problem in case.problems(): print("PROBLEM", problem)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    found = [line for line in result.stdout.splitlines() if line.startswith("PROBLEM")]
    named = [line for line in found if f"No module named '{module}'" in line]
    assert named, result.stdout + result.stderr
    assert sys.executable in named[0]
    assert "executor.setup" in named[0]
    assert "ok   clock" in result.stdout


def test_gpus_that_are_not_there(sound: Preflight) -> None:
    problem = only_problem(replace(sound, device="cuda", gpus=1000))
    assert "executor.device=cuda with 1000 GPU(s) a job, but torch sees" in problem
    assert "executor.partition" in problem


def test_a_model_that_is_missing_or_changed(sound: Preflight) -> None:
    path = Path(str(sound.models[0].path))
    (path / "tokenizer_config.json").write_text("{}")
    assert "neox-xs has changed since the study was launched: launch it again" in only_problem(sound)
    (path / "model.safetensors").unlink()
    assert "is not a usable model" in only_problem(sound)
    shutil.rmtree(path)
    problem = only_problem(sound)
    assert "is not a directory" in problem
    assert "compute nodes share" in problem


def test_data_that_are_missing_or_changed(sound: Preflight) -> None:
    text, choice = sound.evals
    case = replace(sound, evals=(text,))
    data = Path(documents_of(text.source).path)
    data.write_text(data.read_text() + '{"text": "more"}\n')
    assert "text.jsonl changed since the study was launched" in only_problem(case)
    data.unlink()
    assert "text.jsonl can't be read" in only_problem(case)
    gone = replace(choice, source=TaskSource(task_file=str(sound.out / "gone.yaml")))
    assert "gone.yaml can't be read" in only_problem(replace(sound, evals=(gone,)))


def test_calibration_data_are_checked_as_those_of_evaluations_are(
    sound: Preflight, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "calibration.jsonl"
    shutil.copy(DEMO_DIR / "text" / "jargon.jsonl", text)
    source = LocalFile(path=str(text), sha256=hashlib.sha256(text.read_bytes()).hexdigest())
    case = replace(sound, calibrations=(Calibration(name="mine", dataset="x", source=source),))
    assert case.problems() == []
    assert f"ok   calibration mine: {text}" in capsys.readouterr().out
    text.write_text('{"text": "another"}\n')
    assert only_problem(case).startswith(f"calibration mine: {text} changed since the study was launched")


def test_a_store_that_is_not_there_is_not_made(sound: Preflight) -> None:
    missing = sound.out / "not mounted"
    problem = only_problem(replace(sound, out=missing))
    assert "is not there" in problem
    assert "login and compute nodes share" in problem
    assert not missing.exists()
    assert "is not there" in only_problem(replace(sound, out=sound.out / "launched" / "below a file"))


@pytest.mark.parametrize(
    ("options", "before", "said"),
    [("size=8m", "", "MB left: free at least"), ("size=1m", "head -c 2000000 /dev/zero > $1/full", "No space left")],
)
def test_a_store_that_is_full_or_nearly_so(tmp_path: Path, options: str, before: str, said: str) -> None:
    code = (
        "import sys, time, os; from pathlib import Path; from sweeps.executors.slurm.node.preflight import Preflight\n"
        "case = Preflight(out=Path(sys.argv[1]), device='cpu', gpus=0, models=(), evals=(),\n"
        "                 launched=time.time(), store_launched=time.time())\n"
        "for problem in case.problems(): print('PROBLEM', problem)"
    )
    mount = f'mount -t tmpfs -o {options} none $1 || exit 77; {before or ":"} 2>/dev/null; $2 -c "$3" $1'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh", tmp_path, sys.executable, code]
    if shutil.which("unshare") is None or subprocess.run([*command[:3], "true"], check=False).returncode:
        pytest.skip("this machine lets nobody mount a small file system (unshare --mount)")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode == 77:
        pytest.skip(f"no tmpfs can be mounted: {result.stderr.strip()}")
    found = [line for line in result.stdout.splitlines() if line.startswith("PROBLEM")]
    assert len(found) == 1, result.stdout + result.stderr
    assert said in found[0]


def test_clocks_that_do_not_agree(sound: Preflight, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = 3 * 86400.0  # in the queue: no problem
    assert (
        replace(sound, launched=sound.launched - waited, store_launched=sound.store_launched - waited).problems() == []
    )
    ahead = replace(sound, launched=sound.launched - 3600)
    assert "60 minutes ahead of the login node's" in only_problem(ahead)
    future = replace(sound, launched=sound.launched + 7200, store_launched=sound.store_launched + 7200)
    assert "the study is launched in 120 minutes" in only_problem(future)
    real = time.time
    monkeypatch.setattr(preflight.time, "time", lambda: real() - 3600)
    assert "60 minutes behind the store's" in only_problem(sound)


HUB_MODEL = ModelRef(family="f", name="name", hub_id="owner/name", commit=COMMIT)


def test_a_hub_model_in_the_cache_must_be_whole(sound: Preflight, tmp_path: Path) -> None:
    case = replace(sound, models=(HUB_MODEL,))
    problem = only_problem(case)
    assert "owner/name" in problem
    assert "HF_HUB_OFFLINE is set" in problem
    assert "mode=fetch" in problem
    cached = write_model(tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT)
    assert case.problems() == []
    weights = (cached / "model.safetensors").read_bytes()
    (cached / "model.safetensors").write_bytes(weights[:-3])
    problem = only_problem(case)
    assert "fetch it again" in problem
    assert "mode=fetch" in problem


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that is reachable and has owner/name, a model, at COMMIT."""
    write_model(tmp_path / "served")
    server = HubServer(tmp_path / "served")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for module in (constants, file_download):
        url = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", url, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_a_hub_model_outside_the_cache_must_be_to_be_had(sound: Preflight, server: HubServer) -> None:
    assert replace(sound, models=(HUB_MODEL,)).problems() == []
    problem = only_problem(replace(sound, models=(replace(HUB_MODEL, commit="0" * 40),)))
    assert "could not be fetched from the hub" in problem
    assert "mode=fetch" in problem


def test_hub_data_outside_the_cache_must_be_to_be_had(sound: Preflight, server: HubServer) -> None:
    source = HubData(hub="owner/name", revision=COMMIT)
    spec = EvalSpec(kind="perplexity", name="far", dataset="x", compute_dtype="float32", window=512, source=source)
    case = replace(sound, evals=(spec,))
    problem = only_problem(case)  # the server has no data set of that commit
    assert "eval far (owner/name@" in problem
    assert "could not be fetched from the hub" in problem
