"""Who is at what, and how work ended that left no record: claims, attempts and the scheduler's word brought together.

Absence is not death: the jobs of a pack are over only on a terminal state from the scheduler, or when two successful
looks, ``ABSENT_SECONDS`` apart, don't know them. What was seen is kept in each launch's ledger, so that reading results
asks no scheduler, and a cluster without accounting forgets nothing. Where a look need not show a job at all (another
user's, another cluster's), its absence says nothing.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from sweeps.executors.slurm.query import JobState, Sighting, look
from sweeps.launches.claims import Claim, Claims
from sweeps.launches.launch import Attempt, Launch, launch_dir
from sweeps.launches.ledger import ABSENT, SUBMITTING, Entry, Ledger
from sweeps.status import State

log = logging.getLogger(__name__)

ABSENT_SECONDS: Final = 30.0
SETTLE_SECONDS: Final = 120.0
"""A network file system may show what a job stored only so long after the job said that it had finished."""
LOOK_SECONDS: Final = 5.0
_ENDED_AS: Final = {
    "TIMEOUT": State.TIMEOUT,
    "DEADLINE": State.TIMEOUT,
    "OUT_OF_MEMORY": State.OOM,
    "NODE_FAIL": State.NODE_FAIL,
    "BOOT_FAIL": State.NODE_FAIL,
    "LAUNCH_FAILED": State.NODE_FAIL,
    "PREEMPTED": State.PREEMPTED,
    "CANCELLED": State.CANCELLED,
    "REVOKED": State.CANCELLED,
}
_AT_WORK: Final = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")
_DIED_AS: Final = ("FAILED", "TIMEOUT", "COMPLETED", ABSENT)
"""Ends that count against the measurement that was in flight, where the job did not say a word of its own."""
_REPORTED: Final[set[Path]] = set()
"""Launch directories that were already said to be gone in this process."""


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

    def unseen(self) -> Counter[tuple[str, str]]:
        """Jobs by (user, cluster) that the last look did not show, and need not have shown."""
        entries = (
            (la, ledger.looked, ledger.entries.get(pack, Entry(state="")))
            for la, ledger in self.launches
            if not la.in_sight()
            for pack in la.places
        )
        return Counter((la.user, la.cluster) for la, looked, e in entries if not e.ended and e.seen < looked)


def read_flight(out: Path) -> Flight:
    """Bring claims, attempts and ledgers together, without asking anybody."""
    claims = Claims(out=out)
    flight = Flight()
    # In their order: what a later claim holds is that claim's.
    for claim in claims.open():
        if claim.executor == "slurm":
            launch = load_launch(out, claim)
            if launch is not None:
                _add_slurm(flight, launch, claim)
            else:
                _end(flight, claim.measurements, "lost")
        elif claims.is_alive(claim):
            flight.local.append(claim)
            running = claims.running(claim)
            _hold(flight, claim.measurements - running, running)
        else:
            _end(flight, claim.measurements, "lost")
    return flight


def load_launch(out: Path, claim: Claim) -> Launch | None:
    """The launch of a claim; None, and a warning, where somebody deleted its directory: the claim is over then."""
    try:
        return Launch.load(out, claim.launch)
    except FileNotFoundError:
        gone = launch_dir(out, claim.launch)
        if gone not in _REPORTED:
            _REPORTED.add(gone)
            log.warning("%s is gone: what its jobs did not store counts as lost", gone)
        return None


def reconcile(out: Path) -> Sighting | None:
    """Ask the scheduler about every launch that isn't settled, in at most two calls, and write down what it says.

    Returns what was seen; None where there was nothing to ask about.
    """
    claims = Claims(out=out)
    asked = [
        (launch, ledger, claim)
        for claim in claims.open()
        if claim.executor == "slurm"
        for launch in [load_launch(out, claim)]
        if launch is not None
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


def has_scheduler() -> bool:
    """Whether SLURM can be asked on this machine at all."""
    return shutil.which("squeue") is not None


def _update(launch: Launch, ledger: Ledger, sighting: Sighting, submitting: bool) -> None:
    """One launch's ledger after a look at the queue that succeeded."""
    ledger.looked = sighting.at
    open_packs = [p for p in launch.places if not ledger.entries.get(p, Entry(state="")).ended]
    attempts = launch.attempts(open_packs)
    for pack in open_packs:
        before = ledger.entries.get(pack)
        entry = _entry(launch.places[pack], before, sighting, submitting, cancelled=ledger.cancelled)
        if entry.state == ABSENT and not launch.in_sight():
            continue
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
        return _from_job(queued, sighting.at, ended=None)
    over = queued or accounted
    if over is not None and over.terminal:
        return _from_job(over, sighting.at, ended=_ENDED_AS.get(over.state, "lost"))
    if submitting:
        return Entry(state=SUBMITTING)
    known = before or Entry(state=ABSENT)
    since = known.absent_since or sighting.at
    ended = "cancelled" if cancelled else "lost" if sighting.at - since >= ABSENT_SECONDS else None
    return replace(known, state=ABSENT, reason="", absent_since=since, ended=ended)


