"""Inside a SLURM job: run one pack, tell how it went, and go back into the queue when the walltime comes.

The job script's command is ``python -m sweeps.job ... -u -m submitit.core._submit FOLDER``: what submitit would start,
with this module in front of it. It mends what submitit trips over (a temporary file that a kill left, a pickle that a
dead launcher did not rename), then hands over; submitit unpickles a ``PackJob`` or a ``PreflightJob`` and calls it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

from sweeps.claims import Claims
from sweeps.devices import Workers
from sweeps.execute import Execution
from sweeps.gate import gate_problem
from sweeps.launches import Attempt, Chunk, Launch
from sweeps.plan import Pack
from sweeps.store import FINISHED, Store, write_atomically
from sweeps.tracking import TrackingConfig

END_MARGIN: Final = 30.0
"""A cell is not begun that is predicted to end within so many seconds of the walltime."""
SIGNAL_SLACK: Final = 90.0
"""SLURM may send its warning a minute early."""
RENAME_SECONDS: Final = 20.0
"""The launcher renames a job's pickle after sbatch; when it is not there by then, the launcher is dead."""
GRACE_SECONDS: Final = 300.0
"""After a preemption's warning SLURM leaves some time; a job that ends in it by itself is not requeued, so it waits."""


class JobError(Exception):
    """The job can't do its work; the message says why."""


