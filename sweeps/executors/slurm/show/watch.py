"""The view with watch=true: cells by state, jobs by state, and what happened, looked at now and then."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sweeps.executors.slurm.query import JobSnapshot
from sweeps.launches.in_flight import InFlight, job_counts
from sweeps.results.table import measurement_states
from sweeps.status import FINAL
from sweeps.study.manifest import Manifest
from sweeps.terminal import LiveView


@dataclass(kw_only=True)
class WatchView(LiveView):
    """A live view of one study; where the output is no terminal, a line when something changed."""

    console: Console
    out: Path
    manifest: Manifest
    _live: Live = field(init=False)
    _last: str = ""

    def __post_init__(self) -> None:
        self._live = Live(console=self.console, auto_refresh=False, transient=False)

    def note(self, text: str) -> None:
        """Print something that happened, above the live part."""
        self.console.print(f"{time.strftime('%H:%M:%S')} {escape(text)}", highlight=False)

    def show(self, flight: InFlight, snapshot: JobSnapshot | None) -> None:
        """Show the state now."""
        states: Counter[str] = Counter(measurement_states(self.out, self.manifest, flight).values())
        jobs = job_counts(flight)
        problems = snapshot.problems if snapshot else ()
        if self.console.is_terminal:
            self._live.update(self._drawn(states, jobs, problems), refresh=True)
            return
        line = f"{_counts(states)}  |  jobs: {_counts(jobs) or 'none'}"
        line += "".join(f"  |  {p}" for p in problems)
        if line != self._last:
            self._last = line
            self.note(line)

    def _drawn(self, states: Counter[str], jobs: Mapping[str, int], problems: Sequence[str]) -> Group:
        done, total = sum(states[s] for s in FINAL), sum(states.values())
        bar = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        name, counts = Text(self.manifest.sweep, style="bold"), Text(f"{done}/{total}")
        room = min(40, self.console.width - len(name) - len(counts) - 4)
        if room >= 8:
            bar.add_row(name, ProgressBar(total=total, completed=done, width=room), counts)
        else:
            bar.add_row(name, counts)
        lines = [
            Text("measurements  " + _counts(states)),
            Text("jobs          " + (_counts({s.lower(): n for s, n in jobs.items()}) or "none")),
            Text(f"looked at {time.strftime('%H:%M:%S')}; Ctrl-C stops looking, the jobs go on", style="dim"),
            *(Text(p, style="yellow") for p in problems),
        ]
        return Group(bar, *lines)


def _counts(of: Mapping[str, int]) -> str:
    return "  ".join(f"{n} {name}" for name, n in sorted(of.items()))
