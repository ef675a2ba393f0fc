"""The truth about jobs: what the scheduler's words, its silence and the jobs' own words mean for measurements."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from sweeps.errors import StoreError, UserError
from sweeps.executors.slurm.query import JobSnapshot, JobState, where
from sweeps.executors.slurm.query import reconcile as reconciling
from sweeps.executors.slurm.query.reconcile import ABSENT_SECONDS, reconcile
from sweeps.executors.slurm.query.where import here
from sweeps.executors.slurm.show import cancel, logs, status
from sweeps.launches import in_flight as inflight
from sweeps.launches import job_log
from sweeps.launches.claims import Claims
from sweeps.launches.in_flight import SETTLE_SECONDS, job_counts, read_flight
from sweeps.launches.job_log import JobLog
from sweeps.launches.job_settings import JobSettings
from sweeps.launches.launch import Attempt, Chunk, Launch, Shape
from sweeps.store.parts import Store

SETTINGS = JobSettings(
    device="cpu",
    batch_tokens=2048,
    trust_remote_code=False,
    requeues=0,
    signal_seconds=120,
    tracking={"mode": "disabled"},
    references={},
    baseline_tolerance=0.02,
)
SHAPE = Shape(gpus=0, cpus=1, mem_gb=1.0, minutes=10)


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """A submitted launch of two packs: m1 and m2, m3."""
    launch = Launch(
        out=tmp_path,
        id="abc",
        sweep="s",
        shapes=(SHAPE,),
        chunks=(Chunk(number=0, shape=0, packs=("p1", "p2")),),
        settings=SETTINGS,
        offsets={},
        launched=time.time(),
    )
    launch.save([])
    Claims(out=tmp_path).create(1, launch="abc", sweep="s", packs={"p1": ["m1"], "p2": ["m2", "m3"]}, executor="slurm")
    launch.record_submitted({"kbit-abc-0": "7"})
    return launch


def job(index: int, state: str, restarts: int = 0) -> tuple[tuple[str, int], JobState]:
    named = JobState(
        name="kbit-abc-0", index=index, job=f"7_{index}", state=state, reason="", nodes="n1", restarts=restarts
    )
    return (named.name, index), named


class Scheduler:
    """Stands for squeue and sacct, which tests/slurm ask for real: here it says what a test wants to be said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queue: Mapping[tuple[str, int], JobState] | None = {}
        self.accounting: Mapping[tuple[str, int], JobState] | None = {}
        self.now = time.time()
        monkeypatch.setattr(reconciling, "query_jobs", self.query_jobs)

    def query_jobs(self, names: object, since: float, **_: object) -> JobSnapshot:
        return JobSnapshot(at=self.now, queue=self.queue, accounting=self.accounting, problems=())


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    return Scheduler(monkeypatch)


@pytest.mark.parametrize(
    ("state", "ended"),
    [
        ("TIMEOUT", "timeout"),
        ("OUT_OF_MEMORY", "oom"),
        ("NODE_FAIL", "node_fail"),
        ("PREEMPTED", "preempted"),
        ("CANCELLED", "cancelled"),
        ("FAILED", "lost"),
        ("COMPLETED", "lost"),
    ],
)
def test_a_terminal_state_ends_a_pack_and_only_that(
    launch: Launch, scheduler: Scheduler, state: str, ended: str
) -> None:
    scheduler.queue = dict([job(1, "RUNNING")])
    scheduler.accounting = dict([job(0, state)])
    reconcile(launch.out)
    flight = read_flight(launch.out)
    assert flight.ended == {"m1": ended}
    assert flight.held == {"m2", "m3"}


@pytest.mark.parametrize(
    "state", ["PENDING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING", "UNKNOWN", "NEW_ONE"]
)
def test_a_state_that_is_not_terminal_or_not_known_ends_nothing(
    launch: Launch, scheduler: Scheduler, state: str
) -> None:
    scheduler.queue = dict([job(0, state), job(1, state)])
    scheduler.accounting = dict([job(0, "PREEMPTED"), job(1, "NODE_FAIL")])
    for _ in range(3):
        scheduler.now += 100
        reconcile(launch.out)
    flight = read_flight(launch.out)
    assert flight.held == {"m1", "m2", "m3"}
    assert flight.ended == {}


