"""What happens to jobs on a real cluster: after each fault one resume leaves every cell done, one row a measurement.

Scenarios wait side by side; figures are printed (pytest -rP). docs/faults.md is the table of what they show.
"""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import replace

import pytest

from sweeps import load_results
from tests.slurm.faults import (
    TINY,
    TINY_CELLS,
    attempts,
    fill,
    freeze,
    processes,
    records,
    resume,
    side_by_side,
    states,
    wait_measuring,
    wait_process,
)
from tests.slurm.studies import Study
from tests.sweeps.tracking.wandb_server import KEY, WandbServer, free_port

WALLTIME = (
    *TINY,
    "executor.time=2",
    "executor.signal_seconds=1",
    # Jobs of this partition are not preempted.
    "executor.partition=urgent",
    "executor.exclude='n1,n2,n3'",
)
"""SLURM warns such a job, and it begins no more cells, after a minute and a half."""


@pytest.mark.slow
@side_by_side
def test_nodes_taken_down(study: Study) -> str:
    """Two nodes, three studies: power lost, with and without requeueing, and a node whose processes live on."""
    cluster = study.cluster
    requeued, ended, alive = (replace(study, home=study.home / name) for name in ("requeued", "ended", "alive"))
    for each in (requeued, ended, alive):
        each.home.mkdir()
    on_n1 = (*TINY, "executor.exclude='n2,n3,n4'")
    on_n2 = (*TINY, "executor.exclude='n1,n3,n4'")
    either = (*TINY, "executor.exclude='n3,n4'", "executor.requeues=0")
    frozen = {}
    for each, args in ((ended, either), (requeued, on_n1), (alive, on_n2)):
        each.submit(*args)
        frozen[each] = freeze(each)
    done = len(ended.row_ids())
    assert [a.host for each in frozen for a in attempts(each)] == ["n1", "n1", "n2"]
    began = time.monotonic()
    try:
        cluster.stop_node("n1", with_jobs=True)
        cluster.stop_node("n2")
        alive.wait(lambda: alive.jobs() and not ended.jobs() and "RUNNING" not in {*alive.jobs().values()})
        noticed = time.monotonic() - began
        assert states(ended) == {"done": done, "node_fail": TINY_CELLS - done}
        # It comes back to life when SLURM has its job run elsewhere: nobody can tell it that it is not wanted any more.
        cluster.command("scontrol", "update", f"JobId={frozen[alive].job}", "ExcNodeList=n1,n2,n4")
        wait_measuring(alive, attempt=2)
        frozen[alive].continue_()
        alive.wait_idle()
        alive.wait(lambda: not processes(alive, "worker"))
        cluster.start_node("n2")
        again = resume(ended, *either)
        script = max(ended.launches()[-1].logs(0).glob("*_submission.sh")).read_text()
        assert set(script.partition("--exclude=")[2].splitlines()[0].split(",")) == {"n1", "n3", "n4"}
    finally:
        for name in ("n1", "n2"):
            cluster.start_node(name)
    figures = [f"noticed after {noticed:.0f} s; not requeued: {again}"]
    for each, args, twice in ((requeued, on_n1, 0), (alive, on_n2, TINY_CELLS)):
        each.wait_idle()
        figures.append(f"{each.home.name}: {resume(each, *args, twice=twice)}")
        assert records(each) == ["NODE_FAIL", "COMPLETED"]
    return "\n".join(figures)


@pytest.mark.slow
@side_by_side
def test_walltime_reached(study: Study) -> str:
    """The job puts itself back into the queue; a temporary file that a kill left in submitit's way is no obstacle."""
    args = (*WALLTIME, "executor.extra={hold: true}")
    launch = study.submit(*args)
    (job,) = study.jobs()
    stale = launch.logs(0) / f"{job}_submitted.pkl.save_tmp"
    stale.write_bytes(b"cut off")
    study.release()
    freeze(study)
    study.wait(lambda: attempts(study)[0].end is not None)
    study.wait_idle()
    assert not stale.exists()
    ends = [dict(a.end or {}) for a in attempts(study)]
    assert [e["reason"] for e in ends] == ["walltime"] * (len(ends) - 1) + ["finished"]
    assert all(e["requeued"] for e in ends[:-1])
    gap = attempts(study)[1].started - ends[0]["at"]
    return f"{len(ends) - 1} requeues, {gap:.0f} s until it ran again; {resume(study, *args)}"


