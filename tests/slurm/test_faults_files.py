"""What file systems do to a study: links that lead elsewhere, no writing for a while, no room for temporary files."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.slurm.faults import TINY, TINY_CELLS, attempts, fill, freeze, resume, side_by_side, states, wait_process
from tests.slurm.studies import Study

HELD = (*TINY, "executor.extra={hold: true}")


def linked(study: Study, name: str) -> Path:
    """Have ``out`` lead to a directory, made where it is missing."""
    directory = study.home / name
    directory.mkdir(exist_ok=True)
    study.out.unlink(missing_ok=True)
    study.out.symlink_to(name)
    return directory


@side_by_side
def test_a_link_to_the_results_that_leads_elsewhere_while_a_job_runs(study: Study) -> str:
    first = linked(study, "first")
    study.submit(*TINY)
    worker = freeze(study)
    second = linked(study, "second")
    worker.continue_()
    name = study.cluster.command("squeue", "--noheader", "--format=%j", f"--jobs={worker.job}").strip()
    study.wait(lambda: not study.cluster.command("squeue", "--noheader", "--name", name).strip())
    assert list(second.rglob("*.rows")) == []
    logs = "\n".join(p.read_text() for p in first.glob("logs/*/*/*log*"))
    assert f"{study.out}" in logs
    assert "it is not the directory in which this work began" in logs
    linked(study, "first")
    return resume(study, *TINY, twice=1)


@side_by_side
def test_a_link_to_the_results_that_leads_elsewhere_when_a_job_starts(study: Study) -> str:
    linked(study, "first")
    launch = study.submit(*HELD)
    (job,) = (launch.submitted() or {}).values()
    second = linked(study, "second")
    study.cluster.command("scontrol", "release", job)
    study.wait(lambda: not study.cluster.command("squeue", "--noheader", "--name", launch.chunk_name(0)).strip())
    assert list(second.iterdir()) == []
    linked(study, "first")
    assert states(study) == {"lost": TINY_CELLS}
    return resume(study, *TINY)


@side_by_side
def test_a_link_to_the_results_that_leads_nowhere(study: Study) -> str:
    study.out.symlink_to("nowhere")
    for mode in ("run", "status", "cancel"):
        refused = study.launch(f"mode={mode}", *TINY)
        assert refused.returncode == 2
        assert "is a link to nowhere, which does not exist: is its file system mounted?" in refused.stdout
    assert study.cluster.command("squeue", "--noheader", "--all", "--format=%Z").find(str(study.home)) < 0
    return "refused by each mode"


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Have every new look at a directory find it read-only, as after an error of its file system."""
    mounted = subprocess.run(["mount", "--bind", directory, directory], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mount is not permitted here: {mounted.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", directory], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


@side_by_side
def test_results_read_only_for_a_while(study: Study) -> str:
    """Between two measurements nothing is lost; when one is to be stored, the job ends with it."""
    study.submit(*TINY)
    # Before the first: what is open stays writable under this mount, other than where a file system has an error.
    worker = freeze(study, stored=False)
    with read_only(study.out):
        refused = study.launch(*TINY)
        assert refused.returncode == 2
        assert f"can't be written: Read-only file system: {study.out}" in refused.stdout
        assert states(study).get("lost", 0) == 0
    assert len(attempts(study)) == 1
    done = len(study.row_ids())
    with read_only(study.out):
        worker.continue_()
        study.wait_idle()
        assert f"{TINY_CELLS - done} lost: " in study.launch("mode=status").stdout
    return resume(study, *TINY, twice=1)


@side_by_side
def test_cancelled_while_the_results_are_read_only(study: Study) -> str:
    """A directory that can't be written is no reason to let jobs go on."""
    study.submit(*TINY)
    worker = freeze(study)
    with read_only(study.out):
        cancelled = study.launch("mode=cancel")
        assert cancelled.returncode == 0, cancelled.stdout
        assert "Cancelling 1 job of demo: 1 running" in cancelled.stdout
        assert "can't be written (Read-only file system)" in cancelled.stdout
        worker.continue_()
        study.wait_idle()
    assert states(study).get("cancelled", 0) >= 1
    return resume(study, *TINY, twice=1)


@side_by_side
def test_no_room_for_temporary_files(study: Study) -> str:
    """On the submit host and on nodes: the next of the system's temporary directories is taken."""
    full = study.home / "full"
    full.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mount is not permitted here: {mounted.stderr.decode().strip()}")
    try:
        fill(full / "ballast")
        said = study.start(*TINY, "executor.preflight=true", env={"TMPDIR": str(full)}).communicate(timeout=120)[0]
        assert "1 job submitted" in said, said
        study.wait_idle()
        assert [p.name for p in full.iterdir()] == ["ballast"]
        return resume(study, *TINY)
    finally:
        study.cancel_all()
        subprocess.run(["umount", "--lazy", str(full)], check=True)


@pytest.mark.slow
@side_by_side
def test_accounting_purged(study: Study) -> str:
    """SLURM forgets an ended job after a minute (MinJobAge), and accounting has no record of it any more."""
    args = (*TINY, "executor.cells_per_job=2")
    launch = study.submit(*args)
    worker = freeze(study)
    study.wait(lambda: len(attempts(study)) == TINY_CELLS // 2)
    wait_process(study, "supervisor", job=worker.job).kill()
    study.wait_idle()
    name = launch.chunk_name(0)
    study.wait(lambda: not study.cluster.command("squeue", "--noheader", "--states=all", "--name", name).strip())
    study.cluster.purge_accounting(name)
    assert study.cluster.command("sacct", "-X", "-n", "--name", name).strip() == ""
    done = len(study.row_ids())
    assert states(study).get("lost", 0) == 0, "one look is not enough"
    figures = resume(study, *args)
    assert len(attempts(study)) == TINY_CELLS // 2 + 1
    return f"{done} done when SLURM forgot them; {figures}"


@pytest.mark.slow
@side_by_side
def test_accounting_stopped_in_the_middle_of_a_study(study: Study) -> Iterator[str]:
    """Launches, jobs and what is said of them go on without it."""
    study.submit(*HELD)
    study.cluster.stop_accounting()
    try:
        said = study.launch("mode=status").stdout
        assert "sacct failed" in said
        study.release()
        study.wait_idle()
        assert states(study) == {"done": TINY_CELLS}
        more = (*TINY, "sweep.quant=[{bits: [3, 4, 5], dtype: [int, float, quantile]}]")
        assert "1 job submitted for 3 cells" in study.launch(*more).stdout
        study.wait_idle()
    finally:
        study.cluster.start_accounting()
    yield "from here on beside the others"
    study.assert_whole(cells=9)
    yield f"computed twice: {study.computed_twice()}"


@side_by_side
def test_out_that_is_a_relative_link_or_path(study: Study) -> str:
    directory = study.home / "deep" / "results"
    directory.mkdir(parents=True)
    study.out.symlink_to("deep/results")
    beside = replace(study, home=study.home / "elsewhere")
    beside.home.mkdir()
    launched = beside.run(*TINY, "out=../results")
    assert launched.returncode == 0, launched.stderr
    study.wait_idle()
    study.assert_whole(cells=TINY_CELLS)
    assert list(beside.home.iterdir()) == []
    assert len(list(directory.glob("parts/*.rows"))) == 1
    return f"computed twice: {study.computed_twice()}"
