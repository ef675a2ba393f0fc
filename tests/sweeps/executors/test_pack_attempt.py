"""A job of a launch: what it leaves to others, what it does again, and what opens the gate behind a baseline."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kbit.evaluation.spec import EvalSpec
from sweeps.errors import JobError, LoadError
from sweeps.executors.slurm.node import pack_attempt as packrun
from sweeps.executors.slurm.node.owners import lease_pack
from sweeps.executors.slurm.node.pack_attempt import PackAttempt
from sweeps.launches.launch import Attempt, Chunk, Launch, Shape, line_offsets
from sweeps.plan.pack import Pack
from sweeps.store.parts import Store
from sweeps.store.rows import measurement_row
from sweeps.tracking.tracker import CLOSE_SECONDS
from sweeps.worker.devices import Workers
from sweeps.worker.execution import END_SECONDS, close_seconds
from sweeps.worker.pool import WorkerPool
from sweeps.worker.settings import WorkerSettings
from tests.sweeps.launches.test_in_flight import SETTINGS
from tests.sweeps.worker.test_worker import BASELINE, evaluation, pack_of, pack_of_unloadable

EVALS = (evaluation("first"), evaluation("second"))


def pack_run(out: Path, pack: Pack, **settings: Any) -> PackAttempt:
    """A job of a baseline's pack that another chunk waits for."""
    launch = Launch(
        out=out,
        id="abc",
        sweep="s",
        shapes=(Shape(gpus=0, cpus=1, mem_gb=1.0, minutes=10),),
        chunks=(Chunk(number=0, shape=0, packs=(pack.id,)), Chunk(number=1, shape=0, packs=("rest",), after=0)),
        settings=replace(SETTINGS, **settings),
        offsets=line_offsets([pack]),
        launched=time.time(),
    )
    launch.save([pack])
    run = PackAttempt(launch=launch, chunk=launch.chunks[0], pack=pack, claim=1)
    run._attempt = Attempt.begin(launch, pack.id, job="7_0", restart=0, host="n1", log=out / "log")
    return run


def write(out: Path, pack: Pack, *, status: str, launch: str, number: int = 0) -> str:
    """Store a row for one of a pack's measurements; returns its key."""
    measurement = pack.measurements()[number]
    row = {**measurement_row(measurement), "sweep": "s", "pack": pack.id, "status": status, "launch": launch}
    Store(out=out).write({**row, "metrics": {"loss": 2.0}})
    return measurement.key


@pytest.mark.parametrize("measured", [0, 1])
def test_a_baseline_that_the_walltime_stops_for_good_fails(tmp_path: Path, measured: int) -> None:
    run = pack_run(tmp_path, pack_of(BASELINE))
    run._measured = measured
    with pytest.raises(JobError, match="its quantized cells don't run"):
        run._requeue(lambda *_: None)
    (attempt,) = run.launch.attempts([run.pack.id])[run.pack.id]
    assert attempt.end is not None
    assert (attempt.end["reason"], attempt.end["requeued"]) == ("walltime", False)
    run.chunk = Chunk(number=1, shape=0, packs=(run.pack.id,))
    assert run._requeue(lambda *_: None) == "walltime"


def test_a_job_stops_at_its_share_of_the_budget_and_does_not_go_back_into_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A job's process is as old as its job; this one may have run other tests for longer than the walltime.
    monkeypatch.setattr(packrun, "_PROCESS_START", time.time())
    run = pack_run(tmp_path, pack_of(BASELINE))
    assert not run._is_spent()
    run = pack_run(tmp_path, run.pack, allowances={run.pack.id: 60.0})
    assert run._is_spent()
    with pytest.raises(JobError, match="its quantized cells don't run"):
        run._stop_for_budget()
    run.chunk = Chunk(number=1, shape=0, packs=(run.pack.id,))
    assert run._stop_for_budget() == "budget"
    (attempt,) = run.launch.attempts([run.pack.id])[run.pack.id]
    assert attempt.end is not None
    assert attempt.end["reason"] == "budget"
    run = pack_run(tmp_path, run.pack, allowances={run.pack.id: 6000.0})
    assert not run._is_spent()  # the walltime of 10 minutes comes first


def test_the_store_is_read_for_a_report_only_where_no_other_job_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def finish(*_: object, until: float, **__: object) -> None:
        asked.append(until)

    monkeypatch.setattr(packrun, "finish_study", finish)
    run = pack_run(tmp_path, pack_of(BASELINE), report_code="code")
    launch, other = run.launch, {"job": "8_0", "restart": 0, "host": "n2", "log": tmp_path / "log"}
    run._report()
    assert not asked  # another chunk waits for it
    run.chunk = replace(run.chunk, number=1)
    launch.record_submitted({launch.chunk_name(0): "7", launch.chunk_name(1): "8"})
    run._report()
    assert not asked  # the other pack is to come
    theirs = Attempt.begin(launch, "rest", **other)  # type: ignore[arg-type]
    run._report()
    assert not asked
    theirs.ended("walltime", requeued=True)
    run._report()
    assert not asked
    theirs.ended("finished")
    run._report()
    assert len(asked) == 1
    launch.record_submitted({launch.chunk_name(0): "7"})
    (launch.directory / "attempts" / "rest-8_0-0.json").unlink()
    run._report()
    assert len(asked) == 2  # what was never submitted is not waited for


def gate_of(out: Path, pack: Pack, evals: Sequence[EvalSpec] = EVALS) -> str | None:
    whole = pack_of(BASELINE, evals=tuple(evals))
    keys = [m.key for m in whole.measurements()]
    return pack_run(out, pack, baselines={pack.model.label: keys})._gate_problem()


