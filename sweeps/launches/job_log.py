"""Keep what was seen of a SLURM launch's jobs with the launch, so that reading results asks no scheduler."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

from sweeps.files import read_json, write_atomically
from sweeps.launches.launch import Launch

FUTURE_SECONDS: Final = 60.0
"""A time so far ahead of the store's clock was told by another machine's, and says nothing."""
SUBMITTING: Final = "SUBMITTING"
ABSENT: Final = "ABSENT"
BUDGET: Final = "budget"
_UNWRITTEN: Final[dict[Path, JobLog]] = {}
"""By launch directory, what this process saw and could not write down: who may only read still gets the truth."""


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """The known state of one pack's job.

    Attributes:
        state: SLURM's word, or SUBMITTING (the launcher has not submitted it yet) or ABSENT (unknown to the scheduler).
        absent_since: first successful look that didn't know the job.
        ended: how it ended, once that is sure: 'lost', 'timeout', 'oom', 'node_fail', 'preempted', 'cancelled', or
            ``BUDGET``: its share of the budget was spent, and what it did not begin is given back.
        seen: the last look that knew the job.
        finished_at: when the job said that it had finished; 0 where it didn't.
        last: the measurement that it stored last, by its word; None where it named none.
        suspect: measurement in flight when the job died without a word; its log, and when that attempt began.
    """

    state: str
    job: str = ""
    reason: str = ""
    nodes: str = ""
    restarts: int = 0
    absent_since: float | None = None
    ended: str | None = None
    seen: float = 0.0
    finished_at: float = 0.0
    last: str | None = None
    suspect: str | None = None
    suspect_log: str = ""
    suspect_began: float = 0.0


@dataclass(kw_only=True)
class JobLog:
    """The scheduler's last word on every pack of a launch.

    Attributes:
        looked: the last successful look at the queue, in epoch seconds; 0 is never.
        cancelled: whether the user cancelled the launch (``Launch.cancel``); a job that is gone since was cancelled.
        preflights: (job, state, reason) of the preflights that wait or run, by name.
    """

    entries: dict[str, JobRecord] = field(default_factory=dict)
    looked: float = 0.0
    cancelled: bool = False
    preflights: dict[str, tuple[str, str, str]] = field(default_factory=dict)

    @classmethod
    def load(cls, launch: Launch) -> JobLog:
        job_log = cls(cancelled=launch.cancelled())
        try:
            data = read_json(launch.directory / "ledger.json")
        except FileNotFoundError:
            pass
        else:
            job_log.entries = {p: JobRecord(**e) for p, e in data["entries"].items()}
            job_log.looked = data["looked"]
            job_log.preflights = {name: tuple(told) for name, told in data.get("preflights", {}).items()}
        if launch.directory in _UNWRITTEN:
            job_log._merge(_UNWRITTEN[launch.directory])
        return job_log

    def save(self, launch: Launch) -> None:
        """Write it down, with what others wrote meanwhile; where that can't be done, keep it for this process."""
        current = JobLog.load(launch)
        current.clamp(self.looked)
        current._merge(self)
        data = {"entries": {p: asdict(e) for p, e in current.entries.items()}, "looked": current.looked}
        data |= {"preflights": current.preflights}
        try:
            write_atomically(launch.directory / "ledger.json", json.dumps(data).encode())
        except OSError:
            _UNWRITTEN[launch.directory] = current
        else:
            _UNWRITTEN.pop(launch.directory, None)

    def _merge(self, other: JobLog) -> None:
        """Take over what another look saw: the newer counts, but what has ended stays so until it is seen alive."""
        newer = other.looked >= self.looked
        for pack, entry in other.entries.items():
            mine = self.entries.get(pack)
            is_alive = newer and not entry.ended and entry.seen == other.looked
            if mine is None or is_alive or (not mine.ended and (newer or entry.ended)):
                self.entries[pack] = entry
        self.looked = max(self.looked, other.looked)
        if newer:
            self.preflights = other.preflights

    def clamp(self, now: float) -> None:
        """Bring times that lie in the future back to ``now``: they would outrank every later look."""
        latest = now + FUTURE_SECONDS
        self.looked = self.looked if self.looked <= latest else now
        for pack, e in self.entries.items():
            absent = e.absent_since if e.absent_since is None or e.absent_since <= latest else now
            seen = e.seen if e.seen <= latest else now
            finished = e.finished_at if e.finished_at <= latest else now
            self.entries[pack] = replace(e, absent_since=absent, seen=seen, finished_at=finished)

    def settled(self, launch: Launch) -> bool:
        """Whether every pack's job is known to be over."""
        return all(pack in self.entries and self.entries[pack].ended for chunk in launch.chunks for pack in chunk.packs)
