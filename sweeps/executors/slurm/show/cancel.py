"""Ending the jobs of launches on SLURM, and no others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from time import sleep
from typing import Final

from rich.console import Console
from rich.markup import escape

from sweeps.errors import SchedulerError, UserError
from sweeps.executors.slurm.query import JobState, cancel, query_jobs
from sweeps.executors.slurm.query.reconcile import reconcile
from sweeps.executors.slurm.query.where import here
from sweeps.executors.slurm.show.status import unseen
from sweeps.launches.claims import Claims
from sweeps.launches.in_flight import read_flight
from sweeps.launches.launch import Launch
from sweeps.text import counted

SUBMIT_SECONDS: Final = 20.0
"""Time that mode=cancel waits for a launch to end its last sbatch."""

_Chosen = tuple[Launch, Collection[str] | None]
"""A launch, and which of its packs are to be cancelled; None: all."""


def cancel_launches(out: Path, chosen: Sequence[Launch], console: Console) -> int:
    """Cancel the jobs of a study's launches; return the exit code.

    Raises:
        UserError: SLURM can't be asked.
    """
    stopped = _stop_submitting(out, chosen, console)
    live = _live_jobs(chosen, "No job was cancelled" if stopped else "Nothing was cancelled")
    if live:
        _cancel(out, live, [(launch, None) for launch in chosen], console)
    else:
        reconcile(out)
    _refuse_unseen(out, {la.id: la.places for la in chosen})
    if not live:
        console.print(f"No jobs of {chosen[0].sweep} are queued or running any more.", highlight=False)
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
    if live:
        _cancel(out, live, [(la, packs[la.id]) for la in chosen if packs[la.id]], console)
    _refuse_unseen(out, packs)
    if not live:
        console.print(f"No jobs of {chosen[0].sweep} that are queued or running measure only chosen cells.")
    return 0


def _live_jobs(launches: Sequence[Launch], if_unknown: str = "Nothing was cancelled") -> list[JobState]:
    """Return the jobs of launches that are queued or running, or raise that SLURM can't be asked."""
    names = [n for la in launches for n in _job_names(la)]
    # The queue knows whatever can be cancelled.
    snapshot = query_jobs(names, 0.0, accounted=())
    if snapshot.queue is None:
        raise UserError(f"mode=cancel: {'; '.join(snapshot.problems)}. {if_unknown}")
    return [job for job in snapshot.queue.values() if not job.terminal]


def _cancel(out: Path, live: Sequence[JobState], chosen: Sequence[_Chosen], console: Console) -> None:
    """Cancel jobs and write down that they were, other users' last: those need not be ours to cancel.

    Raises:
        UserError: SLURM did not take that for all of them.
    """
    running = sum(1 for job in live if job.state in ("RUNNING", "COMPLETING"))
    (sweep,) = {launch.sweep for launch, _ in chosen}
    console.print(
        f"Cancelling {counted(len(live), 'job')} of {sweep}: {running:,} running, {len(live) - running:,} queued.",
        highlight=False,
    )
    mine = ("", here()[0])
    problems = []
    for owner in sorted({launch.user for launch, _ in chosen}, key=lambda user: user not in mine):
        its = [(launch, packs) for launch, packs in chosen if launch.user == owner]
        names = {name for launch, _ in its for name in _job_names(launch)}
        jobs = [job.job for job in live if job.name in names]
        try:
            if owner in mine:
                # First: a job that is gone from now on was cancelled, not lost.
                _note_cancelled(its, console)
                cancel(jobs)
            elif jobs:
                cancel(jobs)
                _note_cancelled(its, console)
        except SchedulerError as error:
            advice = "run it again" if owner in mine else f"they are {owner}'s, who can cancel them"
            problems.append(f"{error}. Some jobs may go on; {advice}")
    # Reading results asks no scheduler: what waited is known to be cancelled from now on.
    reconcile(out)
    if problems:
        raise UserError(f"mode=cancel: {'. '.join(problems)}")
    console.print("What they had finished is stored; the same study's command runs the rest.")


def _note_cancelled(chosen: Sequence[_Chosen], console: Console) -> None:
    """Write down what was cancelled; a results directory that can't be written is no reason to let jobs go on."""
    for launch, packs in chosen:
        try:
            launch.cancel(packs)
        except OSError as error:
            text = f"{launch.directory} can't be written ({error.strerror or error}): SLURM alone knows of the end."
            console.print(f"[yellow]{escape(text)}[/]", highlight=False)


def _refuse_unseen(out: Path, packs: Mapping[str, Collection[str]]) -> None:
    """Say that some jobs can't be seen from here: they were not cancelled, and may go on.

    Args:
        out: directory of results.
        packs: what was to be cancelled, by launch id.

    Raises:
        UserError: there are such jobs.
    """
    left = Counter((la.user, la.cluster) for la, pack in unseen(read_flight(out)) if pack in packs.get(la.id, ()))
    for (user, cluster), count in left.items():
        where = f" on {cluster}" if cluster else ""
        raise UserError(
            f"mode=cancel: {counted(count, 'job')} of {user}{where} can't be seen from here and may go on: the same "
            f"command cancels them when {user} gives it there"
        )


def _stop_submitting(out: Path, launches: Sequence[Launch], console: Console) -> bool:
    """Tell launches that are still being submitted to stop, and wait for their last sbatch.

    Returns:
        Whether there were any.
    """
    claims = Claims(out=out)
    alive = {c.launch for c in claims.open() if c.executor == "slurm" and claims.is_alive(c)}
    submitting = [la for la in launches if la.id in alive and la.submitted() is None]
    for launch in submitting:
        try:
            launch.cancel()
        except OSError as error:
            why = error.strerror or error
            raise UserError(
                f"mode=cancel: {launch.directory} can't be written: {why}. No job was cancelled, since launch "
                f"{launch.id} is still being submitted and would go on: end its process first"
            ) from error
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


def _job_names(launch: Launch) -> list[str]:
    preflights = [launch.preflight_name(s) for s in range(len(launch.shapes))]
    return [launch.chunk_name(c.number) for c in launch.chunks] + preflights
