"""What a study has spent: rows counted by hand, jobs by their attempts, and a job that stops at its share."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from sweeps.events import Measured, PackDone, Started
from sweeps.executors.slurm.query.reconcile import reconcile
from sweeps.launches.in_flight import read_flight
from sweeps.launches.job_log import BUDGET, JobLog
from sweeps.launches.launch import Attempt, Launch, Shape
from sweeps.launches.spending import BudgetWatch, allowance_ends, read_spending
from sweeps.store.parts import Store
from tests.sweeps.launches.test_in_flight import Scheduler, job, launch, scheduler  # noqa: F401  # fixtures

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def row(number: int, **columns: Any) -> dict[str, Any]:
    about = {"key": f"cell{number // 2}", "measurement": f"m{number}", "sweep": "s", "pack": "p", "model": "neox-s"}
    times = {"started": BEGAN, "finished": BEGAN + timedelta(seconds=10), "seconds": 9.0}
    shared = {"load_seconds": 100.25, "quantize_seconds": 3.0 + number // 2, "gpus": 0}
    return {**about, **times, **shared, "status": "done", "launch": "one (m)", **columns}


def spent(out: Path, *rows: dict[str, Any]) -> float:
    for each in rows:
        Store(out=out).write(each)
    return read_spending(Store(out=out), "s").spent


def test_a_load_counts_once_for_its_cells_and_a_quantization_once_for_its_evaluations(tmp_path: Path) -> None:
    assert spent(tmp_path, *(row(n) for n in range(4))) == pytest.approx(100.25 + 3 + 4 + 4 * 10)


def test_another_load_counts_by_itself(tmp_path: Path) -> None:
    assert spent(tmp_path, row(0), row(2, load_seconds=90.0)) == pytest.approx(100.25 + 90 + 3 + 4 + 20)


def test_each_gpu_of_a_model_that_is_spread_counts(tmp_path: Path) -> None:
    assert spent(tmp_path, row(0, gpus=4)) == pytest.approx(4 * (100.25 + 3 + 10))


def test_a_cell_that_can_not_be_loaded_counts_once_for_all_its_evaluations(tmp_path: Path) -> None:
    nothing = {"seconds": None, "load_seconds": None, "quantize_seconds": None, "status": "failed"}
    assert spent(tmp_path, row(0, **nothing), row(1, **nothing)) == pytest.approx(10)


def test_dropped_rows_and_earlier_tries_were_spent_and_other_studies_rows_were_not(tmp_path: Path) -> None:
    store = Store(out=tmp_path)
    total = spent(tmp_path, row(0), row(0, launch="two (m)", load_seconds=50.0), row(1, sweep="other"))
    assert total == pytest.approx(100.25 + 3 + 10 + 50 + 3 + 10)
    store.drop(store.row_ids({"m0"}), "wrong")
    assert read_spending(store, "s").spent == pytest.approx(total)
    store.close()
    store.fold()
    assert read_spending(store, "s").spent == pytest.approx(total)


def test_workers_are_stopped_by_what_is_stored_and_what_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = BudgetWatch(left=150.0)
    began = [Started(pack=p, cell=p, label=p, measurement=p) for p in ("a", "b")]
    assert not any(watch.is_spent(event, worker) for worker, event in enumerate(began))
    now[0] = 1000.0  # not before something is stored, or a slow load would come to nothing each time
    assert not watch.is_spent(PackDone(pack="b"), 1)
    # Through a worker's pipe times are text.
    told = {k: str(v) if isinstance(v, datetime) else v for k, v in row(0).items()}
    assert not watch.is_spent(Measured(row=told), 0)  # 113.25 s
    watch.is_spent(began[1], 1)
    now[0] += 36.0
    assert not watch.is_spent(Measured(row={**told, "quantize_seconds": 0.5, "finished": told["started"]}), 0)
    now[0] += 1.0
    assert watch.is_spent(Measured(row={**told, "quantize_seconds": 0.5, "finished": told["started"]}), 0)


def at(launch: Launch, pack: str, began: float, restart: int = 0, **end: Any) -> Attempt:  # noqa: F811
    """An attempt that began so many seconds ago."""
    attempt = Attempt.begin(launch, pack, job="7_0", restart=restart, host="n", log=launch.out / "log")
    attempt = replace(attempt, started=time.time() - began)
    return replace(attempt, end=end or None)._write()


def with_budget(launch: Launch, gpus: int = 2) -> Launch:  # noqa: F811
    shape = Shape(gpus=gpus, cpus=1, mem_gb=1.0, minutes=10)
    settings = replace(launch.settings, allowances={"p1": 600.0, "p2": 400.0})
    budgeted = replace(launch, shapes=(shape,), settings=settings)
    budgeted.save([])
    return budgeted


def test_jobs_spend_their_time_and_hold_the_rest_of_what_they_may_take(launch: Launch) -> None:  # noqa: F811
    budgeted = with_budget(launch)
    at(budgeted, "p1", 100.0, reason="walltime", requeued=True, at=time.time() - 40.0)
    at(budgeted, "p1", 30.0, restart=1)
    # What its jobs stored is their time already.
    Store(out=launch.out).write(row(0, launch="abc (m)"))
    spending = read_spending(Store(out=launch.out), "s")
    assert spending.spent == pytest.approx(2 * (60 + 30), abs=1)
    assert spending.held == pytest.approx(600 - 180 + 400, abs=1)
    assert spending.left(1500.0) == pytest.approx(1500 - 180 - 820, abs=2)
    assert spending.left(900.0) == 0.0
    assert read_spending(Store(out=launch.out), "other").spent == 0.0


def test_a_requeued_job_has_what_earlier_attempts_left_of_its_share(launch: Launch) -> None:  # noqa: F811
    budgeted = with_budget(launch)
    at(budgeted, "p1", 100.0, reason="walltime", requeued=True, at=time.time() - 40.0)
    second = at(budgeted, "p1", 30.0, restart=1)
    assert allowance_ends(budgeted, second) == pytest.approx(second.started + 600 / 2 - 60, abs=0.1)
    assert allowance_ends(launch, second) == math.inf


def test_a_node_whose_clock_is_off_has_the_same_share(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    budgeted = with_budget(launch)
    attempt = at(budgeted, "p1", 30.0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    assert allowance_ends(budgeted, attempt) - time.time() == pytest.approx(600 / 2 - 30, abs=2)


def test_what_a_job_did_not_begin_for_its_budget_is_nobodys_and_runs_next_time(
    launch: Launch,  # noqa: F811
    scheduler: Scheduler,  # noqa: F811
) -> None:
    budgeted = with_budget(launch)
    at(budgeted, "p1", 300.0, reason=BUDGET, at=time.time())
    scheduler.queue = dict([job(0, "COMPLETED"), job(1, "RUNNING")])
    reconcile(launch.out)
    flight = read_flight(launch.out)
    assert flight.held == {"m2", "m3"}
    assert flight.ended == {}
    assert JobLog.load(budgeted).entries["p1"].ended == BUDGET
    spending = read_spending(Store(out=launch.out), "s")
    assert (spending.spent, spending.held) == (pytest.approx(600, abs=1), 400.0)