@pytest.mark.parametrize("accounting", [None, {}, dict([job(0, "RUNNING"), job(1, "UNKNOWN")])])
def test_a_job_is_lost_only_when_two_looks_apart_in_time_do_not_know_it(
    launch: Launch, scheduler: Scheduler, accounting: Mapping[tuple[str, int], JobState] | None
) -> None:
    scheduler.accounting = accounting
    reconcile(launch.out)
    scheduler.now += ABSENT_SECONDS / 2
    reconcile(launch.out)
    assert read_flight(launch.out).held == {"m1", "m2", "m3"}
    assert len(read_flight(launch.out).absent()) == 2
    scheduler.now += ABSENT_SECONDS
    reconcile(launch.out)
    assert read_flight(launch.out).ended == dict.fromkeys(["m1", "m2", "m3"], "lost")


def test_a_job_that_comes_back_into_sight_was_not_lost(launch: Launch, scheduler: Scheduler) -> None:
    reconcile(launch.out)
    scheduler.now += ABSENT_SECONDS / 2
    scheduler.queue = dict([job(0, "RUNNING"), job(1, "PENDING")])
    reconcile(launch.out)
    scheduler.now += ABSENT_SECONDS
    scheduler.queue = {}
    reconcile(launch.out)
    assert read_flight(launch.out).held == {"m1", "m2", "m3"}


def test_a_queue_that_can_not_be_asked_changes_nothing(launch: Launch, scheduler: Scheduler) -> None:
    scheduler.queue = dict([job(0, "RUNNING"), job(1, "PENDING")])
    reconcile(launch.out)
    scheduler.queue, scheduler.accounting = None, {}
    scheduler.now += 10 * ABSENT_SECONDS
    reconcile(launch.out)
    flight = read_flight(launch.out)
    assert flight.held == {"m1", "m2", "m3"}
    assert job_counts(flight) == {"RUNNING": 1, "PENDING": 1}


def test_what_a_living_launcher_has_not_submitted_yet_is_not_absent(launch: Launch, scheduler: Scheduler) -> None:
    (launch.directory / "submitted.json").unlink()
    for _ in range(3):
        scheduler.now += ABSENT_SECONDS
        reconcile(launch.out)
    assert job_counts(read_flight(launch.out)) == {"SUBMITTING": 2}


def test_what_a_dead_launcher_did_not_submit_is_lost(launch: Launch, scheduler: Scheduler) -> None:
    (launch.directory / "submitted.json").unlink()
    claim = launch.out / "claims" / "00000001.json"
    claim.write_text(json.dumps({**json.loads(claim.read_text()), "pid_started": "another process"}))
    for _ in range(3):
        scheduler.now += ABSENT_SECONDS
        reconcile(launch.out)
    assert set(read_flight(launch.out).ended.values()) == {"lost"}


def test_a_cancelled_job_without_accounting_is_cancelled_and_not_lost(launch: Launch, scheduler: Scheduler) -> None:
    scheduler.accounting = None
    launch.cancel()
    reconcile(launch.out)
    assert set(read_flight(launch.out).ended.values()) == {"cancelled"}


def test_launches_whose_jobs_finished_are_not_asked_about_again(launch: Launch, scheduler: Scheduler) -> None:
    for pack in ("p1", "p2"):
        Attempt.begin(launch, pack, job="7", restart=0, host="n1", log=launch.out / "log").ended("finished")
    scheduler.accounting = dict([job(0, "COMPLETED"), job(1, "COMPLETED")])
    assert reconcile(launch.out) is not None
    assert reconcile(launch.out) is None


def test_what_was_dropped_is_missing_and_not_lost(launch: Launch, scheduler: Scheduler) -> None:
    scheduler.accounting = dict([job(0, "COMPLETED"), job(1, "COMPLETED")])
    store = Store(out=launch.out)
    for pack, measurement in (("p1", "m1"), ("p2", "m2")):
        row = {"sweep": "s", "pack": pack, "measurement": measurement, "status": "done"}
        store.write({**row, "finished": datetime.now(UTC)})
    reconcile(launch.out)
    assert read_flight(launch.out).ended == dict.fromkeys(["m1", "m2", "m3"], "lost")
    store.drop(store.row_ids({"m1"}), why="wrong")
    assert read_flight(launch.out).ended == dict.fromkeys(["m2", "m3"], "lost")


