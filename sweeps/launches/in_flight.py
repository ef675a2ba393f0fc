"""Join claims, attempts and job records: who computes what, and how work ended that left no result.

Reads files, and asks no scheduler: what each executor saw of its jobs it keeps in the launch's directory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Final

from sweeps.files import clock
from sweeps.launches.claims import Claim, Claims
from sweeps.launches.job_log import BUDGET, JobLog, JobRecord
from sweeps.launches.launch import Attempt, Launch, launch_dir
from sweeps.store.parts import Store

log = logging.getLogger(__name__)

SETTLE_SECONDS: Final = 120.0
"""A network file system may show what a job stored only so long after the job said that it had finished."""
_AT_WORK: Final = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")
_REPORTED: Final[set[Path]] = set()
"""Launch directories that were already said to be gone in this process."""


@dataclass(kw_only=True)
class InFlight:
    """Measurements that claims hold, by what became of them.

    Attributes:
        running, queued: held by launches that may still be at work.
        ended: how work ended that its launch can't do any more: 'lost', 'timeout', ...; what is stored counts first.
        rungs: next step of the out-of-memory ladder, of those whose job ran out of memory.
        suspects: (log, began) of each job that died without a word while measuring this.
        launches: launches of jobs that are not settled, with their ledgers.
        executors: names of these launches' executors, by launch id.
        local: live claims of workers on one machine.
        failed_on: nodes that failed under a measurement's job, by measurement.
    """

    running: set[str] = field(default_factory=set)
    queued: set[str] = field(default_factory=set)
    ended: dict[str, str] = field(default_factory=dict)
    rungs: dict[str, int] = field(default_factory=dict)
    suspects: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    launches: list[tuple[Launch, JobLog]] = field(default_factory=list)
    executors: dict[str, str] = field(default_factory=dict)
    local: list[Claim] = field(default_factory=list)
    failed_on: dict[str, str] = field(default_factory=dict)

    def nodes_that_failed(self, measurements: Collection[str]) -> set[str]:
        """Nodes that failed under the last jobs of some measurements."""
        return {self.failed_on[m] for m in measurements if m in self.failed_on}

    @property
    def held(self) -> set[str]:
        return self.running | self.queued

    def absent(self) -> list[tuple[Launch, JobRecord]]:
        """Jobs that the last look didn't know, and that are not given up yet."""
        return [
            (la, e) for la, job_log in self.launches for e in job_log.entries.values() if e.absent_since and not e.ended
        ]


def read_flight(out: Path) -> InFlight:
    """Bring claims, attempts and ledgers together, without asking anybody."""
    claims = Claims(out=out)
    flight = InFlight()
    now = cache(partial(clock, out))
    stored = cache(partial(_stored, out))
    # In their order: what a later claim holds is that claim's.
    for claim in claims.open():
        if claim.detached:
            launch = load_launch(out, claim)
            if launch is not None:
                _add_jobs(flight, launch, claim, now, stored)
            else:
                _end(flight, claim.measurements, "lost")
        elif claims.is_alive(claim):
            flight.local.append(claim)
            running = claims.running(claim)
            _hold(flight, claim.measurements - running, running)
        else:
            _end(flight, claim.measurements, "lost")
    if flight.ended:
        # What was dropped was stored: its work did not end without a record.
        for measurement in Store(out=out).dropped(flight.ended):
            del flight.ended[measurement]
    return flight


def load_launch(out: Path, claim: Claim) -> Launch | None:
    """Return the launch of a claim; None, and a warning, if its directory was deleted: the claim is over then."""
    try:
        return Launch.load(out, claim.launch)
    except FileNotFoundError:
        gone = launch_dir(out, claim.launch)
        if gone not in _REPORTED:
            _REPORTED.add(gone)
            log.warning("%s is gone: what its jobs did not store counts as lost", gone)
        return None


