"""A claimed launch on its way into the queue: preflights and job arrays, through submitit."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sweeps.errors import SubmitError
from sweeps.executors.slurm.launch_plan import share
from sweeps.executors.slurm.node.job import PackJob, PreflightJob
from sweeps.executors.slurm.query import look
from sweeps.launches.claims import Claim
from sweeps.launches.launch import Chunk, Launch
from sweeps.study.snapshot import job_setup

if TYPE_CHECKING:
    from sweeps.executors.slurm.submit import Submitter

TRIES: Final = 3
PREFLIGHT_MINUTES: Final = 15
PREFLIGHT_WARNING_SECONDS: Final = 20
HASH_BYTES_PER_SECOND: Final = 2e8


@dataclass(kw_only=True)
class Submission:
    """One claimed launch on its way into the queue."""

    submitter: Submitter
    launch: Launch
    claim: Claim
    exclude: str | None
    code: Path
    count: int = 0
    _jobs: dict[str, str] = field(default_factory=dict)

    def submit_all(self) -> str | None:
        """Preflights, then arrays that depend on them; the words of sbatch when it stopped half-way."""
        slurm, launch = self.submitter.slurm, self.launch
        code = self.code
        try:
            for shape in sorted({c.shape for c in launch.chunks}) if slurm.preflight else ():
                self._submit(
                    launch.preflight_name(shape), shape, self._preflight(shape), ["--preflight", str(shape)], code
                )
            for chunk in launch.chunks:
                jobs = [self._pack_job(chunk, i) for i in range(len(chunk.packs))]
                self.submitter.progress(f"submitting {chunk.number + 1} of {len(launch.chunks)} job arrays")
                self._submit(
                    launch.chunk_name(chunk.number), chunk.shape, jobs, ["--chunk", str(chunk.number)], code, chunk
                )
                self.count += len(jobs)
        except SubmitError as error:
            return str(error)
        finally:
            launch.record_submitted(self._jobs)
        return None

    def _preflight(self, shape: int) -> list[PreflightJob]:
        return [PreflightJob(out=str(self.launch.out), launch=self.launch.id, shape=shape)]

    def _preflight_minutes(self) -> int:
        """Long enough to read local models once: their hashes may not be remembered on a node."""
        models = {c.model for c in self.submitter.manifest.cells if c.model.path}
        return PREFLIGHT_MINUTES + math.ceil(sum(2 * (m.params or 0) for m in models) / HASH_BYTES_PER_SECOND / 60)

    def _pack_job(self, chunk: Chunk, index: int) -> PackJob:
        return PackJob(
            out=str(self.launch.out),
            launch=self.launch.id,
            claim=self.claim.number,
            chunk=chunk.number,
            index=index,
        )

    def _submit(
        self,
        name: str,
        shape: int,
        jobs: Sequence[PackJob | PreflightJob],
        which: Sequence[str],
        code: Path,
        chunk: Chunk | None = None,
    ) -> None:
        """One array. Where sbatch fails, the queue is asked before it is tried again: it may have been taken.

        Raises:
            SubmitError: it was not, or nobody knows.
        """
        folder = (
            self.launch.logs(chunk.number)
            if chunk
            else self.launch.out / "logs" / self.launch.id / f"preflight-{shape}"
        )
        folder.mkdir(parents=True, exist_ok=True)
        for attempt in range(TRIES):
            if self.launch.cancelled():
                raise SubmitError("the launch was cancelled meanwhile")
            executor = self._executor(folder, name, shape, which, code, chunk, len(jobs))
            try:
                with _own_environment():
                    first = executor.submit_array(jobs)[0]
                self._jobs[name] = first.job_id.partition("_")[0]
                return
            except Exception as error:
                said = _words(error)
            self.submitter.progress(f"sbatch failed ({said}): asking the queue")
            taken = self._taken(name)
            if taken is not None:
                self._jobs[name] = taken
                return
            if not _is_transient(said):
                break
            time.sleep(2.0 * (attempt + 1))
        raise SubmitError(said)

    def _taken(self, name: str) -> str | None:
        """The id of a job that sbatch said it failed to submit, but the queue has."""
        sighting = look([name], self.launch.launched)
        if sighting.queue is None:
            raise SubmitError("; ".join(sighting.problems) or "the queue can't be asked")
        jobs = {**(sighting.accounting or {}), **sighting.queue}
        # What SLURM refuses has a record too: it ended without ever having a node.
        found = [job.job for (known, _), job in jobs.items() if known == name and (job.nodes or not job.terminal)]
        return found[0].partition("_")[0] if found else None

    def _executor(
        self, folder: Path, name: str, shape: int, which: Sequence[str], code: Path, chunk: Chunk | None, count: int
    ) -> Any:
        import submitit

        launch, slurm = self.launch, self.submitter.slurm
        command = [
            sys.executable,
            "-P",
            "-m",
            "sweeps.executors.slurm.node.job",
            "--out",
            str(launch.out),
            "--launch",
            launch.id,
        ]
        command += ["--claim", str(self.claim.number), *which, "--"]
        executor = submitit.SlurmExecutor(folder=folder, python=shlex.join(command), max_num_timeout=slurm.requeues + 1)
        parameters = slurm.request(launch.shapes[shape], self.exclude).parameters()
        additional = {**parameters.pop("additional_parameters", {}), "kill-on-invalid-dep": "yes"}
        additional["requeue" if slurm.requeues else "no-requeue"] = True
        if chunk is None:
            parameters["time"] = min(parameters["time"], self._preflight_minutes())
        else:
            depends = [self._jobs[launch.preflight_name(shape)]] if slurm.preflight else []
            depends += [self._jobs[launch.chunk_name(chunk.after)]] if chunk.after is not None else []
            if depends:
                parameters["dependency"] = "afterok:" + ":".join(depends)
        environment = job_setup(code)
        executor.update_parameters(
            **parameters,
            job_name=name,
            setup=[*slurm.setup, *environment],
            # A preflight is short, and has nothing to finish.
            signal_delay_s=slurm.signal_seconds if chunk else min(slurm.signal_seconds, PREFLIGHT_WARNING_SECONDS),
            stderr_to_stdout=True,
            # What srun is not told it does not know since SLURM 22.05: all threads would share one core.
            srun_args=[f"--cpus-per-task={launch.shapes[shape].cpus}"],
            array_parallelism=self._parallel(chunk, count),
            additional_parameters=additional,
        )
        return executor

    def _parallel(self, chunk: Chunk | None, count: int) -> int:
        """This array's share of max_parallel."""
        most = self.launch.settings.parallel
        return max(1, count) if chunk is None or not most else share(chunk, self.launch.chunks, most)


@contextmanager
def _own_environment() -> Iterator[None]:
    """Without the caller's SBATCH_ and SLURM_ variables: they count more than what a job's script asks for."""
    kept = dict(os.environ)
    for name in kept:
        if name.startswith(("SBATCH_", "SRUN_", "SLURM_")) and name != "SLURM_CONF":
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _words(error: Exception) -> str:
    """What sbatch said, in one line."""
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [type(error).__name__])[-1]


def _is_transient(said: str) -> bool:
    return any(
        word in said for word in ("Unable to contact", "timed out", "Connection refused", "try again", "connect")
    )