@dataclass(frozen=True, kw_only=True)
class PackJob:
    """What submitit calls: one pack of a launch."""

    out: str
    launch: str
    claim: int
    chunk: int
    index: int

    def __call__(self) -> str:
        launch = Launch.load(Path(self.out), self.launch)
        chunk = launch.chunks[self.chunk]
        return PackRun(launch=launch, chunk=chunk, pack=launch.pack(chunk.packs[self.index]), claim=self.claim).run()

    def checkpoint(self) -> Any:
        """For submitit, on a requeue: progress is in the store, so the same call goes on where this one stopped."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


@dataclass(frozen=True, kw_only=True)
class PreflightJob:
    """What submitit calls: the checks of one resource shape."""

    out: str
    launch: str
    shape: int

    def __call__(self) -> str:
        from sweeps.preflight import Preflight

        launch = Launch.load(Path(self.out), self.launch)
        packs = [launch.pack(p) for c in launch.chunks if c.shape == self.shape for p in c.packs]
        preflight = Preflight(
            out=launch.out,
            device=launch.settings["device"],
            gpus=launch.shapes[self.shape].gpus,
            models=tuple(dict.fromkeys(p.model for p in packs)),
            evals=tuple(dict.fromkeys(e for p in packs for _, evals in p.items for e in evals)),
            launched=launch.launched,
            store_launched=launch.settings["store_launched"],
        )
        problems = [*_code_problems(launch), *preflight.problems()]
        path = launch.directory / f"preflight-{self.shape}.json"
        write_atomically(path, json.dumps({"problems": problems}).encode())
        if problems:
            raise JobError("preflight failed: " + "; ".join(problems))
        return "ok"


@dataclass(kw_only=True)
class PackRun:
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
    _execution: Execution | None = None
    _attempt: Attempt = field(init=False)

    def run(self) -> str:
        """Measure what is left of the pack; returns how it ended.

        Raises:
            JobError, WriteError, PoolError: it can't go on; what is stored is safe.
            SystemExit: it was put back into the queue.
        """
        job, restart = job_id(), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        log = self.launch.logs(self.chunk.number) / f"{job}_worker.log"
        # Before anything else: what SLURM says from now on is heard.
        requeue = self._listen()
        self._attempt = Attempt.begin(self.launch, self.pack.id, job=job, restart=restart, log=log)
        try:
            problems = _code_problems(self.launch)
            if problems:
                raise JobError("; ".join(problems))
            reason = self._measure(log)
        except BaseException as error:
            self._end("error", error=f"{type(error).__name__}: {error}")
            raise
        if reason == "walltime":
            return self._requeue(requeue)
        if reason == "finished":
            return self._finish()
        self._end(reason)
        _await_end()
        raise SystemExit(f"ended by SLURM ({reason}); what was finished is stored")

    def _measure(self, log: Path) -> str:
        left = self.pack.without(self._not_mine())
        if left is None:
            return "finished"
        settings = self.launch.settings
        shape = self.launch.shapes[self.chunk.shape]
        on_gpu = settings["device"] == "cuda"
        threads = int(os.environ.get("SLURM_CPUS_PER_TASK") or shape.cpus)
        self._execution = Execution(
            [left],
            store=Store(out=self.launch.out),
            workers=Workers(device=settings["device"], count=1, threads=threads),
            settings={
                "batch_tokens": settings["batch_tokens"],
                "trust_remote_code": settings["trust_remote_code"],
                "ignore_sigterm": True,
                "gpus": shape.gpus if on_gpu else 0,
                "provenance": {
                    **settings["provenance"],
                    "job": f"slurm/{self._attempt.job}",
                    "host": self._attempt.host,
                },
            },
            tracking=TrackingConfig(**settings["tracking"]),
            on_event=self._on_event,
            warn=lambda text: print(f"warning: {text}", flush=True),
            log=lambda _: log,
            beat=self._beat,
            until=self._job_end() - END_MARGIN,
            pin=False,
        )
        outcome = "asked" if self._reason else self._execution.run()
        return (self._reason or "terminated") if outcome == "asked" else outcome

    def _not_mine(self) -> set[str]:
        """Measurements of the pack that need not, or must not, be measured here: stored, or held by a later claim."""
        stored = {
            row["measurement"]
            for row in Store(out=self.launch.out).read_pack(self.pack.id, ["measurement", "status", "launch"])
            if row["status"] in FINISHED or str(row["launch"]).startswith(self.launch.id)
        }
        later = Claims(out=self.launch.out).open(after=self.claim)
        return stored | {m for claim in later for m in claim.measurements}

    def _on_event(self, event: Mapping[str, Any]) -> None:
        self._measured += event["event"] == "measured"
        _print_event(event)

    def _beat(self, running: Sequence[str]) -> None:
        self._attempt = self._attempt.at(running[0] if running else None)

    def _listen(self) -> Callable[[int, FrameType | None], Any]:
        """Take SLURM's signals; returns submitit's handler, which puts the job back into the queue."""
        requeue = signal.getsignal(signal.SIGUSR2)
        signal.signal(signal.SIGUSR2, self._on_warning)
        signal.signal(signal.SIGTERM, self._on_end)
        if not callable(requeue):
            raise JobError("not started by submitit: nobody would put this job back into the queue")
        return requeue

    def _on_warning(self, *_: object) -> None:
        """SIGUSR2: the walltime is near; or, on some clusters, a preemption, which SLURM itself requeues."""
        left = self._job_end() - time.time()
        if left <= self.launch.settings["signal_seconds"] + SIGNAL_SLACK:
            self._stop("walltime", max(5.0, left - END_MARGIN))
        else:
            self._stop("preempted", self._kill_seconds())

    def _on_end(self, *_: object) -> None:
        """SIGTERM: SLURM ends the job (preemption, cancellation, walltime, requeue), and requeues it if that is due."""
        self._stop("terminated", self._kill_seconds())

    def _stop(self, reason: str, seconds: float) -> None:
        self._reason = reason
        if self._execution is not None:
            self._execution.stop(seconds)

    def _kill_seconds(self) -> float:
        return max(1.0, 0.5 * float(self.launch.settings["kill_wait"]) - 2.0)

    def _job_end(self) -> float:
        known = os.environ.get("SLURM_JOB_END_TIME")
        if known:
            return float(known)
        minutes = self.launch.shapes[self.chunk.shape].minutes
        return _PROCESS_START + 60.0 * minutes

    def _requeue(self, requeue: Callable[[int, FrameType | None], Any]) -> str:
        """Back into the queue, where that helps and is allowed."""
        attempts = self.launch.attempts([self.pack.id])[self.pack.id]
        used = sum(1 for a in attempts if a.job == self._attempt.job and (a.end or {}).get("requeued"))
        if not self._measured:
            self._end("walltime", requeued=False, measured=0)
            print("no measurement fits into the walltime: launch again with a longer executor.time", flush=True)
            return "walltime"
        if used >= self.launch.settings["requeues"]:
            self._end("walltime", requeued=False, measured=self._measured)
            print(f"the walltime is near, and {used} requeues are used up: the next launch goes on", flush=True)
            return "walltime"
        self._end("walltime", requeued=True, measured=self._measured)
        requeue(signal.SIGUSR2, None)
        raise JobError("submitit did not put the job back into the queue")

    def _finish(self) -> str:
        problem = self._gate_problem()
        if problem is not None:
            self._end("gate", error=problem)
            raise JobError(f"{self.pack.model.label}: {problem}; its quantized cells don't run")
        self._end("finished")
        return "finished"

    def _gate_problem(self) -> str | None:
        if all(c.after != self.chunk.number for c in self.launch.chunks):
            return None
        wanted = {m.key for m in self.pack.measurements()}
        rows = Store(out=self.launch.out).read_pack(self.pack.id, ["measurement", "eval", "status", "metrics"])
        references = self.launch.settings["references"].get(self.pack.model.label, {})
        mine = [row for row in rows if row["measurement"] in wanted]
        return gate_problem(mine, references, self.launch.settings["baseline_tolerance"])

    def _end(self, reason: str, **more: Any) -> None:
        try:
            self._attempt = self._attempt.ended(reason, **more)
        except OSError as error:
            # The store is full or gone: the log is the last place to say so.
            print(f"the end of this attempt ({reason}) can't be written down: {error}", file=sys.stderr, flush=True)


def job_id() -> str:
    """This job as scontrol and scancel take it: 123_4 in an array, else 123."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


