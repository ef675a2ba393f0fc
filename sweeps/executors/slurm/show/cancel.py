"""Ending the jobs of launches on SLURM, and no others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from time import sleep
from typing import Final

from rich.console import Console

from sweeps.errors import SchedulerError, UserError
from sweeps.executors.slurm.query import JobState, cancel, query_jobs
from sweeps.executors.slurm.query.reconcile import reconcile
from sweeps.launches.claims import Claims
from sweeps.launches.in_flight import read_flight
from sweeps.launches.launch import Launch
from sweeps.text import counted

SUBMIT_SECONDS: Final = 20.0
"""Time that mode=cancel waits for a launch to end its last sbatch."""


def cancel_launches(out: Path, chosen: Sequence[Launch], console: Console) -> int:
    """Cancel the jobs of a study's launches; return the exit code.

    Raises:
        UserError: SLURM can't be asked.
    """
    stopped = _stop_submitting(out, chosen, console)
    live = _live_jobs(chosen, "No job was cancelled" if stopped else "Nothing was cancelled")
    if not live:
        reconcile(out)
        console.print(f"No jobs of {chosen[0].sweep} are queued or running any more.", highlight=False)
        return 0
    for launch in chosen:
        # A job that is gone from now on was cancelled, not lost.
        _write_cancelled(launch)
    _cancel(out, live, chosen[0].sweep, console)
    return 0


def cancel_measurements(out: Path, chosen: Sequence[Launch], console: Console, measurements: Collection[str]) -> int:
    """Cancel the jobs whose unfinished measurements are all among some; return the exit code.

    Raises:
        UserError: SLURM can't be asked, or jobs are just being submitted.
    """
    claims = {c.launch: c for c in Claims(out=out).open() if c.executor == "slurm"}
    held = read_flight(out).held
    left = 0
    packs: dict[str, list[str]] = {}
    for launch in chosen:
        if launch.submitted() is None and Claims(out=out).is_alive(claims[launch.id]):
            raise UserError(
                f"mode=cancel: launch {launch.id} is still being submitted, so its jobs can't be chosen yet: "
                "try again in a moment, or cancel all of it. Nothing was cancelled"
            )
        unfinished = {p: held.intersection(keys) for p, keys in claims[launch.id].packs.items()}
        packs[launch.id] = [p for p, keys in unfinished.items() if keys and keys.issubset(measurements)]
        left += sum(1 for keys in unfinished.values() if not keys.isdisjoint(measurements)) - len(packs[launch.id])
    if left:
        console.print(
            f"[yellow]{counted(left, 'job')} left alone: they also measure cells that are not chosen.[/]",
            highlight=False,
        )
    places = {la.places[p] for la in chosen for p in packs[la.id]}
    live = [job for job in _live_jobs(chosen) if (job.name, job.index) in places]
    if not live:
        console.print(f"No jobs of {chosen[0].sweep} that are queued or running measure only chosen cells.")
        return 0
    for launch in chosen:
        if packs[launch.id]:
            _write_cancelled(launch, packs[launch.id])
    _cancel(out, live, chosen[0].sweep, console)
    return 0


def _live_jobs(launches: Sequence[Launch], if_unknown: str = "Nothing was cancelled") -> list[JobState]:
    """Return the jobs of launches that are queued or running, or raise that SLURM can't be asked."""
    names = [n for la in launches for n in _job_names(la)]
    # The queue knows whatever can be cancelled.
    snapshot = query_jobs(names, 0.0, accounted=())
    if snapshot.queue is None:
        raise UserError(f"mode=cancel: {'; '.join(snapshot.problems)}. {if_unknown}")
    return [job for job in snapshot.queue.values() if not job.terminal]


def _cancel(out: Path, live: Sequence[JobState], sweep: str, console: Console) -> None:
    """Cancel jobs of launches that are written down as cancelled."""
    running = sum(1 for job in live if job.state in ("RUNNING", "COMPLETING"))
    console.print(
        f"Cancelling {counted(len(live), 'job')} of {sweep}: {running:,} running, {len(live) - running:,} queued.",
        highlight=False,
    )
    try:
        cancel([job.job for job in live])
    except SchedulerError as error:
        raise UserError(f"mode=cancel: {error}. Some jobs may go on; run it again") from error
    # Reading results asks no scheduler: what waited is known to be cancelled from now on.
    reconcile(out)
    console.print("What they had finished is stored; the same study's command runs the rest.")


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


def _write_cancelled(launch: Launch, packs: Collection[str] | None = None) -> None:
    try:
        launch.cancel(packs)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"mode=cancel: {launch.directory} can't be written: {why}. No job was cancelled") from error


def _job_names(launch: Launch) -> list[str]:
    preflights = [launch.preflight_name(s) for s in range(len(launch.shapes))]
    return [launch.chunk_name(c.number) for c in launch.chunks] + preflights
