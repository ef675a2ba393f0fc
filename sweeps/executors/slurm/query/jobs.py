"""The state of jobs: squeue's and sacct's word on them; and cancelling them.

Formats, and not ``--json``: SLURM 22.05, which Debian 12 brings, answers ``squeue --json`` with every job of the
cluster whatever names are asked for, and later versions renamed and retyped its fields more than once.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from sweeps.errors import SchedulerError
from sweeps.executors.slurm.query.command import SEPARATOR, ask, call, one_line

_LIVE_NAMES: Final = (
    "PENDING RUNNING COMPLETING CONFIGURING SUSPENDED REQUEUED REQUEUE_HOLD REQUEUE_FED SPECIAL_EXIT STOPPED RESIZING "
    "SIGNALING STAGE_OUT RESV_DEL_HOLD POWER_UP_NODE EXPEDITING"
)
_TERMINAL_NAMES: Final = (
    "COMPLETED FAILED CANCELLED TIMEOUT OUT_OF_MEMORY NODE_FAIL BOOT_FAIL PREEMPTED DEADLINE LAUNCH_FAILED "
    "RECONFIG_FAIL REVOKED"
)
LIVE: Final = frozenset(_LIVE_NAMES.split())
TERMINAL: Final = frozenset(_TERMINAL_NAMES.split())
MARGIN_SECONDS: Final = 3600.0
"""Clocks of submitting and accounting hosts differ; sacct is asked this much further back."""
MOST_ARGUMENT: Final = 100_000
"""Characters; Linux takes 128 KiB in one argument."""
CANCEL_BATCH: Final = 300

# Without --state sacct leaves out jobs that were never eligible: those held, or cancelled before their dependency was
# met. Only names that every sacct since 20.11 takes; it refuses the whole list for one that it doesn't know.
_SACCT_STATES: Final = (
    "BOOT_FAIL,CANCELLED,COMPLETED,DEADLINE,FAILED,NODE_FAIL,OUT_OF_MEMORY,PENDING,PREEMPTED,REQUEUED,RESIZING,REVOKED,"
    "RUNNING,SUSPENDED,TIMEOUT"
)
_QUEUE_FIELDS: Final = ("JobArrayID", "State", "RestartCnt", "NodeList", "Reason", "Name")
_ACCOUNT_FIELDS: Final = ("JobID", "State", "NodeList", "Submit", "DBIndex", "JobName")


@dataclass(frozen=True, kw_only=True)
class JobState:
    """One job, or one element of an array, as squeue or sacct tells it.

    Attributes:
        name: the job's name; carries the launch and chunk.
        index: array index; 0 for a job that is no array.
        job: '123_4' or '123': what scancel and scontrol take.
        state: SLURM's long name, without what follows it ('CANCELLED by 0' is CANCELLED).
        reason: why it waits, or how it ended; '' when there is none, and always from sacct.
        nodes: node list, '' when none.
        restarts: earlier runs of this job: squeue's count, sacct's duplicate records.
    """

    name: str
    index: int
    job: str
    state: str
    reason: str
    nodes: str
    restarts: int

    @property
    def live(self) -> bool:
        """True if it waits, runs or ends. A state that is neither live nor terminal says nothing."""
        return self.state in LIVE

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL


Jobs = Mapping[tuple[str, int], JobState]


@dataclass(frozen=True, kw_only=True)
class JobSnapshot:
    """The jobs that one look at the scheduler showed.

    Attributes:
        at: epoch seconds.
        queue: by (name, index); ended jobs stay for the cluster's MinJobAge. None: squeue could not be asked.
        accounting: the latest record of each job. None: sacct could not be asked or is absent. It lags behind the
            queue, and never hears of held jobs, nor of array elements that were cancelled one by one while they waited.
        problems: why a command could not be asked, for the user.
    """

    at: float
    queue: Jobs | None
    accounting: Jobs | None
    problems: tuple[str, ...]


def query_jobs(
    names: Collection[str], since: float, *, at: float | None = None, accounted: Collection[str] | None = None
) -> JobSnapshot:
    """Ask squeue and sacct about jobs by name: at most two calls whatever the number.

    Never raises for a scheduler that is down: what could not be asked is None.

    Args:
        names: jobs' names; those that the scheduler doesn't know are no error.
        since: epoch seconds before which none of them was submitted.
        at: now by the clock that ``since`` is of; None is this machine's.
        accounted: which of them accounting is asked about; None is all.
    """
    at = time.time() if at is None else at
    if not names:
        return JobSnapshot(at=at, queue={}, accounting={}, problems=())
    wanted, recorded = frozenset(names), frozenset(names if accounted is None else accounted)
    seconds = math.ceil(max(0.0, at - since) + MARGIN_SECONDS)
    queue: Jobs | None = None
    accounting: Jobs | None = None
    problems = []
    try:
        queue = read_queue(ask(_squeue(wanted)), wanted)
    except SchedulerError as error:
        problems.append(str(error))
    try:
        accounting = read_accounting(ask(_sacct(recorded, seconds)), recorded) if recorded else {}
    except SchedulerError as error:
        problems.append(str(error))
    seen = [*(queue or {}).values(), *(accounting or {}).values()]
    return JobSnapshot(
        at=at,
        queue=None if queue is None else without_parents(queue, seen),
        accounting=None if accounting is None else without_parents(accounting, seen),
        problems=tuple(problems),
    )


def _by_name(names: Collection[str]) -> list[str]:
    joined = ",".join(sorted(names))
    # Names too many for a command line are picked out of everybody's.
    return [f"--name={joined}"] if len(joined.encode()) <= MOST_ARGUMENT else []


def _squeue(names: Collection[str]) -> list[str]:
    """Return the command that asks squeue about jobs of these names."""
    # Without --array: squeue 22.05 loses the last of '0-98:2' when it takes ranges apart itself.
    squeue = ["squeue", "--all", "--noheader", "--states=all", *_by_name(names)]
    return [*squeue, "--Format=" + ",".join(f"{name}:{SEPARATOR}" for name in _QUEUE_FIELDS)]


def _sacct(names: Collection[str], seconds: int) -> list[str]:
    """Return the command that asks sacct about jobs of these names, so many seconds back."""
    sacct = ["sacct", "--duplicates", "--allocations", "--allusers", "--noheader", "--parsable2", *_by_name(names)]
    # Relative times, so that no time zone matters; --state without an end would mean 'in that state at the start'.
    sacct += [f"--starttime=now-{seconds}seconds", "--endtime=now+1days", f"--state={_SACCT_STATES}"]
    return [*sacct, f"--delimiter={SEPARATOR}", "--format=" + ",".join(_ACCOUNT_FIELDS)]


def read_queue(text: str, wanted: Collection[str]) -> dict[tuple[str, int], JobState]:
    """Read squeue's lines as jobs. Of two jobs of one name a live one counts, else the later."""
    found: dict[tuple[str, int], tuple[tuple[bool, int, bool], JobState]] = {}
    for job, state, restarts, nodes, reason, name in _records(text, len(_QUEUE_FIELDS)):
        if name not in wanted:
            continue
        for index, element in array_elements(job):
            seen = JobState(
                name=name,
                index=index,
                job=element,
                state=_state(state),
                reason="" if reason == "None" else reason,
                nodes=_nodes(nodes),
                restarts=int(restarts) if restarts.isdigit() else 0,
            )
            rank = (not seen.terminal, _number(job), "_" in job)
            if (name, index) not in found or rank > found[name, index][0]:
                found[name, index] = (rank, seen)
    return {key: seen for key, (_, seen) in found.items()}


