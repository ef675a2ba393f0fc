"""More of what a cluster does: false silence, stray signals, moved directories, odd clients; as in test_faults."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from sweeps.executors.slurm.query.reconcile import ABSENT_SECONDS
from sweeps.launches.claims import Claims
from sweeps.worker.pool import BEAT_SECONDS
from tests.slurm.faults import (
    TINY,
    TINY_CELLS,
    attempts,
    counts_of,
    freeze,
    measuring,
    odd_answers,
    records,
    resume,
    side_by_side,
    states,
    wait_process,
)
from tests.slurm.studies import Study

HELD = (*TINY, "executor.extra={hold: true}")


def job_of(study: Study) -> str:
    (launch,) = study.launches()
    return next(iter((launch.submitted() or {}).values()))


@side_by_side
def test_a_job_that_failed_and_was_requeued_by_hand(study: Study) -> str:
    study.submit(*TINY)
    freeze(study)
    wait_process(study, "supervisor").kill()
    study.wait_idle()
    assert states(study).get("lost", 0) >= 1
    job = job_of(study)
    study.cluster.command("scontrol", "requeuehold", job)
    assert states(study).get("lost", 0) == 0
    again = study.launch(*TINY)
    assert "nothing to submit" in again.stdout
    cancelled = study.launch("mode=cancel")
    assert "Cancelling 1 job of demo" in cancelled.stdout
    study.wait_idle()
    assert states(study).get("cancelled", 0) >= 1
    return resume(study, *TINY)


@side_by_side
def test_a_queue_that_shows_nothing_while_a_job_works(study: Study) -> str:
    """As a site's caching wrapper does: what the job writes down is proof of its life."""
    study.submit(*TINY)
    worker = freeze(study)
    empty = odd_answers(study.home / "empty", squeue="> /dev/null", sacct="> /dev/null")
    began = time.monotonic()
    while time.monotonic() - began < ABSENT_SECONDS + 15:
        said = study.start("mode=status", env=empty).communicate(timeout=120)[0]
        assert counts_of(study).get("lost", 0) == 0, said
        time.sleep(3)
    worker.continue_()
    study.wait_idle()
    assert len(attempts(study)) == 1
    return resume(study, *TINY)


@side_by_side
def test_a_stray_sigusr2(study: Study) -> str:
    study.submit(*TINY)
    worker = freeze(study)
    wait_process(study, "supervisor").kill(signal.SIGUSR2)
    time.sleep(2)
    worker.continue_()
    study.wait_idle()
    (attempt,) = attempts(study)
    assert attempt.end is not None
    assert attempt.end["reason"] == "finished"
    assert records(study) == ["COMPLETED"]
    assert "SLURM does not say that this job ends: going on" in "\n".join(
        p.read_text() for p in study.out.glob("logs/*/*/*_log.out")
    )
    return resume(study, *TINY)


@side_by_side
def test_a_stray_sigterm(study: Study) -> str:
    """The job ends after the measurement in flight, and does not keep its node for half an hour."""
    study.submit(*TINY)
    worker = freeze(study)
    began = time.monotonic()
    wait_process(study, "supervisor").kill(signal.SIGTERM)
    worker.continue_()
    study.wait_idle()
    assert time.monotonic() - began < 90
    return resume(study, *TINY)


@side_by_side
def test_a_later_launch_that_takes_over_some_of_a_running_jobs_work(study: Study) -> str:
    """The job looks at later claims while it works, and leaves them alone."""
    launch = study.submit(*TINY)
    worker = freeze(study)
    (pack,) = launch.places
    begun = {*study.row_ids(), measuring(study)}
    theirs = [m.key for m in launch.pack(pack).measurements() if m.key not in begun][-2:]
    claims = Claims(out=study.out)
    claim = claims.create(claims.last_number() + 1, launch="later", sweep="demo", packs={"x": theirs})
    time.sleep(1.5 * BEAT_SECONDS)
    worker.continue_()
    study.wait_idle()
    assert len(study.row_ids()) == TINY_CELLS - len(theirs)
    assert not set(theirs) & set(study.row_ids())
    claims.release(claim)
    return resume(study, *TINY)


@side_by_side
def test_results_directory_renamed_while_a_job_runs(study: Study) -> str:
    study.submit(*TINY)
    worker = freeze(study)
    moved = study.home / "moved"
    study.out.rename(moved)
    worker.continue_()
    study.wait(lambda: records_end(study, moved))
    assert not study.out.exists()
    logs = "\n".join(p.read_text() for p in moved.glob("logs/*/*/*log*"))
    assert f"{study.out}" in logs
    assert "it is gone: was it renamed" in logs
    moved.rename(study.out)
    return resume(study, *TINY, twice=1)


def records_end(study: Study, moved: Path) -> bool:
    """Whether no job of the launch is in the queue any more; its files have moved."""
    (launch,) = (p.name for p in (moved / "launches").iterdir())
    return not study.cluster.command("squeue", "--noheader", "--name", f"kbit-{launch}-0", "--format", "%i").strip()


