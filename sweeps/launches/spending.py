"""Measure what a study has spent, in device-seconds: by its jobs' attempts where it ran as jobs, else by its rows.

A job holds its GPUs while it starts, waits and fails, so what it spent is its time, as its attempts tell it. Work on
this machine spent what its rows say: loading, quantizing and evaluating, of failures and of dropped rows too.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from sweeps.events import Crashed, Event, Measured, Measuring, PackDone, Started, Stopped
from sweeps.files import clock
from sweeps.launches.job_log import JobLog, JobRecord
from sweeps.launches.launch import Attempt, Launch, launches
from sweeps.plan.cost import load_seconds
from sweeps.store.parts import Store
from sweeps.store.rows import moment
from sweeps.store.schema import Row

COLUMNS: Final = (
    *("sweep", "launch", "key", "model", "status", "started", "finished", "seconds", "quantize_seconds"),
    *("load_seconds", "gpus"),
)


@dataclass(kw_only=True)
class Meter:
    """Adds up the device-seconds of rows.

    A load is shared by the rows of many cells and a quantization by those of one: each is counted once, known by what
    it took, to the last bit.
    """

    seconds: float = 0.0
    _seen: set[tuple[object, ...]] = field(default_factory=set)

    def add(self, row: Row) -> None:
        """Count a row (``COLUMNS`` but for the study)."""
        devices, launch = max(1, row.get("gpus") or 0), row.get("launch")
        took = max(0.0, (moment(row["finished"]) - moment(row["started"])).total_seconds())
        parts = [("load", launch, row["model"], row.get("load_seconds"))]
        parts += [("quantize", launch, row["key"], row.get("quantize_seconds"))]
        if row.get("seconds") is None:
            # What fails as its model is loaded or quantized fails all evaluations of the cell at once.
            parts += [("failed", launch, f"{row['key']} {row['started']}", took)]
        else:
            self.seconds += devices * took
        for part in parts:
            if part[-1] and part not in self._seen:
                self._seen.add(part)
                self.seconds += devices * float(str(part[-1]))


@dataclass(kw_only=True)
class BudgetWatch:
    """Follows workers on this machine, each on one device, and tells when what is left of a budget is spent.

    Attributes:
        left: device-seconds.
    """

    left: float
    _meter: Meter = field(default_factory=Meter)
    _began: dict[int, float] = field(default_factory=dict)

    def is_spent(self, event: Event, worker: int) -> bool:
        """Take in one event of a worker.

        What is in flight counts so far. Only with a measurement stored can the budget be spent: stopped before that, a
        study would have nothing to show for its time, and try the same again.
        """
        match event:
            case Started() | Measuring():
                self._began.setdefault(worker, time.monotonic())
            case Measured():
                self._meter.add(event.row)
                self._began.pop(worker, None)
            case PackDone() | Stopped() | Crashed():
                self._began.pop(worker, None)
        if not isinstance(event, Measured):
            return False
        now = time.monotonic()
        return self._meter.seconds + sum(now - began for began in self._began.values()) >= self.left


@dataclass(frozen=True, kw_only=True)
class Spending:
    """What a study has spent, and what its jobs may still spend, in device-seconds."""

    spent: float
    held: float = 0.0

    def left(self, budget: float) -> float:
        """Return what is left of a budget; 0 where it is spent."""
        return max(0.0, budget - self.spent - self.held)


def read_spending(store: Store, sweep: str) -> Spending:
    """Return what a study has spent in a results directory, whoever launched it."""
    of_jobs = [launch for launch in launches(store.out) if launch.sweep == sweep]
    ids = {launch.id for launch in of_jobs}
    meter = Meter()
    for row in store.history(COLUMNS):
        if row["sweep"] == sweep and str(row["launch"]).partition(" ")[0] not in ids:
            meter.add(row)
    spent, held = meter.seconds, 0.0
    for launch in of_jobs:
        of_launch = _jobs_spending(launch)
        spent, held = spent + of_launch.spent, held + of_launch.held
    return Spending(spent=spent, held=held)


def _jobs_spending(launch: Launch) -> Spending:
    job_log = JobLog.load(launch)
    attempts = launch.attempts(launch.places)
    now = clock(launch.out)
    spent = held = 0.0
    for chunk in launch.chunks:
        devices = max(1, launch.shapes[chunk.shape].gpus)
        for pack in chunk.packs:
            entry = job_log.entries.get(pack, JobRecord(state=""))
            used = devices * pack_seconds(attempts.get(pack, []), entry, now)
            spent += used
            if entry.ended is None:
                held += max(0.0, _allowed(launch, pack, devices) - used)
    return Spending(spent=spent, held=held)


def _allowed(launch: Launch, pack: str, devices: int) -> float:
    """Return the device-seconds that a pack's job may take: what its budget allows, else what was predicted."""
    known = launch.settings.allowances.get(pack)
    if known is not None:
        return known
    planned = launch.pack(pack)
    return devices * (load_seconds(planned.model) + planned.seconds)


def pack_seconds(attempts: list[Attempt], entry: JobRecord, now: float) -> float:
    """Return for how long the jobs of one pack held their devices.

    Args:
        attempts: oldest first.
        entry: the scheduler's last word, which bounds an attempt that died without one of its own.
        now: by the store's clock, as all times of attempts are.
    """
    last = now if entry.ended is None else entry.seen
    seconds = 0.0
    for attempt, following in pairwise([*attempts, None]):
        assert attempt is not None
        end = (attempt.end or {}).get("at") or (following.started if following else last)
        seconds += max(0.0, float(end) - attempt.started)
    return seconds


def allowance_ends(launch: Launch, attempt: Attempt) -> float:
    """Return when an attempt has spent its pack's allowance, by this machine's clock; infinity where it has none.

    Earlier attempts at the pack had their part of it.
    """
    allowance = launch.settings.allowances.get(attempt.pack)
    if allowance is None:
        return math.inf
    others = launch.attempts([attempt.pack]).get(attempt.pack, [])
    earlier = [a for a in others if (a.job, a.restart) != (attempt.job, attempt.restart)]
    now = clock(launch.out)
    used = pack_seconds(earlier, JobRecord(state="", ended="requeued", seen=attempt.started), now)
    devices = max(1, launch.shapes[launch.chunk_of(attempt.pack).shape].gpus)
    return time.time() + allowance / devices - used - (now - attempt.started)
