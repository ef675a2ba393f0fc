"""Ending the jobs of launches on SLURM, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import sleep
from typing import Final

from rich.console import Console

from sweeps.errors import SchedulerError, UserError
from sweeps.executors.slurm.query import cancel, query_jobs
from sweeps.executors.slurm.query.reconcile import reconcile
from sweeps.launches.claims import Claims
from sweeps.launches.launch import Launch

SUBMIT_SECONDS: Final = 20.0
"""Time that mode=cancel waits for a launch to end its last sbatch."""


def cancel_launches(out: Path, chosen: Sequence[Launch], console: Console) -> int:
    """Cancel the jobs of a study's launches; return the exit code.

    Raises:
        UserError: SLURM can't be asked.
    """
    stopped = _stop_submitting(out, chosen, console)
    names = [n for la in chosen for n in _job_names(la)]
    snapshot = query_jobs(names, min(la.launched for la in chosen))
    if snapshot.queue is None:
        rest = "No job was cancelled" if stopped else "Nothing was cancelled"
        raise UserError(f"mode=cancel: {'; '.join(snapshot.problems)}. {rest}")
    live = [job for job in snapshot.queue.values() if not job.terminal]
    if not live:
        reconcile(out)
        console.print(f"No jobs of {chosen[0].sweep} are queued or running any more.", highlight=False)
        return 0
    running = sum(1 for job in live if job.state in ("RUNNING", "COMPLETING"))
    console.print(
        f"Cancelling {len(live)} jobs of {chosen[0].sweep}: {running} running, {len(live) - running} queued.",
        highlight=False,
    )
    for launch in chosen:
        # A job that is gone from now on was cancelled, not lost.
        _write_cancelled(launch)
    try:
        cancel([job.job for job in live])
    except SchedulerError as error:
        raise UserError(f"mode=cancel: {error}. Some jobs may go on; run it again") from error
    # Reading results asks no scheduler: what waited is known to be cancelled from now on.
    reconcile(out)
    console.print("What they had finished is stored; the same study's command runs the rest.")
    return 0


def _stop_submitting(out: Path, launches: Sequence[Launch], console: Console) -> bool:
    """Tell launches that are still being submitted to stop, and wait for their last sbatch.

    Returns:
        Whether there were any.
    """
    claims = Claims(out=out)
    alive = {c.launch for c in claims.open() if c.executor == "slurm" and claims.is_alive(c)}
    submitting = [la for la in launches if la.id in alive and la.submitted() is None]
    for launch in submitting:
        _write_cancelled(launch)
        console.print(
            f"Launch {launch.id}: it is still being submitted: what is not submitted yet won't be.", highlight=False
        )
    waited = 0.0
    while any(la.submitted() is None for la in submitting):
        if waited >= SUBMIT_SECONDS:
            console.print("[yellow]It has not stopped yet: mode=cancel once more makes sure.[/]", highlight=False)
            break
        sleep(0.5)
        waited += 0.5
    return bool(submitting)


def _write_cancelled(launch: Launch) -> None:
    try:
        launch.cancel()
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"mode=cancel: {launch.directory} can't be written: {why}. No job was cancelled") from error


def _job_names(launch: Launch) -> list[str]:
    preflights = [launch.preflight_name(s) for s in range(len(launch.shapes))]
    return [launch.chunk_name(c.number) for c in launch.chunks] + preflights