def _add_jobs(
    flight: InFlight,
    launch: Launch,
    claim: Claim,
    now: Callable[[], float],
    stored: Callable[[], frozenset[str] | None],
) -> None:
    job_log = JobLog.load(launch)
    if not job_log.settled(launch):
        flight.launches.append((launch, job_log))
        flight.executors[launch.id] = claim.executor
    open_packs = [p for p in claim.packs if not job_log.entries.get(p, JobRecord(state="")).ended]
    attempts = launch.attempts(open_packs) if open_packs else {}
    rungs = {p: launch.shapes[c.shape].rung for c in launch.chunks for p in c.packs}
    for pack, keys in claim.packs.items():
        entry = job_log.entries.get(pack)
        if entry is None or entry.ended is None:
            running = _measuring(entry, attempts.get(pack, []))
            _hold(flight, set(keys) - running, running)
            continue
        if _settles(entry, now) and not _in_sight(entry, keys, stored()):
            _hold(flight, keys, ())
            continue
        if entry.ended == BUDGET:
            _give_back(flight, keys)
            continue
        _end(flight, keys, entry.ended)
        if entry.ended == "oom":
            flight.rungs |= dict.fromkeys(keys, rungs[pack] + 1)
        if entry.suspect is not None:
            flight.suspects.setdefault(entry.suspect, []).append((entry.suspect_log, entry.suspect_began))
        if entry.ended == "node_fail" and entry.nodes:
            flight.failed_on |= dict.fromkeys(keys, entry.nodes)


def _measuring(entry: JobRecord | None, attempts: list[Attempt]) -> set[str]:
    """Return what a pack's job is measuring; nothing where it is back in the queue since its last attempt."""
    last = attempts[-1] if attempts else None
    if last is None or last.measuring is None or last.end is not None:
        return set()
    # An attempt that began after the last look knows more than the look.
    if entry is None or last.started > entry.seen:
        return {last.measuring}
    if entry.state not in _AT_WORK or last.restart < entry.restarts:
        return set()
    return {last.measuring}


def _settles(entry: JobRecord, now: Callable[[], float]) -> bool:
    """Tell whether a pack finished just now, so that not all of it may have come into sight in the store yet."""
    return entry.ended == "lost" and bool(entry.finished_at) and abs(now() - entry.finished_at) < SETTLE_SECONDS


def _in_sight(entry: JobRecord, keys: Collection[str], stored: frozenset[str] | None) -> bool:
    """Tell whether all that a finished pack stored is in sight: where its last row is, those before it are, too.

    What it left to a later launch has no row. A job that measured nothing, or is of an earlier version, names none.
    """
    return stored is None or stored.issuperset(keys if entry.last is None else {entry.last})


def _stored(out: Path) -> frozenset[str] | None:
    """Return every measurement of which a row is in sight, whatever it says.

    None where files are damaged: what they held is in sight too, and does not come any more.
    """
    store = Store(out=out)
    keys = store.keys()
    return None if store.damaged else keys


def _hold(flight: InFlight, queued: Collection[str], running: Collection[str]) -> None:
    flight.queued |= set(queued)
    flight.running |= set(running)
    for m in (*queued, *running):
        flight.ended.pop(m, None)


def _give_back(flight: InFlight, keys: Collection[str]) -> None:
    """Measurements that a job did not begin, in order: nobody has them, and nothing befell them."""
    for m in keys:
        flight.ended.pop(m, None)


def _end(flight: InFlight, keys: Collection[str], how: str) -> None:
    flight.ended |= dict.fromkeys(keys, how)


def job_counts(flight: InFlight) -> Mapping[str, int]:
    """Jobs of unsettled launches by the scheduler's last word."""
    counts: dict[str, int] = {}
    for launch, job_log in flight.launches:
        for pack in launch.places:
            entry = job_log.entries.get(pack)
            if entry is None or entry.ended is None:
                state = entry.state if entry else "UNKNOWN"
                counts[state] = counts.get(state, 0) + 1
    return counts
