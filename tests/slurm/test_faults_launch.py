"""Faults of launches and of what is known of jobs, on a real cluster; one resume repairs each, as in test_faults."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from sweeps import load_results
from sweeps.executors.slurm.query.reconcile import ABSENT_SECONDS
from tests.slurm.faults import (
    TINY,
    TINY_CELLS,
    HeldSbatch,
    attempts,
    counts_of,
    freeze,
    kill_launch,
    odd_answers,
    resume,
    side_by_side,
    states,
)
from tests.slurm.studies import Study


@pytest.mark.slow
@side_by_side
def test_the_controller_stopped(study: Study) -> Iterator[str]:
    """During a run; and during two launches, before anything was submitted and between preflight and array."""
    cluster = study.cluster
    running, early, between = (replace(study, home=study.home / name) for name in ("running", "early", "between"))
    for each in (running, early, between):
        each.home.mkdir()
    holds = [HeldSbatch(directory=study.home / name) for name in ("bin1", "bin2")]
    with_preflight = (*TINY, "executor.preflight=true")
    launched = [
        early.start(*TINY, env=holds[0].environment(submission=1, when="before")),
        between.start(*with_preflight, env=holds[1].environment(submission=2, when="before")),
    ]
    running.submit(*TINY)
    study.wait(lambda: all(hold.reached() for hold in holds))
    worker = freeze(running)
    cluster.stop_controller()
    try:
        for hold in holds:
            hold.let_go()
        worker.continue_()
        status, refused = running.start("mode=status"), running.start(*TINY)
        cut_off = [process.communicate(timeout=120)[0] for process in launched]
        assert [process.returncode for process in launched] == [1, 1]
        for text in cut_off:
            assert "Unable to contact slurm controller" in text
            assert "0 jobs were submitted; the same command submits the rest" in text
        said = status.communicate(timeout=120)[0]
        assert status.returncode == 0
        assert "squeue failed: Unable to contact slurm controller" in said
        assert "none is given up for that" in said
        assert not {"lost", "node_fail", "timeout"} & set(load_results(running.out)["status"])
        said = refused.communicate(timeout=120)[0]
        assert refused.returncode == 2
        assert "executor=slurm: the scheduler can't be asked" in said
        running.wait(lambda: attempts(running)[0].end)
        assert len(running.launches()) == 1
    finally:
        cluster.start_controller()
    # Until its nodes have registered, it takes them to be down, and launches are refused.
    study.wait(cluster.is_up)
    yield "from here on beside the others"
    running.wait_idle()
    figures = [f"while it ran: {resume(running, *TINY)}"]
    assert len(attempts(running)) == 1
    # Both wait until it is sure that SLURM does not know their jobs.
    began = time.monotonic()
    again = [early.start(*TINY), between.start(*with_preflight)]
    for process in again:
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 0, said
        assert "1 job submitted" in said
    figures.append(f"cut off: sure of it after {time.monotonic() - began:.0f} s")
    for each in (early, between):
        each.wait_idle()
        each.assert_whole(cells=TINY_CELLS)
        figures.append(f"{each.home.name}: computed twice: {each.computed_twice()}")
    yield "\n".join(figures)


@side_by_side
def test_login_node_dies_after_the_array_was_submitted(study: Study) -> str:
    """submitit has not handed over its pickles: the job takes its work from what the launch wrote before sbatch."""
    hold = HeldSbatch(directory=study.home / "bin")
    launched = study.start(*TINY, env=hold.environment(submission=1, when="after"))
    study.wait(hold.reached)
    kill_launch(launched)
    hold.let_go()
    (launch,) = study.launches()
    assert launch.submitted() is None
    again = study.launch(*TINY)
    assert f"nothing to submit. {TINY_CELLS} in flight" in again.stdout
    study.wait_idle()
    assert "the launcher died before it handed over" in next(launch.logs(0).glob("*_log.out")).read_text()
    assert len(attempts(study)) == 1
    return resume(study, *TINY)


@side_by_side
def test_login_node_dies_after_the_preflight_was_submitted(study: Study) -> str:
    args = (*TINY, "executor.preflight=true")
    hold = HeldSbatch(directory=study.home / "bin")
    launched = study.start(*args, env=hold.environment(submission=1, when="after"))
    study.wait(hold.reached)
    kill_launch(launched)
    hold.let_go()
    assert states(study) == {"queued": TINY_CELLS}
    figures = resume(study, *args)
    assert len(attempts(study)) == 1
    return figures


@side_by_side
def test_a_job_that_slurm_does_not_know(study: Study) -> str:
    """It is lost after two looks half a minute apart, until it is seen again; when it starts all the same, it finds its
    work taken over.
    """
    args = (*TINY, "executor.extra={hold: true}")
    study.submit(*args)
    mystery = odd_answers(study.home / "mystery", squeue="| sed s/PENDING/MYSTERY/", sacct="| sed s/PENDING/MYSTERY/")
    text, counts = look(study, mystery)
    assert counts == {"queued": TINY_CELLS}
    assert "SLURM jobs: 1 mystery" in text
    forgetful = odd_answers(study.home / "forgetful", squeue="> /dev/null", sacct="> /dev/null")
    for _ in range(2):
        text, counts = look(study, forgetful)
        assert counts == {"queued": TINY_CELLS}
        assert "absent: SLURM doesn't know them just now" in text
    silent = odd_answers(study.home / "silent", squeue="> /dev/null; exit 1")
    time.sleep(ABSENT_SECONDS)
    text, counts = look(study, silent)
    assert counts == {"queued": TINY_CELLS}
    assert "squeue failed" in text
    text, counts = look(study, forgetful)
    assert counts == {"lost": TINY_CELLS}
    known_again = study.launch(*args)
    assert f"nothing to submit. {TINY_CELLS} in flight" in known_again.stdout
    look(study, forgetful)
    time.sleep(ABSENT_SECONDS)
    again = study.start(*args, env=forgetful).communicate(timeout=120)[0]
    assert "1 job submitted" in again, again
    study.release()
    study.wait_idle()
    study.assert_whole(cells=TINY_CELLS)
    assert len(attempts(study)) == 2
    return f"computed twice: {study.computed_twice()}, by the job that was given up and the one in its place"


def look(study: Study, clients: dict[str, str]) -> tuple[str, dict[str, int]]:
    """(what mode=status prints, cells by state) after a look at SLURM through some clients."""
    process = study.start("mode=status", env=clients)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    return text, counts_of(study)


@side_by_side
def test_two_launches_at_once(study: Study) -> str:
    args = (*TINY, "executor.cells_per_job=3")
    both = [study.start(*args) for _ in range(2)]
    texts = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    assert sorted("2 jobs submitted" in text for text in texts) == [False, True]
    study.wait_idle()
    assert len(attempts(study)) == 2
    return resume(study, *args)