def test_the_gate_looks_at_the_whole_baseline_and_not_at_one_pack_of_it(tmp_path: Path) -> None:
    earlier = pack_of(BASELINE, evals=EVALS[:1], name="earlier")
    mine = pack_of(BASELINE, evals=EVALS[1:], name="mine")
    write(tmp_path, mine, status="done", launch="abc (m)")
    problem = gate_of(tmp_path, mine)
    assert problem is not None
    assert earlier.measurements()[0].key in problem
    write(tmp_path, earlier, status="diverged", launch="old (m)")
    assert gate_of(tmp_path, mine) == "its baseline is diverged on first"
    write(tmp_path / "other", earlier, status="done", launch="old (m)")
    write(tmp_path / "other", mine, status="done", launch="abc (m)")
    assert gate_of(tmp_path / "other", mine) is None


def test_without_a_list_of_baselines_the_gate_names_what_its_pack_lacks(tmp_path: Path) -> None:
    pack = pack_of(BASELINE, evals=EVALS)
    write(tmp_path, pack, status="done", launch="abc (m)")
    assert pack_run(tmp_path, pack)._gate_problem() == "its baseline is not measured on second"


CASES = [("done", "old (m)", True), ("diverged", "old (m)", False), ("failed", "old (m)", False)]
CASES += [(status, "abc (m)", True) for status in ("done", "diverged", "failed")] + [("failed", "abcd (m)", False)]


@pytest.mark.parametrize(("status", "launch", "counts"), CASES)
def test_what_an_earlier_launch_did_not_get_done_is_measured_again(
    tmp_path: Path, status: str, launch: str, counts: bool
) -> None:
    pack = pack_of(BASELINE, evals=EVALS)
    key = write(tmp_path, pack, status=status, launch=launch, number=1)
    expected = {key} if counts else set()
    assert pack_run(tmp_path, pack)._not_mine() == expected
    assert pool(tmp_path, provenance={"launch": "abc (m)"})._stored(pack) == expected


def pool(out: Path, *, beats: list[list[str]] | None = None, **settings: Any) -> WorkerPool:
    values = {"batch_tokens": 2048, "trust_remote_code": False, "provenance": {}, **settings}
    told = [] if beats is None else beats
    out.mkdir(exist_ok=True)  # as the launch has it
    return WorkerPool(
        store=Store(out=out),
        workers=Workers(device="cpu", count=1, threads=1),
        settings=WorkerSettings(**values),
        log=lambda _: out / "worker.log",
        on_event=lambda *_: None,
        beat=lambda running: told.append(list(running)),
    )


def test_a_node_that_can_not_load_the_model_leaves_no_record_but_a_suspect(tmp_path: Path) -> None:
    pack = pack_of_unloadable(tmp_path / "gone")
    beats: list[list[str]] = []
    with pytest.raises(LoadError, match="can't be loaded on this node"):
        pool(tmp_path / "r", beats=beats, load_again=True).run([pack])
    assert beats[-1] == [pack.measurements()[0].key]
    assert Store(out=tmp_path / "r").read().num_rows == 0
    assert pool(tmp_path / "r").run([pack]) == "finished"
    assert Store(out=tmp_path / "r").read(["status"]).to_pylist() == [{"status": "failed"}] * 2


def test_earlier_jobs_that_could_not_load_the_model_are_counted(tmp_path: Path) -> None:
    run = pack_run(tmp_path, pack_of(BASELINE))
    assert run._load_errors() == 0
    run._attempt.ended("error", error="no", measured=0, load=True)
    Attempt.begin(run.launch, run.pack.id, job="8_0", restart=0, host="n1", log=tmp_path / "log").ended(
        "error", error="full disk"
    )
    assert run._load_errors() == 1


def test_the_mirror_gets_no_time_that_the_job_does_not_have() -> None:
    assert close_seconds(None, 0.0) == CLOSE_SECONDS
    assert close_seconds(1000.0, 0.0) == CLOSE_SECONDS
    assert (close_seconds(None, 0.0, 15.0), close_seconds(20.0, 0.0, 15.0)) == (15.0, 20.0 - END_SECONDS)
    assert close_seconds(100.0, 100.0 - END_SECONDS - 4.0) == 4.0
    assert close_seconds(100.0, 95.0) == 0.0


def test_a_pack_belongs_to_the_first_array_that_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pack_run(tmp_path, pack_of(BASELINE))
    for array, index in (("7", "0"), ("7", "0")):  # started, and requeued
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", array)
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", index)
        run._own()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "9")
    with pytest.raises(JobError, match="is job 7's: sbatch was served twice for kbit-abc-0, and job 9 has nothing"):
        run._own()
    assert lease_pack(run.launch, "other", "9") == "9"
    assert sorted(p.name for p in (run.launch.directory / "owners").iterdir()) == ["other", run.pack.id]


SCONTROL = """#!/bin/sh
echo asked >> {asked}
case $(wc -l < {asked}) in
  1) echo "Unable to contact slurm controller" >&2; exit 1;;
  2) echo JobId=7 JobState=RUNNING PreemptTime=2026-01-01T00:00:00;;
  *) echo JobId=7 JobState=COMPLETING PreemptTime=2026-01-01T00:00:00;;
esac
"""


def test_a_controller_that_fails_once_does_not_end_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tmp_path / "asked"
    script = tmp_path / "scontrol"
    script.write_text(SCONTROL.format(asked=asked))
    script.chmod(0o755)
    environment: Mapping[str, str] = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setattr(packrun, "_ASK_SECONDS", 0.01)
    packrun._await_end()
    assert asked.read_text().count("asked") == 3
