"""SLURM's word on the jobs of launches, written into each launch's job log.

Absence is not death: the jobs of a pack are over only on a terminal state from the scheduler, or when two successful
looks, ``ABSENT_SECONDS`` apart, don't know them. A cluster without accounting forgets nothing, since what was seen is
kept. Where a look need not show a job at all (another user's, another cluster's), its absence says nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Final

from sweeps.executors.slurm.query.jobs import JobSnapshot, JobState, query_jobs
from sweeps.executors.slurm.query.where import in_sight
from sweeps.files import clock
from sweeps.launches.claims import Claim, Claims
from sweeps.launches.in_flight import load_launch, read_flight
from sweeps.launches.job_log import ABSENT, BUDGET, SUBMITTING, JobLog, JobRecord
from sweeps.launches.launch import Attempt, Launch
from sweeps.status import State

ABSENT_SECONDS: Final = 30.0
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
_DIED_AS: Final = ("FAILED", "TIMEOUT", "COMPLETED", ABSENT)
"""Ends that count against the measurement that was in flight, where the job did not say a word of its own."""


def reconcile(out: Path) -> JobSnapshot | None:
    """Ask the scheduler about every launch whose jobs may still work, in at most two calls; write down what it says.

    A launch that is not settled is asked about in the queue and in accounting. One whose jobs ended before their work
    was finished is looked for in the queue alone: a job that ended can be requeued by hand.

    Returns what was seen; None where there was nothing to ask about.
    """
    claims = Claims(out=out)
    asked: list[tuple[Launch, JobLog, Claim]] = []
    taken: set[str] = set()
    for claim in reversed(claims.open()):
        launch = load_launch(out, claim) if claim.executor == "slurm" else None
        if launch is not None:
            job_log = JobLog.load(launch)
            if not job_log.settled(launch) or _may_come_back(job_log, claim, taken):
                asked.append((launch, job_log, claim))
        taken |= claim.measurements
    if not asked:
        return None
    names = [name for launch, _, _ in asked for name in (*_chunk_names(launch), *_preflight_names(launch))]
    unsettled = [name for launch, job_log, _ in asked if not job_log.settled(launch) for name in _chunk_names(launch)]
    # By the store's clock: those of the machines that look differ.
    since = min(launch.settings.store_launched or launch.launched for launch, _, _ in asked)
    snapshot = query_jobs(names, since, at=clock(out), accounted=unsettled)
    if snapshot.queue is None and not unsettled:
        # What ended stays so; that the scheduler can't be asked, e.g. where there is none, is no news.
        return None
    if snapshot.queue is not None:
        for launch, job_log, claim in reversed(asked):
            submitting = launch.submitted() is None and claims.is_alive(claim)
            _update(launch, job_log, snapshot, submitting)
            job_log.save(launch)
    return snapshot


def _chunk_names(launch: Launch) -> list[str]:
    return [launch.chunk_name(c.number) for c in launch.chunks]


def _preflight_names(launch: Launch) -> list[str]:
    return [launch.preflight_name(shape) for shape in range(len(launch.shapes))]


def _may_come_back(job_log: JobLog, claim: Claim, taken: AbstractSet[str]) -> bool:
    """Tell whether a job of a launch that is over has work that it did not finish and that no later launch holds."""
    return any(
        not job_log.entries[pack].finished_at and not taken >= set(keys)
        for pack, keys in claim.packs.items()
        if pack in job_log.entries
    )


def reconcile_twice(out: Path, waiting: Callable[[int, float], None]) -> JobSnapshot | None:
    """Reconcile; where jobs are unknown to the scheduler, again until it says more or enough time has passed.

    Args:
        out: directory of results.
        waiting: told how many jobs are unknown and how many seconds it may take, before each wait.
    """
    snapshot = reconcile(out)
    while snapshot is not None and snapshot.queue is not None:
        absent = read_flight(out).absent()
        if not absent:
            break
        since = max(entry.absent_since or snapshot.at for _, entry in absent)
        waiting(len(absent), max(LOOK_SECONDS, ABSENT_SECONDS - (snapshot.at - since)))
        time.sleep(LOOK_SECONDS)
        snapshot = reconcile(out)
    return snapshot


def _update(launch: Launch, job_log: JobLog, snapshot: JobSnapshot, submitting: bool) -> None:
    """Update one launch's job log after a look at the queue that succeeded."""
    assert snapshot.queue is not None
    job_log.clamp(snapshot.at)
    job_log.looked = snapshot.at
    job_log.preflights = {
        name: (job.job, job.state, job.reason)
        for (name, _), job in snapshot.queue.items()
        if job.live and name in _preflight_names(launch)
    }
    open_packs = [p for p in launch.places if not job_log.entries.get(p, JobRecord(state="")).ended]
    attempts, cancelled = launch.attempts(open_packs), launch.cancelled_packs()
    for pack, place in launch.places.items():
        queued = snapshot.queue.get(place)
        if pack not in open_packs:
            if queued is not None and queued.live:
                # It had ended, and was requeued by hand since.
                job_log.entries[pack] = _from_job(queued, snapshot.at, ended=None)
            continue
        before, tried = job_log.entries.get(pack), attempts.get(pack, [])
        entry = _entry(place, before, snapshot, submitting, cancelled=pack in cancelled, tried=tried)
        if entry.state == ABSENT and not in_sight(launch):
            if not _has_left(tried):
                continue
            entry = replace(entry, ended="lost")
        if entry.ended is not None:
            entry = _with_last_words(entry, tried)
        job_log.entries[pack] = entry


