"""Input of sbatch, and calling it: preflights and job arrays of a claimed launch, through submitit."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from sweeps.errors import SubmitError
from sweeps.executors.slurm.context import LaunchContext
from sweeps.executors.slurm.launch_plan import MOST_PER_CHUNK
from sweeps.executors.slurm.node.job import PackJob, PreflightJob
from sweeps.executors.slurm.query import query_jobs
from sweeps.executors.slurm.query.command import COMMAND_SECONDS, own_environment
from sweeps.files import make_directory
from sweeps.launches.claims import Claim, Claims
from sweeps.launches.launch import Chunk, Launch, Shape
from sweeps.plan.packs import Plan
from sweeps.provenance import ROOT
from sweeps.study.snapshot import job_setup, snapshot_path

TRIES: Final = 3
PREFLIGHT_MINUTES: Final = 15
PREFLIGHT_WARNING_SECONDS: Final = 20
"""A preflight is short, and has nothing to finish."""
HASH_BYTES_PER_SECOND: Final = 2e8
_TIMED_OUT: Final = 124
"""Exit code of coreutils' timeout where it ended the command."""


@dataclass(frozen=True, kw_only=True)
class JobArray:
    """One call of sbatch: a chunk of a launch, or the preflight of a shape.

    Attributes:
        shape: index of the launch's shapes.
        arguments: what the job's process is told besides its launch (sweeps.executors.slurm.node.job).
        folder: for logs and submitit's files.
        depends: jobs that must succeed first.
        checks: it is there to find what is wrong, so it ends at a command of executor.setup that fails.
    """

    name: str
    shape: int
    arguments: tuple[str, ...]
    folder: Path
    jobs: Sequence[PackJob | PreflightJob]
    minutes: int
    signal_seconds: int
    parallel: int
    depends: tuple[str, ...] = ()
    checks: bool = False


