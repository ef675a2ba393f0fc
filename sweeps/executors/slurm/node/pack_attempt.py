"""One attempt at a pack, in a SLURM job: measure what is left, hear SLURM's signals, say how it ended, be requeued."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final

from sweeps.errors import CodeChangedError, JobError, LoadError
from sweeps.events import Crashed, Event, Measured, SmallerBatch, Stopped, Withheld, event_to_dict
from sweeps.executors.slurm.node.baseline_gate import gate_problem
from sweeps.executors.slurm.node.owners import lease_pack
from sweeps.files import list_files, read_json
from sweeps.launches.claims import Claims
from sweeps.launches.job_log import BUDGET
from sweeps.launches.launch import Attempt, Chunk, Launch
from sweeps.launches.spending import allowance_ends
from sweeps.plan.pack import Pack
from sweeps.results.finishing import finish_study
from sweeps.store.parts import Store
from sweeps.store.schema import Scalar
from sweeps.tracking.config import TrackingConfig
from sweeps.worker.devices import Workers
from sweeps.worker.execution import Execution
from sweeps.worker.settings import WorkerSettings

END_MARGIN: Final = 30.0
"""A cell is not begun that is predicted to end within so many seconds of the walltime."""
SIGNAL_SLACK: Final = 90.0
"""SLURM may send its warning a minute early."""
GRACE_SECONDS: Final = 1800.0
"""After a preemption's warning SLURM leaves some time; a job that ends in it by itself is not requeued, so it waits."""

LONG_SECONDS: Final = 1e6
"""Longer than any measurement."""
MOST_GOING_ON: Final = 3
"""Answers in a row by which a job that was told to end just runs: then nobody will end it."""
MOST_LOAD_ERRORS: Final = 3
"""When so many jobs could not load a pack's model it is the model's fault, and recorded as such."""
_ASK_SECONDS: Final = 10.0


