"""Who is at what, and how work ended that left no record: claims, attempts and the scheduler's word brought together.

Absence is not death: the jobs of a pack are over only on a terminal state from the scheduler, or when two successful
looks, ``ABSENT_SECONDS`` apart, don't know them. What was seen is kept in each launch's ledger, so that reading results
asks no scheduler, and a cluster without accounting forgets nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from sweeps.claims import Claim, Claims
from sweeps.launches import Attempt, Launch
from sweeps.slurm import JobState, Sighting, look
from sweeps.store import read_json, write_atomically

ABSENT_SECONDS: Final = 30.0
LOOK_SECONDS: Final = 5.0
SUBMITTING: Final = "SUBMITTING"
ABSENT: Final = "ABSENT"
_ENDED_AS: Final = {
    "TIMEOUT": "timeout",
    "DEADLINE": "timeout",
    "OUT_OF_MEMORY": "oom",
    "NODE_FAIL": "node_fail",
    "BOOT_FAIL": "node_fail",
    "LAUNCH_FAILED": "node_fail",
    "PREEMPTED": "preempted",
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
}
_DIED_AS: Final = ("FAILED", "TIMEOUT", "COMPLETED", ABSENT)
"""Ends that count against the measurement that was in flight, where the job did not say a word of its own."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of one pack's job.

    Attributes:
        state: SLURM's word, or SUBMITTING (the launcher has not submitted it yet) or ABSENT (unknown to the scheduler).
        absent_since: first successful look that didn't know the job.
        ended: how it ended, once that is sure: 'lost', 'timeout', 'oom', 'node_fail', 'preempted', 'cancelled'.
        suspect: measurement in flight when the job died without a word; its log, and when that attempt began.
    """

    state: str
    job: str = ""
    reason: str = ""
    nodes: str = ""
    restarts: int = 0
    absent_since: float | None = None
    ended: str | None = None
    suspect: str | None = None
    suspect_log: str = ""
    suspect_began: float = 0.0


@dataclass(kw_only=True)
class Ledger:
    """The scheduler's last word on every pack of a launch.

    Attributes:
        looked: the last successful look at the queue, in epoch seconds; 0 is never.
        cancelled: when the user cancelled the launch; a job that is gone since was cancelled.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    looked: float = 0.0
    cancelled: float | None = None

    @classmethod
    def load(cls, launch: Launch) -> Ledger:
        try:
            data = read_json(launch.directory / "ledger.json")
        except FileNotFoundError:
            return cls()
        return cls(**{**data, "entries": {p: Entry(**e) for p, e in data["entries"].items()}})

    def save(self, launch: Launch) -> None:
        write_atomically(launch.directory / "ledger.json", json.dumps(asdict(self)).encode())

    def settled(self, launch: Launch) -> bool:
        """Whether every pack's job is known to be over."""
        return all(pack in self.entries and self.entries[pack].ended for chunk in launch.chunks for pack in chunk.packs)


@dataclass(kw_only=True)
class Flight:
    """Measurements that claims hold, by what became of them.

    Attributes:
        running, queued: held by launches that may still be at work.
        ended: how work ended that its launch can't do any more: 'lost', 'timeout', ...; what is stored counts first.
        rungs: next step of the out-of-memory ladder, of those whose job ran out of memory.
        suspects: (log, began) of each job that died without a word while measuring this.
        launches: SLURM launches that are not settled, with their ledgers.
        local: live claims of workers on one machine.
        failed_on: nodes that failed under a measurement's job, by measurement.
    """

    running: set[str] = field(default_factory=set)
    queued: set[str] = field(default_factory=set)
    ended: dict[str, str] = field(default_factory=dict)
    rungs: dict[str, int] = field(default_factory=dict)
    suspects: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    launches: list[tuple[Launch, Ledger]] = field(default_factory=list)
    local: list[Claim] = field(default_factory=list)
    failed_on: dict[str, str] = field(default_factory=dict)

    def nodes_that_failed(self, measurements: Collection[str]) -> set[str]:
        """Nodes that failed under the last jobs of some measurements."""
        return {self.failed_on[m] for m in measurements if m in self.failed_on}

    @property
    def held(self) -> set[str]:
        return self.running | self.queued

    def absent(self) -> list[tuple[Launch, Entry]]:
        """Jobs that the last look didn't know, and that are not given up yet."""
        return [
            (la, e) for la, ledger in self.launches for e in ledger.entries.values() if e.absent_since and not e.ended
        ]


def read_flight(out: Path) -> Flight:
    """Bring claims, attempts and ledgers together, without asking anybody."""
    claims = Claims(out=out)
    flight = Flight()
    # In their order: what a later claim holds is that claim's.
    for claim in claims.open():
        if claim.executor == "slurm":
            _add_slurm(flight, out, claim)
        elif claims.is_alive(claim):
            flight.local.append(claim)
            running = claims.running(claim)
            _hold(flight, claim.measurements - running, running)
        else:
            _end(flight, claim.measurements, "lost")
    return flight


def reconcile(out: Path) -> Sighting | None:
    """Ask the scheduler about every launch that isn't settled, in at most two calls, and write down what it says.

    Returns what was seen; None where there was nothing to ask about.
    """
    claims = Claims(out=out)
    asked = [
        (launch, ledger, claim)
        for claim in claims.open()
        if claim.executor == "slurm"
        for launch in [Launch.load(out, claim.launch)]
        for ledger in [Ledger.load(launch)]
        if not ledger.settled(launch)
    ]
    if not asked:
        return None
    names = [launch.chunk_name(c.number) for launch, _, _ in asked for c in launch.chunks]
    sighting = look(names, min(launch.launched for launch, _, _ in asked))
    if sighting.queue is not None:
        for launch, ledger, claim in asked:
            submitting = launch.submitted() is None and claims.is_alive(claim)
            _update(launch, ledger, sighting, submitting)
            ledger.save(launch)
    return sighting