def test_nor_are_those_whose_work_a_later_launch_holds(launch: Launch, scheduler: Scheduler) -> None:
    scheduler.accounting = dict([job(0, "FAILED"), job(1, "FAILED")])
    assert reconcile(launch.out) is not None
    Claims(out=launch.out).create(2, launch="local", sweep="s", packs={"p1": ["m1"], "p2": ["m2", "m3"]})
    assert reconcile(launch.out) is None


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "REQUEUE_HOLD"])
def test_a_job_that_ended_and_was_requeued_by_hand_is_alive(launch: Launch, scheduler: Scheduler, state: str) -> None:
    scheduler.accounting = dict([job(0, "FAILED"), job(1, "FAILED")])
    reconcile(launch.out)
    assert read_flight(launch.out).held == set()
    scheduler.queue = dict([job(0, state, 1)])
    scheduler.now += 1
    reconcile(launch.out)
    flight = read_flight(launch.out)
    assert flight.held == {"m1"}
    assert flight.ended == {"m2": "lost", "m3": "lost"}
    assert [la.id for la, _ in flight.launches] == [launch.id]


def test_an_older_look_does_not_revive_what_a_newer_one_saw_end(launch: Launch, scheduler: Scheduler) -> None:
    scheduler.queue = dict([job(0, "RUNNING"), job(1, "RUNNING")])
    reconcile(launch.out)
    older = job_log.JobLog.load(launch)
    scheduler.queue, scheduler.accounting = {}, dict([job(0, "FAILED"), job(1, "FAILED")])
    scheduler.now += 1
    reconcile(launch.out)
    older.save(launch)
    assert read_flight(launch.out).held == set()


def test_work_is_proof_of_life_where_the_queue_shows_nothing(launch: Launch, scheduler: Scheduler) -> None:
    attempt = Attempt.begin(launch, "p2", job="7_1", restart=0, host="n1", log=launch.out / "log")
    scheduler.accounting = dict([job(0, "RUNNING"), job(1, "RUNNING")])
    reconcile(launch.out)
    path = next((launch.directory / "attempts").glob("p2-*"))
    for _ in range(3):
        scheduler.now += ABSENT_SECONDS
        attempt.at("m2")
        os.utime(path, (scheduler.now - 5, scheduler.now - 5))
        reconcile(launch.out)
    # The other job says nothing: accounting may call it RUNNING for ever.
    assert read_flight(launch.out).ended == {"m1": "lost"}
    scheduler.now += ABSENT_SECONDS - 6
    reconcile(launch.out)
    assert read_flight(launch.out).held == {"m2", "m3"}
    scheduler.now += 2
    reconcile(launch.out)
    assert read_flight(launch.out).ended == {"m1": "lost", "m2": "lost", "m3": "lost"}


def test_a_look_by_a_clock_that_was_ahead_freezes_nothing(launch: Launch, scheduler: Scheduler) -> None:
    now = scheduler.now
    scheduler.now = now + 3600
    scheduler.queue = dict([job(0, "PENDING")])
    reconcile(launch.out)
    scheduler.now = now
    scheduler.queue = dict([job(0, "RUNNING")])
    reconcile(launch.out)
    known = job_log.JobLog.load(launch)
    assert known.looked == now
    assert known.entries["p1"].state == "RUNNING"
    # The job that neither look knew is given up in its time, neither an hour later nor at once.
    assert read_flight(launch.out).held == {"m1", "m2", "m3"}
    scheduler.now = now + ABSENT_SECONDS
    reconcile(launch.out)
    assert read_flight(launch.out).ended == {"m2": "lost", "m3": "lost"}