@pytest.mark.slow
@side_by_side
def test_walltime_reached_without_a_requeue_left(study: Study) -> str:
    args = (*WALLTIME, "executor.requeues=0")
    study.submit(*args)
    freeze(study)
    study.wait_idle()
    done = len(study.row_ids())
    assert [dict(a.end or {})["reason"] for a in attempts(study)] == ["walltime"]
    assert states(study) == {"done": done, "timeout": TINY_CELLS - done}
    return resume(study, *args)


@pytest.mark.slow
@side_by_side
def test_killed_at_its_walltime(study: Study) -> str:
    """A job whose set-up hangs, once, can't hear a warning."""
    marker = study.home / "marker"
    hang = f"executor.setup=['[ -e {marker} ] || {{ touch {marker}; sleep 1000; }}']"
    args = (*WALLTIME, "executor.time=1", hang)
    study.submit(*args)
    study.wait_idle()
    assert records(study) == ["TIMEOUT"]
    assert attempts(study) == []
    assert states(study) == {"timeout": TINY_CELLS}
    # On a busy machine loading a model may take the minute.
    return resume(study, *args, "executor.time=5")


@pytest.mark.slow
@side_by_side
def test_the_batch_step_of_a_job_killed(study: Study) -> str:
    """kill -9 of slurmstepd: the job's processes go on, and SLURM, which misses it after a while, runs it again."""
    study.submit(*TINY)
    wait_measuring(study)
    os.kill(wait_process(study, "shell").parent(), 9)
    study.wait_idle()
    assert records(study) == ["NODE_FAIL", "COMPLETED"]
    assert [dict(a.end or {})["reason"] for a in attempts(study)] == ["finished", "finished"]
    return resume(study, *TINY)


@side_by_side
def test_a_cell_that_kills_its_jobs(study: Study) -> str:
    """It has three lives, then counts as failed, and the rest is done; 'retry=[failed]' gives it three more."""
    args = (*TINY, "sweep.quant=[{bits: [3, 4], dtype: int}]")
    killed = set()
    for number in (1, 2, 3):
        study.submit(*args)
        killed.add(wait_measuring(study, attempt=number, stored=False))
        wait_process(study, "supervisor").kill()
        study.wait_idle()
        assert len(study.row_ids()) == 0
    (poison,) = killed
    again = study.launch(*args)
    assert "3 jobs died of it; it counts as failed now" in again.stdout
    study.wait_idle()
    rows = load_results(study.out, long=True).set_index("measurement")
    assert rows["status"].to_dict() == {key: "failed" if key == poison else "done" for key in rows.index}
    assert rows.loc[poison, "error_type"] == "JobDied"
    assert "3 jobs died while measuring this" in rows.loc[poison, "error"]
    assert study.launch(*args).returncode == 1
    assert len(study.launches()) == 4
    figures = resume(study, *args, "retry=[failed]", cells=2, twice=1)
    return f"{figures}: the record of its failure, and its result"


@side_by_side
def test_preemption(study: Study) -> str:
    """SLURM puts the job back into the queue, once; the job does not as well."""
    args = (*TINY, "executor.exclude='n1,n2,n3'", "executor.gpus=2", "eval.tokens=40000")
    study.submit(*args)
    wait_measuring(study)
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodelist=n4", "--gpus=2", "--output=/dev/null"]
    study.cluster.command(*urgent, "--wrap=sleep 3")
    study.wait(lambda: attempts(study)[0].end)
    stopped = time.time()
    study.wait_idle()
    assert records(study) == ["PREEMPTED", "COMPLETED"]
    assert [(a.restart, dict(a.end or {})["reason"]) for a in attempts(study)] == [(0, "terminated"), (1, "finished")]
    return f"ran again after {attempts(study)[1].started - stopped:.0f} s; {resume(study, *args)}"


@pytest.mark.slow
@side_by_side
def test_scontrol_requeue(study: Study) -> str:
    study.submit(*TINY)
    wait_measuring(study)
    study.cluster.command("scontrol", "requeue", *study.jobs())
    study.wait(lambda: attempts(study)[0].end)
    stopped = time.time()
    study.wait_idle()
    assert records(study) == ["REQUEUED", "COMPLETED"]
    assert [(a.restart, dict(a.end or {})["reason"]) for a in attempts(study)] == [(0, "terminated"), (1, "finished")]
    return f"ran again after {attempts(study)[1].started - stopped:.0f} s; {resume(study, *TINY)}"