@dataclass(kw_only=True)
class PackAttempt:
    """One attempt at a pack.

    Attributes:
        claim: number of the launch's claim: what a later claim holds is no longer this job's.
    """

    launch: Launch
    chunk: Chunk
    pack: Pack
    claim: int
    _reason: str | None = None
    _measured: int = 0
    _last: str = ""
    _withheld: str | None = None
    _retaken: bool = False
    _claims_seen: int = 0
    _execution: Execution | None = None
    _attempt: Attempt = field(init=False)

    def run(self) -> str:
        """Measure what is left of the pack; return how it ended.

        Raises:
            JobError, WriteError, PoolError: it can't go on; what is stored is safe.
            SystemExit: it was put back into the queue.
        """
        job, restart = job_id(), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        log = self.launch.logs(self.chunk.number) / f"{job}_worker.log"
        # Before anything else: what SLURM says from now on is heard.
        requeue = self._listen()
        self._own()
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._attempt = Attempt.begin(self.launch, self.pack.id, job=job, restart=restart, host=host, log=log)
        try:
            problems = code_problems(self.launch)
            if problems:
                raise JobError("; ".join(problems))
            reason = self._measure(log)
        except LoadError as error:
            # Nothing was measured in all of its time: as good as a death (sweeps.executors.slurm.poison).
            self._end("error", error=str(error), measured=0, load=True)
            raise
        except BaseException as error:
            self._end("error", error=f"{type(error).__name__}: {error}")
            raise
        if reason == "walltime":
            return self._stop_for_budget() if self._is_spent() else self._requeue(requeue)
        if reason == "finished":
            return self._finish()
        self._end(reason)
        _await_end()
        raise SystemExit(f"ended by SLURM ({reason}); what was finished is stored")

    def _measure(self, log: Path) -> str:
        while True:
            self._retaken, self._claims_seen = False, Claims(out=self.launch.out).last_number()
            left = self.pack.without(self._not_mine())
            if left is None:
                return "finished"
            outcome = self._run(left, log)
            if outcome != "asked":
                return outcome
            if self._reason or not self._retaken:
                return self._reason or "terminated"

    def _run(self, left: Pack, log: Path) -> str:
        settings = self.launch.settings
        shape = self.launch.shapes[self.chunk.shape]
        on_gpu = settings.device == "cuda"
        threads = int(os.environ.get("SLURM_CPUS_PER_TASK") or shape.cpus)
        self._execution = Execution(
            packs=[left],
            store=Store(out=self.launch.out),
            workers=Workers(device=settings.device, count=1, threads=threads),
            settings=WorkerSettings(
                batch_tokens=settings.batch_tokens,
                trust_remote_code=settings.trust_remote_code,
                ignore_sigterm=True,
                load_again=self._load_errors() < MOST_LOAD_ERRORS - 1,
                gpus=shape.gpus if on_gpu else 0,
                witness=self.launch.file.relative_to(self.launch.out).as_posix(),
                provenance={
                    **settings.provenance,
                    "job": f"slurm/{self._attempt.job}",
                    "host": self._attempt.host,
                },
            ),
            tracking=TrackingConfig(**settings.tracking),
            on_event=self._on_event,
            warn=lambda text: print(f"warning: {text}", flush=True),
            log=lambda _: log,
            beat=self._beat,
            ends=self._job_end(),
            until=min(self._job_end() - END_MARGIN, allowance_ends(self.launch, self._attempt)),
            pin=False,
        )
        return "asked" if self._reason else self._execution.run()

    def _not_mine(self) -> set[str]:
        """Return the pack's measurements that are not to be measured here.

        Those that are stored need not be, and those that a later claim holds must not be. A launch may be told to
        measure again what failed or diverged in an earlier one, under the same pack's id.
        """
        stored = {
            row["measurement"]
            for row in Store(out=self.launch.out).read_pack(self.pack.id, ["measurement", "status", "launch"])
            if row["status"] == "done" or str(row["launch"]).partition(" ")[0] == self.launch.id
        }
        later = Claims(out=self.launch.out).open(after=self.claim)
        return stored | {m for claim in later for m in claim.measurements}

    def _own(self) -> None:
        """Leave the pack to another job that has it."""
        mine = job_id().partition("_")[0]
        owner = lease_pack(self.launch, self.pack.id, mine)
        if owner != mine:
            raise JobError(
                f"pack {self.pack.id} is job {owner}'s: sbatch was served twice for "
                f"{self.launch.chunk_name(self.chunk.number)}, and job {mine} has nothing to do"
            )

    def _load_errors(self) -> int:
        """Count earlier jobs, of any launch, that could not load this pack's model."""
        launched = list_files(self.launch.out / "launches")
        files = (p for each in launched for p in list_files(each / "attempts", f"{self.pack.id}-*.json"))
        ends = [read_json(p).get("end") or {} for p in files]
        return sum(1 for end in ends if end.get("load"))

    def _on_event(self, event: Event, worker: int) -> None:
        if isinstance(event, Measured):
            self._measured += 1
            self._last = str(event.row["measurement"])
        if isinstance(event, Withheld):
            self._withheld = event.why
        _print_event(event, worker)

    def _beat(self, running: Sequence[str]) -> None:
        self._attempt = self._attempt.at(running[0] if running else None)
        claims = Claims(out=self.launch.out)
        if not self._retaken and claims.last_number() > self._claims_seen:
            # A launch that took this job for dead: what it claimed is its own from here on.
            self._claims_seen, later = claims.last_number(), claims.open(after=self._claims_seen)
            mine = {m.key for m in self.pack.measurements()}
            self._retaken = any(not claim.measurements.isdisjoint(mine) for claim in later)
            if self._retaken and self._execution is not None:
                print("a later launch took over some of this pack: going on with the rest", flush=True)
                self._execution.stop(LONG_SECONDS)

    def _listen(self) -> Callable[[int, FrameType | None], object]:
        """Take SLURM's signals; return submitit's handler, which puts the job back into the queue."""
        requeue = signal.getsignal(signal.SIGUSR2)
        signal.signal(signal.SIGUSR2, self._on_warning)
        signal.signal(signal.SIGTERM, self._on_end)
        if not callable(requeue):
            raise JobError("not started by submitit: nobody would put this job back into the queue")
        return requeue

    def _on_warning(self, *_: object) -> None:
        """Handle SIGUSR2: the walltime is near; or, on some clusters, a preemption, which SLURM itself requeues.

        Where neither is so, somebody sent it by hand or by mistake, and the job goes on.
        """
        left = self._job_end() - time.time()
        if left <= self.launch.settings.signal_seconds + SIGNAL_SLACK:
            self._stop("walltime", max(5.0, left - END_MARGIN))
        elif _goes_on():
            print("SIGUSR2, but SLURM does not say that this job ends: going on", flush=True)
        else:
            self._stop("preempted", self._kill_seconds(), ends=self._kill_time())

    def _on_end(self, *_: object) -> None:
        """Handle SIGTERM: SLURM ends the job, and requeues it if that is due.

        The cause is a preemption, a cancellation, the walltime or a requeue.
        """
        self._stop("terminated", self._kill_seconds(), ends=self._kill_time())

    def _stop(self, reason: str, seconds: float, *, ends: float | None = None) -> None:
        self._reason = reason
        if self._execution is not None:
            self._execution.stop(seconds, ends=ends)

    def _kill_time(self) -> float:
        return time.time() + self.launch.settings.kill_wait

    def _kill_seconds(self) -> float:
        return max(1.0, 0.5 * self.launch.settings.kill_wait - 2.0)

    def _job_end(self) -> float:
        known = os.environ.get("SLURM_JOB_END_TIME")
        if known:
            return float(known)
        minutes = self.launch.shapes[self.chunk.shape].minutes
        return _PROCESS_START + 60.0 * minutes

    def _requeue(self, requeue: Callable[[int, FrameType | None], object]) -> str:
        """Go back into the queue, where that helps and is allowed."""
        attempts = self.launch.attempts([self.pack.id])[self.pack.id]
        used = sum(1 for a in attempts if a.job == self._attempt.job and (a.end or {}).get("requeued"))
        if not self._measured:
            self._end("walltime", requeued=False, measured=0)
            return self._stay("no measurement fits into the walltime: launch again with a longer executor.time")
        if used >= self.launch.settings.requeues:
            self._end("walltime", requeued=False, measured=self._measured)
            return self._stay(f"the walltime is near, and {used} requeues are used up: the next launch goes on")
        self._end("walltime", requeued=True, measured=self._measured)
        requeue(signal.SIGUSR2, None)
        raise JobError("submitit did not put the job back into the queue")

    def _stay(self, why: str) -> str:
        """Leave the queue before all is measured; what waits for a baseline must not take that for success."""
        if self._is_gate():
            raise JobError(f"{self.pack.model.label}: {why}; its quantized cells don't run")
        print(why, flush=True)
        return "walltime"

    def _is_spent(self) -> bool:
        return allowance_ends(self.launch, self._attempt) < self._job_end() - END_MARGIN

    def _stop_for_budget(self) -> str:
        self._end(BUDGET)
        if self._is_gate():
            raise JobError("the budget is spent before this baseline was whole; its quantized cells don't run")
        print("the budget is spent: what is left runs when the study is launched with a larger one", flush=True)
        return BUDGET

    def _finish(self) -> str:
        problem = self._gate_problem()
        if problem is not None:
            self._end("gate", error=problem)
            raise JobError(f"{self.pack.model.label}: {problem}; its quantized cells don't run")
        if self._withheld is not None:
            self._end("data", error=self._withheld)
            return "data"
        self._end("finished", **({"last": self._last} if self._last else {}))
        self._report()
        return "finished"

    def _report(self) -> None:
        """Write the study's report, if nothing of it is missing now; its measurements are stored in any case.

        The store is read for that only where no other job of the launch is at work or to come.
        """
        settings = self.launch.settings
        if not settings.report_code or self._is_gate() or self.launch.has_others_at_work(self.pack.id):
            return
        store, until = Store(out=self.launch.out), self._job_end() - END_MARGIN
        said = finish_study(store, settings.manifest, code=settings.report_code, until=until)
        if said is not None:
            print(said, flush=True)

    def _is_gate(self) -> bool:
        """Tell whether other chunks wait for this one."""
        return any(c.after == self.chunk.number for c in self.launch.chunks)

    def _gate_problem(self) -> str | None:
        """Return why what waits for this baseline must not run; an earlier launch may have measured some of it."""
        if not self._is_gate():
            return None
        model, settings = self.pack.model.label, self.launch.settings
        names = {m.key: m.eval.name for m in self.pack.measurements()}
        wanted = settings.baselines.get(model) or list(names)
        columns = ["measurement", "eval", "status", "metrics"]
        rows = Store(out=self.launch.out).read(columns, measurements=set(wanted)).to_pylist()
        stored = {row["measurement"] for row in rows}
        missing = [names.get(key, f"measurement {key}") for key in wanted if key not in stored]
        references = settings.references.get(model, {})
        return gate_problem(rows, references, settings.baseline_tolerance, missing=missing)

    def _end(self, reason: str, **more: Scalar) -> None:
        try:
            self._attempt = self._attempt.ended(reason, **more)
        except OSError as error:
            # The store is full or gone: the log is the last place to say so.
            print(f"the end of this attempt ({reason}) can't be written down: {error}", file=sys.stderr, flush=True)


