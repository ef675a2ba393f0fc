"""An executor of another package: an entry point, its settings and a YAML file, and nothing of ours is edited."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeps import load_results
from tests.conftest import ROOT, Launch
from tests.forks import forking
from tests.sweeps.commands.test_run import SMALL

MODULE = '''
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sweeps.executors.base import Executor
from sweeps.executors.settings import ExecutorSettings


@dataclass(frozen=True, kw_only=True)
class OneByOneSettings(ExecutorSettings):
    greeting: str = "hello"
    pauses: int | None = None


@dataclass(frozen=True)
class OneByOne(Executor[OneByOneSettings]):
    """Runs packs one by one, each in a worker of its own."""

    name: ClassVar[str] = "one_by_one"
    title: ClassVar[str] = "one by one"
    Settings: ClassVar[type[ExecutorSettings]] = OneByOneSettings

    def device(self):
        return "cpu"

    def describe(self, order, flight):
        from sweeps.plan.packs import Packing

        plan = order.plan(Packing(cells=5), flight)
        return plan, [("one by one", f"{len(plan.packs)} packs")]

    def run(self, order):
        from sweeps.launches.claimer import Claimer, launch_provenance, new_launch
        from sweeps.launches.claims import Claims
        from sweeps.plan.packs import Packing
        from sweeps.worker.devices import Workers
        from sweeps.worker.execution import Execution, worker_log
        from sweeps.worker.settings import WorkerSettings

        launch = new_launch()
        plan, claim = Claimer(
            store=order.store, manifest=order.manifest, retry=order.options.retry, packing=Packing(cells=5),
            device=order.device, executor="local", launch=launch,
        ).claim()
        if claim is None:
            order.console.print("nothing to do one by one")
            return 0
        claims = Claims(out=order.store.out)
        order.console.print(f"{self.settings.greeting}: {len(plan.packs)} packs, {self.settings.pauses} pauses")
        for pack in plan.packs:
            Execution(
                packs=[pack], store=order.store, workers=Workers(device="cpu", count=1, threads=1),
                settings=WorkerSettings(
                    batch_tokens=1024, trust_remote_code=False,
                    provenance=launch_provenance(launch, order.manifest.name),
                ),
                tracking=order.options.tracking, log=worker_log(order.store.out / "logs" / launch),
                beat=lambda running: claims.heartbeat(claim, running), on_event=lambda event, worker: None, warn=print,
            ).run()
        claims.release(claim)
        return 0
'''

YAML = """# @package executor
name: one_by_one
device: cpu
batch_tokens: auto
greeting: good morning
pauses: null
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("package")


@pytest.fixture(scope="module")
def package(home: Path) -> Path:
    """A package as pip would have installed it; returns the directory of its configuration files."""
    site, conf = home / "site", home / "conf"
    info = site / "one_by_one-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: one-by-one\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kbit_sweep.executors]\none_by_one = one_by_one:OneByOne\n")
    (site / "one_by_one.py").write_text(MODULE)
    (conf / "executor").mkdir(parents=True)
    (conf / "executor" / "one_by_one.yaml").write_text(YAML)
    return conf


@pytest.fixture(scope="module")
def launch(home: Path, package: Path) -> Iterator[Launch]:
    """The command where the package is installed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(home / "site"), str(ROOT)]), "COLUMNS": "200"}
    with forking(env=environment) as forks:
        yield lambda *args: forks.run(*args, cwd=home, env=environment)


def test_another_packages_executor_runs_a_study(package: Path, launch: Launch, tmp_path: Path) -> None:
    study = [f"out={tmp_path}/results", *SMALL[:-1], "sweep.quant=[{bits: 16}, {bits: [3, 4, 5], dtype: [int, float]}]"]
    args = ["--config-dir", str(package), "executor=one_by_one", *study]
    planned = launch(*args, "mode=plan")
    assert planned.returncode == 0, planned.stderr
    assert "one by one  2 packs" in planned.stdout
    ran = launch(*args, "executor.pauses=2")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "good morning: 2 packs, 2 pauses" in ran.stdout
    results = load_results(tmp_path / "results")
    assert (len(results), set(results["status"])) == (7, {"done"})
    assert "nothing to do one by one" in launch(*args).stdout
    # Another executor finds the same done.
    assert "nothing to do" in launch(*study, "report=false").stdout


def test_its_keys_are_checked_as_ours_are(package: Path, launch: Launch) -> None:
    conf = ["--config-dir", str(package)]
    for args, expected in [
        (["executor=one_by_one", "executor.pauses=many"], "executor.pauses=many is not valid"),
        (["executor=one_by_one", "executor.paused=1"], "Did you mean executor.pauses"),
        (["executor=one_by_one", "executor.workers=1"], "executor.workers is a key of executor=local"),
        (["executor.greeting=hi"], "executor.greeting is a key of executor=one_by_one"),
        (["executor=one_by_one", "mode=plan", "script=true"], "executor=one_by_one sends no scripts"),
        (
            ["executor=one_by_one", "budget=2"],
            "budget=2 is not valid with executor=one_by_one, which does not keep one",
        ),
        (["executor.name=one_by_two"], "one of local, slurm, one_by_one. Did you mean one_by_one?"),
    ]:
        result = launch(*conf, *args)
        assert (result.returncode, result.stdout) == (2, ""), args
        assert expected in result.stderr