def _entry(
    place: tuple[str, int],
    before: JobRecord | None,
    snapshot: JobSnapshot,
    submitting: bool,
    *,
    cancelled: bool,
    tried: Sequence[Attempt],
) -> JobRecord:
    assert snapshot.queue is not None
    queued = snapshot.queue.get(place)
    accounted = (snapshot.accounting or {}).get(place)
    if queued is not None and not queued.terminal:
        # A state that nobody knows is neither success nor failure.
        return _from_job(queued, snapshot.at, ended=None)
    over = queued or accounted
    if over is not None and over.terminal:
        return _from_job(over, snapshot.at, ended=_ENDED_AS.get(over.state, "lost"))
    if submitting:
        return JobRecord(state=SUBMITTING)
    known = before or JobRecord(state=ABSENT)
    since = known.absent_since or snapshot.at
    if tried and tried[-1].end is None:
        # A job that says a word is alive, whatever the queue shows. Accounting alone may say RUNNING for ever.
        since = max(since, min(tried[-1].touched, snapshot.at))
    ended = "cancelled" if cancelled else "lost" if snapshot.at - since >= ABSENT_SECONDS else None
    return replace(known, state=ABSENT, reason="", absent_since=since, ended=ended)


def _has_left(attempts: Sequence[Attempt]) -> bool:
    """Tell whether a job said that it ends, and for good: one that waits for its end may be run again."""
    end = attempts[-1].end if attempts else None
    return end is not None and end["reason"] != "terminated" and not end.get("requeued")


def _from_job(job: JobState, at: float, *, ended: str | None) -> JobRecord:
    return JobRecord(
        state=job.state, job=job.job, reason=job.reason, nodes=job.nodes, restarts=job.restarts, ended=ended, seen=at
    )


def _with_last_words(entry: JobRecord, attempts: list[Attempt]) -> JobRecord:
    """Return the record with what the job itself wrote down: it counts more than the exit code."""
    if not attempts:
        return entry
    last = attempts[-1]
    said = last.end or {}
    reason = said.get("reason")
    # SLURM says so also where one process of the job was killed and the job went on.
    own_end = reason in ("walltime", "finished", "terminated", BUDGET) and not said.get("requeued")
    if entry.ended == "oom" and own_end:
        entry = replace(entry, ended="lost")
    if reason == "walltime" and entry.ended == "lost":
        entry = replace(entry, ended="timeout")
    if reason == BUDGET and entry.ended == "lost":
        entry = replace(entry, ended=BUDGET)
    if reason == "finished":
        entry = replace(entry, finished_at=float(said["at"]), last=said.get("last"))
    # A whole walltime without a measurement is as good as a death.
    died = entry.state in _DIED_AS and (last.end is None or said.get("measured") == 0)
    if died and last.measuring is not None:
        entry = replace(entry, suspect=last.measuring, suspect_log=last.log, suspect_began=last.started)
    return entry