@dataclass(frozen=True, kw_only=True)
class Scripts:
    """The input of sbatch for a launch, with or without a cluster.

    Attributes:
        claim: number of the launch's claim.
        exclude: nodes that jobs must not run on.
        code: the directory that jobs import this project from.
    """

    context: LaunchContext
    launch: Launch
    claim: int
    exclude: str | None
    code: Path

    def preflight(self, shape: int) -> JobArray:
        """Return the preflight of a shape."""
        launch, slurm = self.launch, self.context.slurm
        # Long enough to read local models once: their hashes may not be remembered on a node.
        models = {c.model for c in self.context.manifest.cells if c.model.path}
        minutes = PREFLIGHT_MINUTES + math.ceil(sum(2 * (m.params or 0) for m in models) / HASH_BYTES_PER_SECOND / 60)
        return JobArray(
            name=launch.preflight_name(shape),
            shape=shape,
            arguments=("--preflight", str(shape)),
            folder=launch.out / "logs" / launch.id / f"preflight-{shape}",
            jobs=[PreflightJob(out=str(launch.out), launch=launch.id, shape=shape)],
            minutes=min(launch.shapes[shape].minutes, minutes),
            signal_seconds=min(slurm.signal_seconds, PREFLIGHT_WARNING_SECONDS),
            parallel=1,
            checks=True,
        )

    def chunk(self, chunk: Chunk, depends: Sequence[str]) -> JobArray:
        """Return a chunk's array."""
        launch, out = self.launch, str(self.launch.out)
        count, most = len(chunk.packs), launch.settings.parallel
        return JobArray(
            name=launch.chunk_name(chunk.number),
            shape=chunk.shape,
            arguments=("--chunk", str(chunk.number)),
            folder=launch.logs(chunk.number),
            jobs=[
                PackJob(out=out, launch=launch.id, claim=self.claim, chunk=chunk.number, index=i) for i in range(count)
            ],
            minutes=launch.shapes[chunk.shape].minutes,
            signal_seconds=self.context.slurm.signal_seconds,
            parallel=chunk.share(len(launch.chunks), most) if most else max(1, count),
            depends=tuple(depends),
        )

    def executor(self, array: JobArray, *, kind: Any = None) -> Any:
        """Return submitit's executor for an array.

        Args:
            array: the jobs.
            kind: a class in place of ``SbatchExecutor``.
        """
        from sweeps.executors.slurm.submitit_executor import SbatchExecutor

        launch, slurm = self.launch, self.context.slurm
        shape = launch.shapes[array.shape]
        command = [sys.executable, "-P", "-m", "sweeps.executors.slurm.node.job", "--out", str(launch.out)]
        command += ["--launch", launch.id, "--claim", str(self.claim), *array.arguments, "--"]
        parameters = {**slurm.request(shape, self.exclude).parameters(), "time": array.minutes}
        additional = {**parameters.pop("additional_parameters", {}), "kill-on-invalid-dep": "yes"}
        additional["requeue" if slurm.requeues else "no-requeue"] = True
        if array.depends:
            parameters["dependency"] = "afterok:" + ":".join(array.depends)
        executor = (kind or SbatchExecutor)(
            folder=array.folder, python=shlex.join(command), max_num_timeout=slurm.requeues + 1
        )
        executor.update_parameters(
            **parameters,
            job_name=array.name,
            setup=[*_checked(slurm.setup, stop=array.checks), *job_setup(self.code)],
            signal_delay_s=array.signal_seconds,
            stderr_to_stdout=True,
            # What srun is not told it does not know since SLURM 22.05: all threads would share one core.
            srun_args=[f"--cpus-per-task={shape.cpus}"],
            array_parallelism=array.parallel,
            additional_parameters=additional,
        )
        return executor

    def text(self, array: JobArray) -> str:
        """Return the script that submitit gives to sbatch for an array, without SLURM on this machine."""
        import submitit

        class WithoutSlurm(submitit.SlurmExecutor):
            @classmethod
            def affinity(cls) -> int:
                return 1

        executor = self.executor(array, kind=WithoutSlurm)
        if len(array.jobs) > 1:
            executor.parameters["map_count"] = len(array.jobs)
        return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def planned_scripts(context: LaunchContext, plan: Plan) -> list[str]:
    """Return the script of the first array of each shape that a launch would send now, cluster's limits aside.

    LAUNCH and PREFLIGHT stand for ids that are known when it is sent.
    """
    by_shape: dict[Shape, list[str]] = {}
    for pack in plan.packs:
        by_shape.setdefault(context.shape(pack.model, pack.rung), []).append(pack.id)
    slurm, out = context.slurm, context.store.out
    launch = Launch(
        out=out,
        id="LAUNCH",
        sweep=context.manifest.sweep,
        shapes=tuple(by_shape),
        chunks=tuple(
            Chunk(number=i, shape=i, packs=tuple(packs[:MOST_PER_CHUNK])) for i, packs in enumerate(by_shape.values())
        ),
        settings=replace(context.job_settings, parallel=slurm.max_parallel),
        offsets={},
        launched=0.0,
    )
    scripts = Scripts(
        context=context,
        launch=launch,
        claim=Claims(out=out).last_number() + 1,
        exclude=slurm.exclude,
        code=snapshot_path(out) if slurm.code == "snapshot" else ROOT,
    )
    depends = ["PREFLIGHT"] if slurm.preflight else []
    return [scripts.text(scripts.chunk(chunk, depends)) for chunk in launch.chunks]


