"""Ask the executors whose jobs a results directory holds."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from sweeps.executors.base import with_jobs
from sweeps.launches.in_flight import InFlight, read_flight


def observed_flight(out: Path, console: Console) -> InFlight:
    """Ask once, say what could not be asked, and bring everything together."""
    for executor in with_jobs(out):
        with console.status(f"asking {executor.title} about jobs"):
            seen = executor.observe(out)
        for problem in seen.problems:
            console.print(f"[yellow]{escape(problem)}[/]", highlight=False)
        if not seen.answered:
            last = f"Jobs are shown as they were when {executor.title} last answered"
            console.print(f"[yellow]{last}; none is given up for that.[/]")
    return read_flight(out)
