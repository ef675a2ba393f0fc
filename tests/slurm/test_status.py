"""What a user is told: how a study does when parts of SLURM are away, why jobs never ran, why cells failed."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from dataclasses import dataclass

import pytest

from sweeps import load_results
from sweeps.config import DEMO_DIR
from tests.slurm.cluster import Cluster
from tests.slurm.processes import wait_until
from tests.slurm.studies import CELLS, Counted, Studies, Study

AT_ONCE = "executor.preflight=false"
HELD = "executor.extra={hold: true}"
TINY = ("sweep.quant=[{bits: 16}, {bits: 4, dtype: int}]", "executor.cells_per_job=1")
GATED = (AT_ONCE, "executor.baseline_gate=true", *TINY)
REFERENCE = "models.demo.members.neox-xs.reference={jargon_loss: %s}"


@pytest.fixture(scope="module")
def waiting(studies: Studies) -> Study:
    """A study whose jobs wait."""
    study = studies("waiting")
    done = study.run(HELD, AT_ONCE)
    assert done.returncode == 0, done.stderr
    return study


def states(study: Study) -> dict[str, int]:
    counts: dict[str, int] = load_results(study.out)["status"].value_counts().to_dict()
    return counts


def test_status_works_where_there_is_no_sacct(waiting: Study, counted: Counted) -> None:
    (counted.directory / "sacct").unlink()
    said = waiting.run("mode=status", env={"PATH": str(counted.directory)})
    assert said.returncode == 0, said.stderr
    assert "sacct is not on this machine" in said.stdout
    assert "SLURM jobs: 4 pending" in said.stdout
    assert "4 pending for JobHeldUser" in said.stdout


def test_status_works_while_accounting_is_down(waiting: Study, cluster: Cluster) -> None:
    cluster.stop_accounting()
    try:
        said = waiting.run("mode=status")
    finally:
        cluster.start_accounting()
    assert said.returncode == 0, said.stderr
    assert "sacct failed: " in said.stdout
    assert "SLURM jobs: 4 pending" in said.stdout


def test_a_controller_that_is_down_is_said_and_loses_nothing(waiting: Study, study: Study, cluster: Cluster) -> None:
    cluster.stop_controller()
    try:
        status = waiting.start("mode=status")
        cancel = waiting.start("mode=cancel")
        refused = study.run()
        said, _ = status.communicate(timeout=120)
        not_cancelled, _ = cancel.communicate(timeout=120)
    finally:
        cluster.start_controller()
        wait_until("nodes in service", cluster.is_up, 60)
    assert status.returncode == 0, said
    assert "Unable to contact slurm controller" in said
    assert "as they were when SLURM last answered; none is given up for that" in said
    assert "SLURM jobs: 4 pending" in said
    assert cancel.returncode == 2
    assert re.fullmatch(r"error: mode=cancel: squeue failed: .*Nothing was cancelled\n", not_cancelled)
    assert refused.returncode == 2
    assert re.fullmatch(r"error: executor=slurm: .*Unable to contact slurm controller.*\n", refused.stderr)
    assert not (study.out / "launches").exists()
    assert waiting.run("mode=status").returncode == 0
    assert states(waiting) == {"queued": CELLS}
    assert len(waiting.jobs()) == 4


def test_an_interrupted_watch_leaves_the_jobs_alone(waiting: Study) -> None:
    watcher = waiting.start(HELD, AT_ONCE, "watch=true")
    assert watcher.stdout is not None
    seen = next(line for line in watcher.stdout if "jobs: 4" in line)
    assert f"{CELLS} queued  |  jobs: 4 PENDING" in seen
    watcher.send_signal(signal.SIGINT)
    said, _ = watcher.communicate(timeout=30)
    assert watcher.returncode == 130
    assert "the jobs go on" in said
    assert len(waiting.jobs()) == 4


@dataclass(frozen=True, kw_only=True)
class Troubled:
    """Four studies that can't go well, all ended.

    Attributes:
        dead: not even Python starts in its jobs; watched says what its launch with watch=true did.
        gone: its model is gone when the preflight begins.
        broken: its model's tokenizer is damaged.
        gated: its baseline is not what the reference says.
    """

    dead: Study
    gone: Study
    broken: Study
    gated: Study
    watched: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def troubled(studies: Studies) -> Troubled:
    dead, gone, broken, gated = (studies(name) for name in ("dead", "gone", "broken", "gated"))
    for study in (gone, broken):
        shutil.copytree(DEMO_DIR / "models" / "neox-xs", study.home / "neox-copy")
    (broken.home / "neox-copy" / "tokenizer.json").write_text('{"model": "cut of')
    copied = ("path=neox-copy", "sweep.sizes=null")
    setup = 'executor.setup=["module() { echo no such module: $1; exit 3; }", "module cuda"]'
    watcher = dead.start(setup, "watch=true")
    launched = [gone.run(*copied, HELD), broken.run(*copied, AT_ONCE, TINY[0]), gated.run(*GATED, REFERENCE % 3.5)]
    assert [done.returncode for done in launched] == [0] * 3, launched
    shutil.rmtree(gone.home / "neox-copy")
    gone.release()
    for study in (gone, broken, gated):
        study.wait_idle()
    said, _ = watcher.communicate(timeout=120)
    watched = subprocess.CompletedProcess(watcher.args, watcher.returncode, said)
    return Troubled(dead=dead, gone=gone, broken=broken, gated=gated, watched=watched)


def test_watching_ends_and_says_why_when_nothing_can_run(troubled: Troubled) -> None:
    assert troubled.watched.returncode == 1
    assert re.search(rf"{CELLS} measurements can't run: the preflight died .*cuda", troubled.watched.stdout)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("dead", "the preflight died before it could say why; .* ends with: no such module: cuda"),
        ("gone", r"preflight: model neox-copy on \S+: .*neox-copy"),
    ],
)
def test_a_broken_setup_is_found_before_any_job_runs(troubled: Troubled, name: str, why: str) -> None:
    study: Study = getattr(troubled, name)
    status = study.run("mode=status")
    assert re.search(rf"{CELLS} cells can't run: {why}", status.stdout), status.stdout
    assert "Fix it, and run the same command again" in status.stdout
    logs = study.run("mode=logs")
    assert re.search(rf"never began: 4 cancelled.*{why}", logs.stdout, re.DOTALL), logs.stdout
    assert re.search(r"preflight-0/\d+_0_log.out:\n", logs.stdout)
    assert study.row_ids().empty
    assert states(study) == {"cancelled": CELLS}


def test_the_log_and_traceback_of_failed_cells_need_no_job_id(troubled: Troubled) -> None:
    study = troubled.broken
    status = study.run("mode=status")
    assert re.search(r"2 failed with \w+: mode=logs shows why", status.stdout)
    logs = study.run("mode=logs")
    assert logs.returncode == 0, logs.stderr
    assert logs.stdout.count("Traceback (most recent call last)") >= 1
    row = load_results(study.out, long=True).iloc[0]
    for log in ("0_log.out", "worker.log"):
        assert re.search(rf"{study.out}/logs/\w+/000/{row['job'].partition('/')[2]}_{log}", logs.stdout)
    chosen = study.run("mode=logs", f"cell={row['key'][:10]}").stdout
    assert chosen.count(row["key"][:10]) == 1
    assert len(chosen) < len(logs.stdout)


def test_quantized_cells_wait_for_a_right_baseline(troubled: Troubled) -> None:
    study = troubled.gated
    why = r"neox-xs is held back: its baseline's jargon_loss is 3\.9\d+, 12\.\d % off the reference 3\.5"
    status = study.run("mode=status").stdout
    assert re.search(rf"1 cell can't run: {why}", status), status
    assert re.search(why, study.run("mode=logs").stdout)
    assert states(study) == {"done": 1, "cancelled": 1}
    still = study.run(*GATED, REFERENCE % 3.5)
    assert still.returncode == 1
    assert re.search(why, still.stdout)
    assert len(study.launches()) == 1
    right = study.run(*GATED, REFERENCE % 3.94)
    assert "1 job submitted for 1 cell, " in right.stdout, right.stdout + right.stderr
    study.wait_idle()
    assert states(study) == {"done": 2}
    assert study.computed_twice() == 0
