"""The state of jobs on SLURM, for mode=status."""

from __future__ import annotations

from collections import Counter
from typing import Final

from rich.console import Console

from sweeps.executors.slurm.query.where import in_sight
from sweeps.launches.in_flight import InFlight, job_counts
from sweeps.launches.job_log import JobRecord
from sweeps.launches.launch import Launch
from sweeps.text import counted

_ORDINARY: Final = ("", "None", "Priority", "Resources")
_IN_WORDS: Final = {
    "Dependency": "the preflight, or for their model's baseline",
    "JobArrayTaskLimit": "others of their array (executor.max_parallel)",
}
"""SLURM's reasons for waiting, and what they mean here."""


def show_jobs(flight: InFlight, console: Console) -> None:
    """Show jobs of unsettled launches by state, and what keeps some from ever running."""
    counts = job_counts(flight)
    if counts:
        words = ", ".join(f"{n} {state.lower()}" for state, n in sorted(counts.items()))
        console.print(f"SLURM jobs: {words}", highlight=False)
    reasons = Counter(
        e.reason for _, job_log in flight.launches for e in job_log.entries.values() if e.state == "PENDING"
    )
    for reason, count in reasons.most_common():
        if reason not in _ORDINARY:
            console.print(f"  {count} pending for {_IN_WORDS.get(reason, reason)}", highlight=False)
    for _, job_log in flight.launches:
        for job, state, reason in job_log.preflights.values():
            why = f" for {reason}" if reason not in _ORDINARY else ""
            console.print(f"  the preflight is job {job}: {state.lower()}{why}", highlight=False, markup=False)
    if any(e.state == "ABSENT" and not e.ended for _, job_log in flight.launches for e in job_log.entries.values()):
        console.print(
            "  absent: SLURM doesn't know them just now; when it still doesn't half a minute later, they are lost"
        )
    hidden = Counter((launch.user, launch.cluster) for launch, _ in unseen(flight))
    for (user, cluster), count in hidden.items():
        where = f" on {cluster}" if cluster else ""
        console.print(
            f"  {counted(count, 'job')} of {user}{where} can't be seen from here: none is given up for that; "
            f"{user}'s own mode=status there says how they do",
            markup=False,
            highlight=False,
        )


def unseen(flight: InFlight) -> list[tuple[Launch, str]]:
    """Return (launch, pack) of jobs that the last look did not show, and need not have shown."""
    return [
        (launch, pack)
        for launch, job_log in flight.launches
        if not in_sight(launch)
        for pack in launch.places
        if not (entry := job_log.entries.get(pack, JobRecord(state=""))).ended and entry.seen < job_log.looked
    ]