@side_by_side
def test_data_that_change_after_the_launch(study: Study) -> str:
    text = study.home / "mine.txt"
    original = "The quick brown fox jumps over the lazy dog. " * 3000
    text.write_text(original)
    mine = f"eval.perplexity=[{text}]"
    study.submit(*HELD, mine)
    text.write_text(original + "More.")
    study.release()
    study.wait_idle()
    said = study.launch("mode=status").stdout
    assert re.search(rf"{TINY_CELLS} cells can't run: .*{text}.* changed since the study was launched", said), said
    assert "failed" not in counts_of(study)
    text.write_text(original)
    again = study.launch(*TINY, mine)
    assert "1 job submitted" in again.stdout, again.stdout
    study.wait_idle()
    study.assert_whole(cells=TINY_CELLS)
    return "nothing recorded, and measured once the data were back"


@side_by_side
def test_a_preflight_that_cannot_start(study: Study) -> str:
    study.submit(*HELD, "executor.preflight=true")
    said = study.launch("mode=status").stdout
    assert re.search(r"the preflight is job \d+: pending for JobHeldUser", said), said
    study.release()
    study.wait_idle()
    return resume(study, *HELD, "executor.preflight=true")


@side_by_side
def test_a_damaged_claim(study: Study) -> str:
    """What it held is known from the launch's own files."""
    study.submit(*HELD)
    (claim,) = (study.out / "claims").glob("*.json")
    claim.write_text(claim.read_text()[:40])
    again = study.launch(*HELD)
    assert again.returncode == 0, again.stdout
    assert f"nothing to submit. {TINY_CELLS} in flight" in again.stdout
    assert "is damaged: what it held is taken from the files of launch" in again.stdout
    study.release()
    study.wait_idle()
    assert len(attempts(study)) == 1
    return resume(study, *HELD)


def wrapper(directory: Path, name: str, script: str) -> dict[str, str]:
    """For ``Study.start``: one of SLURM's clients in a script of a site's; REAL stands for the client."""
    directory.mkdir()
    path = directory / name
    path.write_text("#!/bin/sh\n" + script.replace("REAL", str(shutil.which(name))))
    path.chmod(0o755)
    return {"PATH": f"{directory}{os.pathsep}{os.environ['PATH']}"}


@side_by_side
def test_a_banner_around_sbatch_that_names_a_job(study: Study) -> str:
    banner = 'echo "Welcome. Since job 12 this cluster has a new file system."\nREAL "$@"\n'
    process = study.start(*HELD, env=wrapper(study.home / "bin", "sbatch", banner))
    said = process.communicate(timeout=120)[0]
    assert "1 job submitted" in said, said
    assert job_of(study) != "12"
    assert set(study.jobs()) == {job_of(study)}
    study.release()
    study.wait_idle()
    return resume(study, *HELD)


@side_by_side
def test_variables_of_the_user_that_sbatch_would_obey(study: Study) -> str:
    """They decide neither the check nor the submission, and both say so."""
    mine = {"SBATCH_PARTITION": "nowhere", "SLURM_CLUSTERS": "nowhere", "SQUEUE_STATES": "COMPLETED"}
    process = study.start(*HELD, env=mine)
    said = process.communicate(timeout=120)[0]
    assert "1 job submitted" in said, said
    assert "SBATCH_PARTITION, SLURM_CLUSTERS, SQUEUE_STATES" in said
    study.release()
    study.wait_idle()
    return resume(study, *HELD)


@side_by_side
def test_one_passing_failure_of_each_query(study: Study) -> str:
    fail = '[ -e "$0.failed" ] || { touch "$0.failed"; echo "Socket timed out on send/recv" >&2; exit 1; }'
    once = f'{fail}\nexec REAL "$@"\n'
    environment = {}
    for name in ("squeue", "scontrol", "sinfo", "sacctmgr"):
        found = wrapper(study.home / name, name, once)["PATH"].partition(os.pathsep)[0]
        environment["PATH"] = f"{found}{os.pathsep}{environment.get('PATH', os.environ['PATH'])}"
    said = study.start(*TINY, env=environment).communicate(timeout=120)[0]
    assert "1 job submitted" in said, said
    assert {p.name for p in study.home.glob("*/*.failed")} >= {"squeue.failed", "scontrol.failed", "sinfo.failed"}
    study.wait_idle()
    return resume(study, *TINY)


@pytest.mark.slow
@side_by_side
def test_an_sbatch_that_hangs_after_it_submitted(study: Study) -> str:
    hang = 'case "$*" in *--test-only*) exec REAL "$@";; esac\nREAL "$@" > /dev/null\nsleep 300\n'
    began = time.monotonic()
    said = study.start(*HELD, env=wrapper(study.home / "bin", "sbatch", hang)).communicate(timeout=200)[0]
    assert "1 job submitted" in said, said
    assert time.monotonic() - began < 120
    assert set(study.jobs()) == {job_of(study)}
    study.release()
    study.wait_idle()
    return resume(study, *HELD)