_PROCESS_START: Final = time.time()


def _code_problems(launch: Launch) -> list[str]:
    from sweeps.snapshot import CodeChangedError, check_code

    try:
        check_code(launch.settings["code_hash"])
    except CodeChangedError as error:
        return [str(error)]
    return []


def _await_end() -> None:
    """Where SLURM still lets the job run although it was told to end, wait: it is in a preemption's grace time."""
    deadline = time.time() + GRACE_SECONDS
    while time.time() < deadline:
        command = ["squeue", "--noheader", "--jobs", job_id(), "--format", "%T"]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return
        if asked.returncode != 0 or asked.stdout.strip() != "RUNNING":
            return
        time.sleep(10.0)


def _print_event(event: Mapping[str, Any]) -> None:
    if event["event"] == "measured":
        row = event["row"]
        print(f"{row['status']:9} {row['model']} {row['label']} {row['eval']}", flush=True)
    elif event["event"] in ("crashed", "smaller_batch", "stopped"):
        print({k: v for k, v in event.items() if k != "pack"}, flush=True)


def _mend(folder: Path, job: PackJob | PreflightJob, timeout_min: int, requeues: int) -> None:
    """Make sure that submitit finds its pickle, and nothing else."""
    from submitit.core.utils import DelayedSubmission, JobPaths

    paths = JobPaths(folder, job_id=job_id(), task_id=0)
    for path in (paths.submitted_pickle, paths.result_pickle):
        path.with_suffix(path.suffix + ".save_tmp").unlink(missing_ok=True)
    deadline = time.time() + RENAME_SECONDS
    while not paths.submitted_pickle.exists() and time.time() < deadline:
        time.sleep(0.5)
    if not paths.submitted_pickle.exists():
        print("the launcher died before it handed over this job: taking it from the launch's files", flush=True)
        delayed = DelayedSubmission(job)
        delayed.set_timeout(timeout_min, requeues + 1)
        temporary = paths.submitted_pickle.with_name(f".{uuid.uuid4().hex}.tmp")
        delayed.dump(temporary)
        temporary.replace(paths.submitted_pickle)


def main() -> None:
    """The job's process."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--launch", required=True)
    parser.add_argument("--claim", type=int, required=True)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--chunk", type=int)
    which.add_argument("--preflight", type=int)
    args, rest = parser.parse_known_args()
    from submitit.core.submission import process_job

    folder = Path(rest[-1])
    launch = Launch.load(Path(args.out), args.launch)
    job: PackJob | PreflightJob
    if args.preflight is not None:
        shape, job = args.preflight, PreflightJob(out=args.out, launch=args.launch, shape=args.preflight)
    else:
        index = int(os.environ.get("SLURM_ARRAY_TASK_ID") or 0)
        shape = launch.chunks[args.chunk].shape
        job = PackJob(out=args.out, launch=args.launch, claim=args.claim, chunk=args.chunk, index=index)
    _mend(folder, job, launch.shapes[shape].minutes, launch.settings["requeues"])
    process_job(folder)


if __name__ == "__main__":
    # Under this name the classes would be __main__'s, and not the ones that are unpickled.
    from sweeps.job import main as run_main

    run_main()
