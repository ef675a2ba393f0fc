"""The truth about jobs: what the scheduler's words, its silence and the jobs' own words mean for measurements."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from sweeps import inflight
from sweeps.claims import Claims
from sweeps.inflight import ABSENT_SECONDS, Ledger, job_counts, read_flight, reconcile
from sweeps.launches import Attempt, Chunk, Launch, Shape
from sweeps.slurm import JobState, Sighting

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
        settings={},
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
        monkeypatch.setattr(inflight, "look", self.look)

    def look(self, names: object, since: float) -> Sighting:
        return Sighting(at=self.now, queue=self.queue, accounting=self.accounting, problems=())


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
    Ledger(cancelled=time.time()).save(launch)
    reconcile(launch.out)
    assert set(read_flight(launch.out).ended.values()) == {"cancelled"}


def test_settled_launches_are_not_asked_about_again(launch: Launch, scheduler: Scheduler) -> None:
    scheduler.accounting = dict([job(0, "COMPLETED"), job(1, "FAILED")])
    assert reconcile(launch.out) is not None
    assert reconcile(launch.out) is None


def test_a_job_says_itself_what_it_is_measuring(launch: Launch, scheduler: Scheduler) -> None:
    attempt = Attempt.begin(launch, "p2", job="7_1", restart=0, log=launch.out / "log")
    attempt.at("m3")
    flight = read_flight(launch.out)
    assert flight.running == {"m3"}
    assert flight.queued == {"m1", "m2"}


def test_a_job_that_stopped_for_its_walltime_timed_out_whatever_its_exit_code(
    launch: Launch, scheduler: Scheduler
) -> None:
    Attempt.begin(launch, "p2", job="7_1", restart=0, log=launch.out / "log").ended("walltime", requeued=False)
    scheduler.accounting = dict([job(0, "COMPLETED"), job(1, "COMPLETED")])
    reconcile(launch.out)
    assert read_flight(launch.out).ended == {"m1": "lost", "m2": "timeout", "m3": "timeout"}


@pytest.mark.parametrize(
    ("state", "counts"), [("FAILED", True), ("TIMEOUT", True), ("NODE_FAIL", False), ("CANCELLED", False)]
)
def test_a_death_without_a_word_counts_against_what_was_in_flight_unless_others_caused_it(
    launch: Launch, scheduler: Scheduler, state: str, counts: bool
) -> None:
    Attempt.begin(launch, "p2", job="7_1", restart=0, log=launch.out / "log").at("m2")
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