def test_times_that_decide_are_the_stores(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1e9)
    attempt = Attempt.begin(launch, "p1", job="7_0", restart=0, host="n1", log=launch.out / "log").ended("finished")
    assert attempt.end is not None
    assert attempt.started == pytest.approx(launch.directory.stat().st_mtime, abs=10)
    assert attempt.end["at"] == pytest.approx(launch.directory.stat().st_mtime, abs=10)
    asked: list[float | None] = []

    def query_jobs(*_: object, at: float | None = None, **__: object) -> JobSnapshot:
        asked.append(at)
        return JobSnapshot(at=at or 0.0, queue={}, accounting={}, problems=())

    monkeypatch.setattr(reconciling, "query_jobs", query_jobs)
    reconcile(launch.out)
    assert asked == [pytest.approx(launch.directory.stat().st_mtime, abs=10)]


def test_a_job_says_itself_what_it_is_measuring(launch: Launch, scheduler: Scheduler) -> None:
    attempt = Attempt.begin(launch, "p2", job="7_1", restart=0, host="n1", log=launch.out / "log")
    attempt.at("m3")
    flight = read_flight(launch.out)
    assert flight.running == {"m3"}
    assert flight.queued == {"m1", "m2"}


def test_a_job_that_stopped_for_its_walltime_timed_out_whatever_its_exit_code(
    launch: Launch, scheduler: Scheduler
) -> None:
    Attempt.begin(launch, "p2", job="7_1", restart=0, host="n1", log=launch.out / "log").ended(
        "walltime", requeued=False
    )
    scheduler.accounting = dict([job(0, "COMPLETED"), job(1, "COMPLETED")])
    reconcile(launch.out)
    assert read_flight(launch.out).ended == {"m1": "lost", "m2": "timeout", "m3": "timeout"}


@pytest.mark.parametrize(
    ("state", "counts"), [("FAILED", True), ("TIMEOUT", True), ("NODE_FAIL", False), ("CANCELLED", False)]
)
def test_a_death_without_a_word_counts_against_what_was_in_flight_unless_others_caused_it(
    launch: Launch, scheduler: Scheduler, state: str, counts: bool
) -> None:
    Attempt.begin(launch, "p2", job="7_1", restart=0, host="n1", log=launch.out / "log").at("m2")
    scheduler.accounting = dict([job(0, "COMPLETED"), job(1, state)])
    reconcile(launch.out)
    assert set(read_flight(launch.out).suspects) == ({"m2"} if counts else set())


def test_a_job_that_ran_out_of_memory_goes_one_rung_up(launch: Launch, scheduler: Scheduler) -> None:
    scheduler.accounting = dict([job(0, "OUT_OF_MEMORY"), job(1, "COMPLETED")])
    reconcile(launch.out)
    assert read_flight(launch.out).rungs == {"m1": 1}


def test_nodes_that_failed_are_remembered(launch: Launch, scheduler: Scheduler) -> None:
    scheduler.accounting = dict([job(0, "NODE_FAIL"), job(1, "COMPLETED")])
    reconcile(launch.out)
    flight = read_flight(launch.out)
    assert flight.nodes_that_failed(["m1", "m2"]) == {"n1"}
    assert flight.nodes_that_failed(["m2", "m3"]) == set()


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A slurm.conf that names this machine's cluster."""
    path = tmp_path / "slurm.conf"
    path.write_text("# ClusterName=old\n  clustername = Ours # the large one\nSlurmctldHost=a\n")
    monkeypatch.setenv("SLURM_CONF", str(path))
    here.cache_clear()
    yield path
    here.cache_clear()


def test_the_cluster_is_known_without_asking_it(conf: Path) -> None:
    assert here() == (where.user_name(), "ours")
    conf.unlink()
    here.cache_clear()
    assert here()[1] == ""