@side_by_side
def test_results_disk_full(study: Study) -> str:
    study.out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(study.out)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mount is not permitted here: {mounted.stderr.decode().strip()}")
    try:
        study.submit(*TINY)
        worker = freeze(study)
        ballast = study.out / "ballast"
        fill(ballast)
        worker.continue_()
        study.wait_idle()
        done = len(study.row_ids())
        assert done < TINY_CELLS
        ballast.unlink()
        assert states(study) == {"done": done, "lost": TINY_CELLS - done}
        figures = resume(study, *TINY)
    finally:
        study.cancel_all()
        subprocess.run(["umount", "--lazy", str(study.out)], check=True)
    return figures


@pytest.mark.slow
@side_by_side
def test_a_worker_killed(study: Study) -> str:
    """The job starts another one, which goes on with the measurement that was in flight."""
    study.submit(*TINY)
    measuring = wait_measuring(study)
    wait_process(study, "worker").kill()
    study.wait_idle()
    assert records(study) == ["COMPLETED"]
    assert measuring in set(study.row_ids())
    study.assert_whole(cells=TINY_CELLS)
    return resume(study, *TINY)


@pytest.mark.slow
@side_by_side
def test_a_batch_script_killed(study: Study) -> str:
    study.submit(*TINY)
    wait_measuring(study)
    wait_process(study, "shell").kill()
    study.wait_idle()
    assert records(study) == ["FAILED"]
    done = len(study.row_ids())
    assert states(study) == {"done": done, "lost": TINY_CELLS - done}
    return resume(study, *TINY)


@side_by_side
def test_half_an_array_cancelled(study: Study) -> str:
    args = (*TINY, "executor.cells_per_job=3")
    study.submit(*args)
    worker = freeze(study)
    study.wait(lambda: len(attempts(study)) == 2)
    study.cluster.command("scancel", *(job for job in study.jobs() if job != worker.job))
    worker.continue_()
    study.wait_idle()
    done = len(study.row_ids())
    assert 3 <= done < TINY_CELLS
    assert states(study) == {"done": done, "cancelled": TINY_CELLS - done}
    figures = resume(study, *args)
    assert len(attempts(study)) == 3
    return figures


@side_by_side
def test_wandb_down(study: Study) -> str:
    """W&B is away while jobs measure; when it is back, the next job brings what it misses, though no launcher waits."""
    server = WandbServer(f"http://127.0.0.1:{free_port()}", study.home / "wandb")
    online = (*TINY, "tracking=online", f"tracking.base_url={server.url}")
    grown = (*online, "sweep.quant=[{bits: [3, 4], dtype: [int, float]}]")
    key = {"WANDB_API_KEY": KEY}
    launched = study.start(*online, "sweep.quant=[{bits: 3, dtype: [int, float]}]", env=key)
    said, _ = launched.communicate(timeout=120)
    assert launched.returncode == 0, said
    study.wait_idle()
    (log,) = study.out.glob("logs/*/000/*_log.out")
    assert "warning: W&B: " in log.read_text()
    study.assert_whole(cells=2)
    server.data.mkdir()
    server.start()
    try:
        launched = study.start(*grown, env=key)
        said, _ = launched.communicate(timeout=120)
        assert launched.returncode == 0, said
        study.wait_idle()
        study.assert_whole(cells=4)
        (sweep,) = {launch.sweep for launch in study.launches()}
        runs = [server.run(run) for run in server.runs(sweep)]
    finally:
        server.stop()
    assert sorted(run["config"]["bits"] for run in runs) == [3, 3, 4, 4]
    assert {(run["state"], run["summary"]["cells"]) for run in runs} == {("finished", 1)}
    return f"{resume(study, *grown, cells=4)}; 4 runs in W&B"


@side_by_side
def test_damaged_and_stale_files(study: Study) -> str:
    """A file of results that was cut off is missing work; a temporary file of a writer that died is nothing."""
    study.submit(*TINY)
    study.wait_idle()
    assert states(study) == {"done": TINY_CELLS}
    (pack,) = study.out.glob("packs/*.parquet")  # mode=status folds
    pack.write_bytes(pack.read_bytes()[: pack.stat().st_size // 2])
    (rows,) = study.out.glob("parts/*.rows")
    rows.unlink()
    (rows.parent / ".0123.parquet.89abcdef.tmp").write_bytes(b"PAR1")
    (study.out / "claims" / ".0123.tmp").write_bytes(b"{")
    assert states(study) == {"lost": TINY_CELLS}
    figures = resume(study, *TINY)
    assert str(pack) in study.launch("mode=status").stdout
    return f"{TINY_CELLS} measurements of the damaged file again; {figures}"