def _from_job(job: JobState, at: float, *, ended: str | None) -> Entry:
    return Entry(
        state=job.state, job=job.job, reason=job.reason, nodes=job.nodes, restarts=job.restarts, ended=ended, seen=at
    )


def _with_last_words(entry: Entry, attempts: list[Attempt]) -> Entry:
    """What the job itself wrote down counts more than its exit code."""
    if not attempts:
        return entry
    last = attempts[-1]
    said = last.end or {}
    reason = said.get("reason")
    # SLURM says so also where one process of the job was killed and the job went on.
    own_end = reason in ("walltime", "finished", "terminated") and not said.get("requeued")
    if entry.ended == "oom" and own_end:
        entry = replace(entry, ended="lost")
    if reason == "walltime" and entry.ended == "lost":
        entry = replace(entry, ended="timeout")
    if reason == "finished":
        entry = replace(entry, finished_at=float(said["at"]))
    # A whole walltime without a measurement is as good as a death.
    died = entry.state in _DIED_AS and (last.end is None or said.get("measured") == 0)
    if died and last.measuring is not None:
        entry = replace(entry, suspect=last.measuring, suspect_log=last.log, suspect_began=last.started)
    return entry


def _add_slurm(flight: Flight, launch: Launch, claim: Claim) -> None:
    ledger = Ledger.load(launch)
    if not ledger.settled(launch):
        flight.launches.append((launch, ledger))
    open_packs = [p for p in claim.packs if not ledger.entries.get(p, Entry(state="")).ended]
    attempts = launch.attempts(open_packs) if open_packs else {}
    rungs = {p: launch.shapes[c.shape].rung for c in launch.chunks for p in c.packs}
    for pack, keys in claim.packs.items():
        entry = ledger.entries.get(pack)
        if entry is None or entry.ended is None:
            running = _measuring(entry, attempts.get(pack, []))
            _hold(flight, set(keys) - running, running)
            continue
        if _settling(launch, pack, entry):
            _hold(flight, keys, ())
            continue
        _end(flight, keys, entry.ended)
        if entry.ended == "oom":
            flight.rungs |= dict.fromkeys(keys, rungs[pack] + 1)
        if entry.suspect is not None:
            flight.suspects.setdefault(entry.suspect, []).append((entry.suspect_log, entry.suspect_began))
        if entry.ended == "node_fail" and entry.nodes:
            flight.failed_on |= dict.fromkeys(keys, entry.nodes)


def _measuring(entry: Entry | None, attempts: list[Attempt]) -> set[str]:
    """What a pack's job is measuring; nothing where it is back in the queue since its last attempt."""
    last = attempts[-1] if attempts else None
    if last is None or last.measuring is None or last.end is not None:
        return set()
    # An attempt that began after the last look knows more than the look.
    if entry is None or last.started > entry.seen:
        return {last.measuring}
    if entry.state not in _AT_WORK or last.restart < entry.restarts:
        return set()
    return {last.measuring}


def _settling(launch: Launch, pack: str, entry: Entry) -> bool:
    """Whether a pack that finished just now has not come into sight in the store yet."""
    if entry.ended != "lost" or abs(time.time() - entry.finished_at) >= SETTLE_SECONDS:
        return False
    return next((launch.out / "packs").glob(f"{pack}-*.parquet"), None) is None


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