@pytest.mark.parametrize(
    ("user", "cluster", "gone"),
    [("", "", True), (None, "ours", True), ("somebody", "ours", False), (None, "theirs", False)],
)
def test_absence_counts_only_where_the_job_would_be_seen(
    launch: Launch, scheduler: Scheduler, conf: Path, user: str | None, cluster: str, gone: bool
) -> None:
    launch = replace(launch, user=here()[0] if user is None else user, cluster=cluster)
    launch.save([])
    scheduler.queue = dict([job(0, "RUNNING"), job(1, "PENDING")])
    reconcile(launch.out)
    assert not status.unseen(read_flight(launch.out))
    scheduler.queue = {}
    for _ in range(2):
        scheduler.now += ABSENT_SECONDS
        reconcile(launch.out)
    flight = read_flight(launch.out)
    assert set(flight.ended.values()) == ({"lost"} if gone else set())
    assert status.unseen(flight) == ([] if gone else [(launch, "p1"), (launch, "p2")])
    assert not flight.absent()
    if not gone:
        assert job_counts(flight) == {"RUNNING": 1, "PENDING": 1}
        console = Console(record=True, width=200)
        status.show_jobs(flight, console)
        assert f"2 jobs of {launch.user} on {cluster} can't be seen from here" in console.export_text()


@pytest.mark.parametrize(
    ("word", "more", "ended"),
    [
        ("finished", {}, "lost"),
        ("error", {}, "lost"),
        ("walltime", {"requeued": False}, "timeout"),
        ("walltime", {"requeued": True}, None),
        ("terminated", {}, None),
        (None, {}, None),
    ],
)
def test_a_job_that_can_not_be_seen_is_over_by_its_own_word(
    launch: Launch, scheduler: Scheduler, conf: Path, word: str | None, more: dict[str, bool], ended: str | None
) -> None:
    launch = replace(launch, user="somebody", cluster="ours")
    launch.save([])
    attempt = Attempt.begin(launch, "p1", job="7", restart=0, host="n1", log=launch.out / "log")
    if word is not None:
        attempt.ended(word, **more)
    for _ in range(2):
        scheduler.now += ABSENT_SECONDS
        reconcile(launch.out)
    entry = JobLog.load(launch).entries.get("p1")
    assert (entry and entry.ended) == ended
    assert ("p1" in {pack for _, pack in status.unseen(read_flight(launch.out))}) == (ended is None)