def read_accounting(text: str, wanted: Collection[str]) -> dict[tuple[str, int], JobState]:
    """Read sacct's lines as jobs, the latest record of each."""
    found: dict[tuple[str, int], list[tuple[tuple[int, bool, int], JobState]]] = {}
    for job, state, nodes, submit, record, name in _records(text, len(_ACCOUNT_FIELDS)):
        if name not in wanted:
            continue
        for index, element in array_elements(job):
            seen = JobState(
                name=name, index=index, job=element, state=_state(state), reason="", nodes=_nodes(nodes), restarts=0
            )
            # A requeue is submitted again. The record of what waits of an array may be staler than an element's own.
            rank = (_number(submit), "_" in job and job == element, _number(record))
            found.setdefault((name, index), []).append((rank, seen))
    jobs = {}
    for key, records in found.items():
        _, last = max(records, key=lambda r: r[0])
        jobs[key] = replace(last, restarts=sum(seen.job == last.job for _, seen in records) - 1)
    return jobs


def without_parents(jobs: Jobs, seen: Collection[JobState]) -> Jobs:
    """Drop arrays' parents: one whose waiting elements were all cancelled is shown as a job without an index."""
    arrays = {job.job.partition("_")[0] for job in seen if "_" in job.job}
    return {key: job for key, job in jobs.items() if job.job not in arrays}


def _records(text: str, fields: int) -> Iterator[list[str]]:
    # squeue ends each line with a separator, sacct doesn't. Lines of another shape are headings of clusters.
    lines = (line.removesuffix(SEPARATOR).split(SEPARATOR) for line in text.split("\n"))
    return (line for line in lines if len(line) == fields)


def array_elements(job: str) -> Iterator[tuple[int, str]]:
    """Yield (index, id) of each element that a job id stands for: '7' (index 0), '7_3', '7_[0-5,8%2]', '7_[0-8:2]'."""
    parent, _, elements = job.partition("_")
    if not elements:
        yield 0, job
        return
    for part in elements.strip("[]").partition("%")[0].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if match is None:
            continue
        first, last, step = match.groups()
        for index in range(int(first), int(last or first) + 1, int(step or 1)):
            yield index, f"{parent}_{index}"


def _state(text: str) -> str:
    return (text.split() or ["UNKNOWN"])[0].rstrip("+").upper()


def _nodes(text: str) -> str:
    return "" if text in ("None assigned", "(null)", "n/a", "N/A") else text


def _number(text: str) -> int:
    match = re.match(r"\d+", text)
    return int(match[0]) if match else 0


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs by id ('123', '123_4'); those that ended meanwhile are no error.

    Raises:
        SchedulerError: scancel failed; jobs before the failure are cancelled.
    """
    for start in range(0, len(jobs), CANCEL_BATCH):
        arrays: dict[str, list[str]] = {}
        for job in jobs[start : start + CANCEL_BATCH]:
            parent, _, element = job.partition("_")
            arrays.setdefault(parent, []).append(element)
        # One request an array, not one an element.
        ids = [parent if "" in elements else f"{parent}_[{','.join(elements)}]" for parent, elements in arrays.items()]
        done = call(["scancel", "--quiet", *ids])
        over = ("Invalid job id specified", "Job/step already completing or completed")
        problems = [line for line in done.stderr.splitlines() if line.strip() and not line.rstrip().endswith(over)]
        if done.returncode and problems:
            raise SchedulerError(f"scancel failed: {one_line(chr(10).join(problems))}")