def reconcile_twice(out: Path, waiting: Callable[[int], None]) -> Sighting | None:
    """``reconcile``; where jobs are unknown to the scheduler, again until it says more or enough time has passed.

    Args:
        waiting: told how many jobs are unknown, before each wait.
    """
    sighting = reconcile(out)
    while sighting is not None and sighting.queue is not None:
        absent = len(read_flight(out).absent())
        if not absent:
            break
        waiting(absent)
        time.sleep(LOOK_SECONDS)
        sighting = reconcile(out)
    return sighting


def _update(launch: Launch, ledger: Ledger, sighting: Sighting, submitting: bool) -> None:
    """One launch's ledger after a look at the queue that succeeded."""
    ledger.looked = sighting.at
    open_packs = [p for p in launch.places if not ledger.entries.get(p, Entry(state="")).ended]
    attempts = launch.attempts(open_packs)
    for pack in open_packs:
        before = ledger.entries.get(pack)
        entry = _entry(launch.places[pack], before, sighting, submitting, cancelled=ledger.cancelled is not None)
        if entry.ended is not None:
            entry = _with_last_words(entry, attempts.get(pack, []))
        ledger.entries[pack] = entry


def _entry(
    place: tuple[str, int], before: Entry | None, sighting: Sighting, submitting: bool, *, cancelled: bool
) -> Entry:
    assert sighting.queue is not None
    queued = sighting.queue.get(place)
    accounted = (sighting.accounting or {}).get(place)
    if queued is not None and not queued.terminal:
        # A state that nobody knows is neither success nor failure.
        return _from_job(queued, ended=None)
    over = queued or accounted
    if over is not None and over.terminal:
        return _from_job(over, ended=_ENDED_AS.get(over.state, "lost"))
    if submitting:
        return Entry(state=SUBMITTING)
    known = before or Entry(state=ABSENT)
    since = known.absent_since or sighting.at
    ended = "cancelled" if cancelled else "lost" if sighting.at - since >= ABSENT_SECONDS else None
    return Entry(
        state=ABSENT, job=known.job, nodes=known.nodes, restarts=known.restarts, absent_since=since, ended=ended
    )


def _from_job(job: JobState, *, ended: str | None) -> Entry:
    return Entry(state=job.state, job=job.job, reason=job.reason, nodes=job.nodes, restarts=job.restarts, ended=ended)


def _with_last_words(entry: Entry, attempts: list[Attempt]) -> Entry:
    """What the job itself wrote down counts more than its exit code."""
    if not attempts:
        return entry
    last = attempts[-1]
    values = asdict(entry)
    said = last.end or {}
    if said.get("reason") == "walltime" and entry.ended == "lost":
        values["ended"] = "timeout"
    # A whole walltime without a measurement is as good as a death.
    died = said.get("measured") == 0 if last.end else entry.state in _DIED_AS
    if died and last.measuring is not None:
        values |= {"suspect": last.measuring, "suspect_log": last.log, "suspect_began": last.started}
    return Entry(**values)


def _add_slurm(flight: Flight, out: Path, claim: Claim) -> None:
    launch = Launch.load(out, claim.launch)
    ledger = Ledger.load(launch)
    if not ledger.settled(launch):
        flight.launches.append((launch, ledger))
    open_packs = [p for p in claim.packs if not ledger.entries.get(p, Entry(state="")).ended]
    attempts = launch.attempts(open_packs) if open_packs else {}
    rungs = {p: launch.shapes[c.shape].rung for c in launch.chunks for p in c.packs}
    for pack, keys in claim.packs.items():
        entry = ledger.entries.get(pack)
        if entry is None or entry.ended is None:
            last = attempts[pack][-1] if pack in attempts else None
            running = {last.measuring} if last and last.measuring and last.end is None else set()
            _hold(flight, set(keys) - running, running)
            continue
        _end(flight, keys, entry.ended)
        if entry.ended == "oom":
            flight.rungs |= dict.fromkeys(keys, rungs[pack] + 1)
        if entry.suspect is not None:
            flight.suspects.setdefault(entry.suspect, []).append((entry.suspect_log, entry.suspect_began))
        if entry.ended == "node_fail" and entry.nodes:
            flight.failed_on |= dict.fromkeys(keys, entry.nodes)


def _hold(flight: Flight, queued: Collection[str], running: Collection[str]) -> None:
    flight.queued |= set(queued)
    flight.running |= set(running)
    for m in (*queued, *running):
        flight.ended.pop(m, None)


def _end(flight: Flight, keys: Collection[str], how: str) -> None:
    flight.ended |= dict.fromkeys(keys, how)


def job_counts(flight: Flight) -> Mapping[str, int]:
    """Jobs of unsettled launches by the scheduler's last word."""
    counts: dict[str, int] = {}
    for launch, ledger in flight.launches:
        for pack in launch.places:
            entry = ledger.entries.get(pack)
            if entry is None or entry.ended is None:
                state = entry.state if entry else "UNKNOWN"
                counts[state] = counts.get(state, 0) + 1
    return counts