def test_a_pack_that_finished_just_now_is_held_until_its_rows_are_in_sight(
    launch: Launch, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pack, word in (("p1", "finished"), ("p2", "error")):
        Attempt.begin(launch, pack, job="7", restart=0, host="n1", log=launch.out / "log").ended(word)
    scheduler.accounting = dict([job(0, "COMPLETED"), job(1, "FAILED")])
    reconcile(launch.out)
    flight = read_flight(launch.out)
    assert flight.held == {"m1"}
    assert flight.ended == {"m2": "lost", "m3": "lost"}
    Store(out=launch.out).write({"measurement": "m1", "status": "done", "finished": datetime.now(UTC)})
    assert read_flight(launch.out).held == set()
    (rows,) = launch.out.glob("parts/*")
    rows.write_bytes(b"damaged " * 9)
    assert read_flight(launch.out).ended["m1"] == "lost", "nothing more comes into sight"
    shutil.rmtree(launch.out / "parts")
    later = time.time() + SETTLE_SECONDS
    monkeypatch.setattr(inflight, "clock", lambda _: later)
    assert read_flight(launch.out).ended["m1"] == "lost"


def test_what_a_finished_pack_left_to_another_launch_is_not_waited_for(launch: Launch, scheduler: Scheduler) -> None:
    Attempt.begin(launch, "p2", job="7", restart=0, host="n1", log=launch.out / "log").ended("finished", last="m2")
    scheduler.accounting = dict([job(0, "COMPLETED"), job(1, "COMPLETED")])
    reconcile(launch.out)
    assert read_flight(launch.out).held >= {"m2", "m3"}
    Store(out=launch.out).write({"measurement": "m2", "status": "done", "finished": datetime.now(UTC)})
    flight = read_flight(launch.out)
    assert not flight.held & {"m2", "m3"}
    assert flight.ended["m3"] == "lost"


def test_a_look_that_runs_beside_another_forgets_neither_an_end_nor_a_cancellation(
    launch: Launch, scheduler: Scheduler
) -> None:
    scheduler.queue = dict([job(0, "RUNNING"), job(1, "PENDING")])
    reconcile(launch.out)
    older = JobLog.load(launch)
    launch.cancel()
    scheduler.now += 10
    scheduler.queue = dict([job(0, "CANCELLED"), job(1, "RUNNING")])
    reconcile(launch.out)
    older.save(launch)
    job_log = JobLog.load(launch)
    assert job_log.cancelled
    assert job_log.looked == scheduler.now
    assert job_log.entries["p1"].ended == "cancelled"
    assert job_log.entries["p2"].state == "RUNNING"
    older.looked = scheduler.now + 1
    older.save(launch)
    assert {p: (e.state, e.ended) for p, e in JobLog.load(launch).entries.items()} == {
        "p1": ("CANCELLED", "cancelled"),
        "p2": ("PENDING", None),
    }


def test_who_can_not_write_the_ledger_sees_what_the_scheduler_said(
    launch: Launch, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(job_log, "write_atomically", refuse)
        scheduler.accounting = dict([job(0, "TIMEOUT"), job(1, "COMPLETED")])
        reconcile(launch.out)
        assert read_flight(launch.out).ended == {"m1": "timeout", "m2": "lost", "m3": "lost"}
    assert not (launch.directory / "ledger.json").exists()
    JobLog.load(launch).save(launch)
    assert launch.directory not in job_log._UNWRITTEN
    assert read_flight(launch.out).ended["m1"] == "timeout"


@pytest.mark.parametrize(
    ("state", "restarts", "running"),
    [("RUNNING", 0, True), ("SUSPENDED", 0, True), ("PENDING", 1, False), ("PENDING", 0, False), ("RUNNING", 1, False)],
)
def test_a_job_that_is_back_in_the_queue_measures_nothing(
    launch: Launch, scheduler: Scheduler, state: str, restarts: int, running: bool
) -> None:
    Attempt.begin(launch, "p1", job="7_0", restart=0, host="n1", log=launch.out / "log").at("m1")
    scheduler.now = time.time()
    scheduler.queue = dict([job(0, state, restarts), job(1, "PENDING")])
    reconcile(launch.out)
    assert read_flight(launch.out).running == ({"m1"} if running else set())


def test_a_job_that_began_after_the_last_look_is_running(launch: Launch, scheduler: Scheduler) -> None:
    scheduler.queue = dict([job(0, "PENDING"), job(1, "PENDING")])
    reconcile(launch.out)
    Attempt.begin(launch, "p1", job="7_0", restart=0, host="n1", log=launch.out / "log").at("m1")
    assert read_flight(launch.out).running == {"m1"}


@pytest.mark.parametrize(
    ("word", "ended"), [("walltime", "timeout"), ("terminated", "lost"), ("gate", "oom"), ("error", "oom")]
)
def test_the_jobs_own_word_counts_more_than_that_a_process_of_it_ran_out_of_memory(
    launch: Launch, scheduler: Scheduler, word: str, ended: str
) -> None:
    Attempt.begin(launch, "p1", job="7_0", restart=0, host="n1", log=launch.out / "log").ended(word)
    scheduler.accounting = dict([job(0, "OUT_OF_MEMORY"), job(1, "COMPLETED")])
    reconcile(launch.out)
    flight = read_flight(launch.out)
    assert flight.ended["m1"] == ended
    assert flight.rungs == ({"m1": 1} if ended == "oom" else {})


def test_a_requeued_job_that_ran_out_of_memory_before_it_said_anything_did_so(
    launch: Launch, scheduler: Scheduler
) -> None:
    attempt = Attempt.begin(launch, "p1", job="7_0", restart=0, host="n1", log=launch.out / "log")
    attempt.ended("walltime", requeued=True, measured=1)
    scheduler.accounting = dict([job(0, "OUT_OF_MEMORY"), job(1, "COMPLETED")])
    reconcile(launch.out)
    assert read_flight(launch.out).ended["m1"] == "oom"


@pytest.mark.parametrize(
    ("state", "measured", "counts"),
    [("FAILED", {"measured": 0}, True), ("NODE_FAIL", {"measured": 0}, False), ("FAILED", {}, False)],
)
def test_an_error_counts_against_what_was_in_flight_where_nothing_could_be_measured(
    launch: Launch, scheduler: Scheduler, state: str, measured: dict[str, int], counts: bool
) -> None:
    Attempt.begin(launch, "p1", job="7_0", restart=0, host="n1", log=launch.out / "log").at("m1").ended(
        "error", **measured
    )
    scheduler.accounting = dict([job(0, state), job(1, "COMPLETED")])
    reconcile(launch.out)
    assert set(read_flight(launch.out).suspects) == ({"m1"} if counts else set())


def test_a_launch_whose_directory_was_deleted_is_lost_and_said_so_once(
    launch: Launch, scheduler: Scheduler, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(launch.directory)
    for _ in range(2):
        assert reconcile(launch.out) is None
        assert read_flight(launch.out).ended == dict.fromkeys(["m1", "m2", "m3"], "lost")
        assert logs.why_never_run(launch.out, ["m1"]) == {}
    assert [r.message for r in caplog.records] == [
        f"{launch.directory} is gone: what its jobs did not store counts as lost"
    ]


def test_cancelling_a_launch_that_is_still_being_submitted_stops_it(
    launch: Launch, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    (launch.directory / "submitted.json").unlink()

    def submitter_stops(_: float) -> None:
        assert launch.cancelled()
        launch.record_submitted({})

    monkeypatch.setattr(cancel, "query_jobs", scheduler.query_jobs)
    monkeypatch.setattr(cancel, "sleep", submitter_stops)
    console = Console(record=True, width=200)
    assert cancel.cancel_launches(launch.out, [launch], console) == 0
    assert "it is still being submitted: what is not submitted yet won't be" in console.export_text()
    assert set(read_flight(launch.out).ended.values()) == {"cancelled"}


@pytest.fixture
def ended(launch: Launch, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two queued jobs, p1 and p2; returns the ids of those that are cancelled, which SLURM then knows no more."""
    gone: list[str] = []
    scheduler.queue = dict([job(0, "PENDING"), job(1, "PENDING")])
    ids = {j.job: place for place, j in scheduler.queue.items()}

    def scancel(jobs: list[str]) -> None:
        gone.extend(jobs)
        scheduler.queue = {p: j for p, j in (scheduler.queue or {}).items() if p not in {ids[g] for g in gone}}

    monkeypatch.setattr(cancel, "query_jobs", scheduler.query_jobs)
    monkeypatch.setattr(cancel, "cancel", scancel)
    return gone


@pytest.mark.parametrize(
    ("chosen", "cancelled", "go_on"),
    [({"m1"}, {"m1"}, 0), ({"m2"}, set(), 1), ({"m1", "m2"}, {"m1"}, 1), ({"m2", "m3"}, {"m2", "m3"}, 0)],
)
def test_chosen_measurements_end_only_jobs_that_hold_nothing_else(
    launch: Launch, ended: list[str], chosen: set[str], cancelled: set[str], go_on: int
) -> None:
    console = Console(record=True, width=200)
    assert cancel.cancel_measurements(launch.out, [launch], console, chosen) == 0
    flight = read_flight(launch.out)
    assert flight.ended == dict.fromkeys(cancelled, "cancelled")
    assert flight.held == {"m1", "m2", "m3"} - cancelled
    assert len(ended) == (1 if cancelled else 0)
    assert ("left alone: they also measure cells that are not chosen" in console.export_text()) == bool(go_on)


def test_jobs_are_not_chosen_while_they_are_being_submitted(launch: Launch, ended: list[str]) -> None:
    (launch.directory / "submitted.json").unlink()
    with pytest.raises(UserError, match=r"abc is still being submitted.*try again"):
        cancel.cancel_measurements(launch.out, [launch], Console(), {"m1"})
    assert not ended


def test_settings_of_other_versions_are_read(launch: Launch) -> None:
    """Keys of a later version are left out; what an earlier one did not write is default; the rest must be there."""
    path = launch.directory / "launch.json"
    data = json.loads(path.read_text())
    assert Launch.load(launch.out, "abc") == launch
    del data["settings"]["baselines"], data["settings"]["parallel"]
    path.write_text(json.dumps({**data, "settings": {**data["settings"], "of_a_later_version": 1}}))
    assert Launch.load(launch.out, "abc") == launch
    del data["settings"]["device"]
    path.write_text(json.dumps(data))
    with pytest.raises(StoreError, match="settings lack device"):
        Launch.load(launch.out, "abc")