@dataclass(kw_only=True)
class Submission:
    """One claimed launch on its way into the queue."""

    context: LaunchContext
    launch: Launch
    claim: Claim
    exclude: str | None
    code: Path
    count: int = 0
    _jobs: dict[str, str] = field(default_factory=dict)

    def submit_all(self) -> str | None:
        """Submit preflights, then arrays that depend on them; return the words of sbatch when it stopped half-way."""
        slurm, launch = self.context.slurm, self.launch
        scripts = Scripts(
            context=self.context, launch=launch, claim=self.claim.number, exclude=self.exclude, code=self.code
        )
        try:
            for shape in sorted({c.shape for c in launch.chunks}) if slurm.preflight else ():
                self._submit(scripts, scripts.preflight(shape))
            for chunk in launch.chunks:
                depends = [self._jobs[launch.preflight_name(chunk.shape)]] if slurm.preflight else []
                depends += [self._jobs[launch.chunk_name(chunk.after)]] if chunk.after is not None else []
                self.context.progress(f"submitting {chunk.number + 1} of {len(launch.chunks)} job arrays")
                self._submit(scripts, scripts.chunk(chunk, depends))
                self.count += len(chunk.packs)
        except SubmitError as error:
            return str(error)
        finally:
            launch.record_submitted(self._jobs)
        return None

    def _submit(self, scripts: Scripts, array: JobArray) -> None:
        """Submit one array. Where sbatch fails, the queue is asked before another try: it may have been taken.

        Raises:
            SubmitError: it was not, or nobody knows.
        """
        make_directory(array.folder)
        for attempt in range(TRIES):
            if self.launch.cancelled():
                raise SubmitError("the launch was cancelled meanwhile")
            executor = scripts.executor(array)
            try:
                with _own_environment():
                    first = executor.submit_array(array.jobs)[0]
                self._jobs[array.name] = first.job_id.partition("_")[0]
                return
            except Exception as error:
                said = _words(error)
            self.context.progress(f"sbatch failed ({said}): asking the queue")
            taken = self._taken(array.name)
            if taken is not None:
                self._jobs[array.name] = taken
                return
            if not _is_transient(said):
                break
            time.sleep(2.0 * (attempt + 1))
        raise SubmitError(said)

    def _taken(self, name: str) -> str | None:
        """Return the id of a job that sbatch said it failed to submit, but the queue has."""
        snapshot = query_jobs([name], self.launch.launched)
        if snapshot.queue is None:
            raise SubmitError("; ".join(snapshot.problems) or "the queue can't be asked")
        jobs = {**(snapshot.accounting or {}), **snapshot.queue}
        # What SLURM refuses has a record too: it ended without ever having a node.
        found = [job.job for (known, _), job in jobs.items() if known == name and (job.nodes or not job.terminal)]
        return found[0].partition("_")[0] if found else None


def _checked(setup: Sequence[str], *, stop: bool) -> list[str]:
    """Return the user's shell lines so that the job's log names each that fails; with ``stop`` it ends the job."""
    if not setup:
        return []
    end = "; no job of this study starts: fix it and launch again" if stop else ""
    said = f'echo "executor.setup: exit code $code of: $(sed -n "${{line}}p" "$0"){end}" >&2'
    # What a file that is sourced does inside counts by that file's exit code alone.
    here = '[ "${#BASH_SOURCE[@]}" -eq 1 ]'
    trap = f"code=$? line=$LINENO; if {here}; then {said}{'; exit 1' if stop else ''}; fi"
    return [f"trap '{trap}' ERR", *setup, "trap - ERR"]


@contextmanager
def _own_environment() -> Iterator[None]:
    """Take the environment of SLURM's other commands meanwhile, so that what was checked is what is submitted."""
    kept, own = dict(os.environ), own_environment()
    os.environ.clear()
    os.environ.update(own)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _words(error: Exception) -> str:
    """Return what sbatch said, in one line."""
    if getattr(error.__cause__, "returncode", None) == _TIMED_OUT:
        return f"sbatch did not answer within {COMMAND_SECONDS:.0f} s"
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [type(error).__name__])[-1]


def _is_transient(said: str) -> bool:
    return any(
        word in said for word in ("Unable to contact", "timed out", "Connection refused", "try again", "connect")
    )
