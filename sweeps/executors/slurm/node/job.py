"""The process of a SLURM job: from submitit's command to a pack, or to a preflight.

The job script's command is ``python -m sweeps.executors.slurm.node.job ... -u -m submitit.core._submit FOLDER``: what
submitit would start, with this module in front of it. It repairs what submitit trips over (a temporary file that a kill
left, a pickle that a dead launcher did not rename), then hands over; submitit unpickles a ``PackJob`` or
``PreflightJob``, calls it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sweeps.errors import JobError
from sweeps.executors.slurm.node.pack_attempt import PackAttempt, code_problems, job_id
from sweeps.files import share_with_group, write_atomically
from sweeps.launches.launch import Launch

RENAME_SECONDS: Final = 20.0
"""The launcher renames a job's pickle after sbatch; when it is not there by then, the launcher is dead."""


@dataclass(frozen=True, kw_only=True)
class PackJob:
    """The callable that submitit calls for one pack of a launch."""

    out: str
    launch: str
    claim: int
    chunk: int
    index: int

    def __call__(self) -> str:
        launch = Launch.load(Path(self.out), self.launch)
        chunk = launch.chunks[self.chunk]
        return PackAttempt(
            launch=launch, chunk=chunk, pack=launch.pack(chunk.packs[self.index]), claim=self.claim
        ).run()

    def checkpoint(self) -> object:
        """Return the same call, for submitit to requeue: progress is in the store, and it goes on from there."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


@dataclass(frozen=True, kw_only=True)
class PreflightJob:
    """The callable that submitit calls for the checks of one resource shape."""

    out: str
    launch: str
    shape: int

    def __call__(self) -> str:
        from sweeps.executors.slurm.node.preflight import Preflight

        launch = Launch.load(Path(self.out), self.launch)
        packs = [launch.pack(p) for c in launch.chunks if c.shape == self.shape for p in c.packs]
        preflight = Preflight(
            out=launch.out,
            device=launch.settings.device,
            gpus=launch.shapes[self.shape].gpus,
            models=tuple(dict.fromkeys(p.model for p in packs)),
            evals=tuple(dict.fromkeys(e for p in packs for _, evals in p.items for e in evals)),
            calibrations=tuple(dict.fromkeys(c.calibration for p in packs for c, _ in p.items if c.calibration)),
            launched=launch.launched,
            store_launched=launch.settings.store_launched,
        )
        problems = [*code_problems(launch), *preflight.problems()]
        path = launch.directory / f"preflight-{self.shape}.json"
        write_atomically(path, json.dumps({"problems": problems}).encode())
        if problems:
            raise JobError("preflight failed: " + "; ".join(problems))
        return "ok"


def _restore_pickle(folder: Path, job: PackJob | PreflightJob, timeout_min: int, requeues: int) -> None:
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
    # SLURM made the job's log by its user's umask.
    share_with_group(*folder.glob(f"{job_id()}_*"))
    launch = Launch.load(Path(args.out), args.launch)
    job: PackJob | PreflightJob
    if args.preflight is not None:
        shape, job = args.preflight, PreflightJob(out=args.out, launch=args.launch, shape=args.preflight)
    else:
        index = int(os.environ.get("SLURM_ARRAY_TASK_ID") or 0)
        shape = launch.chunks[args.chunk].shape
        job = PackJob(out=args.out, launch=args.launch, claim=args.claim, chunk=args.chunk, index=index)
    _restore_pickle(folder, job, launch.shapes[shape].minutes, launch.settings.requeues)
    process_job(folder)


if __name__ == "__main__":
    # Under this name the classes would be __main__'s, and not the ones that are unpickled.
    from sweeps.executors.slurm.node.job import main as run_main

    run_main()