def job_id() -> str:
    """Return this job as scontrol and scancel take it: 123_4 in an array, else 123."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


_PROCESS_START: Final = time.time()


def code_problems(launch: Launch) -> list[str]:
    from sweeps.study.snapshot import check_code

    try:
        check_code(launch.settings.code_hash)
    except CodeChangedError as error:
        return [str(error)]
    return []


def _await_end() -> None:
    """Wait where SLURM still lets the job run although it was told to end: a preemption's grace time.

    A job of which SLURM keeps saying that it just runs was told so by somebody else, and does not keep its GPU.
    """
    deadline, going_on = time.time() + GRACE_SECONDS, 0
    while time.time() < deadline and going_on < MOST_GOING_ON:
        about = _about_this_job()
        if about is not None:
            if about.get("JobState") != "RUNNING":
                return
            going_on = going_on + 1 if _is_unmarked(about) else 0
        time.sleep(_ASK_SECONDS)


def _about_this_job() -> dict[str, str] | None:
    """Return what the controller says of this job; None where it does not answer. A job that it forgot has no state."""
    command = ["scontrol", "--oneliner", "show", "job", job_id()]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"scontrol can't be asked: {error}", file=sys.stderr, flush=True)
        return None
    if "Invalid job id" in asked.stderr:
        return {}
    if asked.returncode:
        return None
    pairs = (word.partition("=") for word in asked.stdout.split())
    return {name: value for name, equals, value in pairs if equals}


def _goes_on() -> bool:
    """Tell whether SLURM says that this job runs and is not to end."""
    about = _about_this_job()
    return about is not None and about.get("JobState") == "RUNNING" and _is_unmarked(about)


def _is_unmarked(about: dict[str, str]) -> bool:
    """Tell whether a job is not being preempted; a cluster that does not say so is not taken for saying no."""
    return about.get("PreemptTime") in ("None", "N/A", "(null)")


def _print_event(event: Event, worker: int) -> None:
    match event:
        case Measured(row=row):
            print(f"{row['status']:9} {row['model']} {row['label']} {row['eval']}", flush=True)
        case Crashed() | SmallerBatch() | Stopped() | Withheld():
            said = {name: value for name, value in event_to_dict(event).items() if name != "pack"}
            print({**said, "worker": worker}, flush=True)
