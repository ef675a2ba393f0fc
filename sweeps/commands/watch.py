"""``mode=status watch=true``: cells by model and bits as they come, with rate, time left and failures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep, strftime
from typing import Final

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sweeps.commands.selection import planned_parts
from sweeps.errors import EXIT_FAILED
from sweeps.executors.base import with_jobs
from sweeps.files import list_files
from sweeps.launches.in_flight import read_flight
from sweeps.options import Options
from sweeps.results.following import Followed, Place, Progress
from sweeps.results.progress import LINE_SECONDS
from sweeps.status import State
from sweeps.store.parts import Store
from sweeps.terminal import LiveView
from sweeps.text import counted, hours

BY: Final = ("model", "bits")
PAUSE_SECONDS: Final = 2.0
IDLE: Final = 4.0
"""A look is followed by a pause of so many times what it took, at least ``PAUSE_SECONDS``: others read there too."""
ASK_SECONDS: Final = 60.0
"""Schedulers are asked so often."""
MOST_ERRORS_SHOWN: Final = 3
LEAST_ROWS: Final = 3
_OTHER_LINES: Final = 7
"""Of a terminal's height, beside rows and what is said of failures."""


def watch(options: Options, console: Console) -> int:
    """Show how far studies are until nothing is left to run, or Ctrl-C; 1 if something failed.

    Raises:
        UserError: nothing was planned there, or nothing of it is chosen.
    """
    looker = _Looker(options=options)
    progress = looker.look()
    try:
        with _View(console=console, options=options) as view:
            view.show(progress, looker.problems)
            while not progress.is_done:
                sleep(max(PAUSE_SECONDS, IDLE * looker.took))
                progress = looker.look()
                view.show(progress, looker.problems)
    except KeyboardInterrupt:
        # The view ends, and nothing else does.
        return 0
    return EXIT_FAILED if progress.failures else 0


@dataclass(kw_only=True)
class _View(LiveView):
    """What is shown: in a terminal a picture that changes, else a line now and then."""

    console: Console
    options: Options
    _live: Live = field(init=False)
    _last: float | None = None

    def __post_init__(self) -> None:
        self._live = Live(console=self.console, auto_refresh=False)

    def show(self, progress: Progress, problems: Sequence[str]) -> None:
        if self.console.is_terminal:
            self._live.update(_drawn(progress, self.options.by or BY, problems, self.console), refresh=True)
        elif self._last is None or progress.is_done or monotonic() - self._last > LINE_SECONDS:
            self._last = monotonic()
            self.console.print("  ".join(_words(progress)), highlight=False, soft_wrap=True)


@dataclass(kw_only=True)
class _Looker:
    """Looks at a directory; what was planned is read again when that changes.

    Attributes:
        problems: why a scheduler could not be asked.
        took: seconds of the last look.
    """

    options: Options
    problems: list[str] = field(default_factory=list)
    took: float = 0.0
    _asked: float = -ASK_SECONDS
    _plans: list[tuple[Path, int]] = field(default_factory=list)
    _followed: Followed | None = None

    def look(self) -> Progress:
        out = self.options.out
        self._ask(out)
        began = monotonic()
        plans = [(path, path.stat().st_mtime_ns) for path in list_files(out / "manifests", "*.json")]
        if self._followed is None or plans != self._plans:
            needed, more = planned_parts(self.options)
            self._followed = Followed(
                needed=needed.values(),
                more=more.values(),
                by=self.options.by or BY,
                retry=frozenset(map(State, self.options.retry)),
            )
            self._plans = plans
        progress = self._followed.progress(Store(out=out), read_flight(out))
        self.took = monotonic() - began
        return progress

    def _ask(self, out: Path) -> None:
        if monotonic() - self._asked < ASK_SECONDS:
            return
        self._asked = monotonic()
        self.problems = [problem for executor in with_jobs(out) for problem in executor.observe(out).problems]


def _words(progress: Progress) -> list[str]:
    """Return what a line says: measurements done, rate, time left, failures."""
    states, total = progress.states, sum(progress.states.values())
    done = states[State.DONE] + states[State.DIVERGED]
    failed = states[State.FAILED] + states[State.OOM]
    words = [f"{done:,}/{counted(total, 'measurement')}"]
    # Where nobody is at it, time does not bring it nearer its end.
    if progress.rate and progress.seconds_left is not None and progress.held:
        words += [f"{60 * progress.rate:,.3g} a minute", f"left {hours(progress.seconds_left)}"]
    words += [f"{states[state]:,} {state}" for state in (State.RUNNING, State.QUEUED, State.DIVERGED) if states[state]]
    return words + ([f"{failed:,} failed"] if failed else [])


def _drawn(progress: Progress, by: Sequence[str], problems: Sequence[str], console: Console) -> Group:
    total, left = sum(progress.states.values()), progress.left
    head = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    bar = ProgressBar(total=max(1, total), completed=total - left, width=max(8, min(30, console.width - 60)))
    head.add_row(bar, Text("  ".join(_words(progress))))
    lines = [Text(f"{n:,} failed with {error}", style="red") for error, n in progress.failures[:MOST_ERRORS_SHOWN]]
    if progress.failures:
        lines.append(Text("mode=logs shows why", style="red"))
    if left and not progress.held:
        lines.append(Text(f"nobody is at it: {counted(left, 'measurement')} for the study's command", style="yellow"))
    lines += [Text(problem, style="yellow") for problem in problems]
    end = "nothing is left to run" if progress.is_done else "Ctrl-C ends the view, and nothing else"
    lines.append(Text(f"{strftime('%H:%M:%S')}  {end}", style="dim", no_wrap=True))
    table = _table(progress, by, console.height - _OTHER_LINES - len(lines))
    return Group(head, table, *lines)


def _table(progress: Progress, by: Sequence[str], most: int) -> Table:
    """Return cells done of all, by axes; rows that are not done come first where there is no room for all."""
    columns = sorted({column for _, column in progress.groups}, key=_number)
    is_whole: dict[tuple[str, ...], bool] = {}
    for (row, _), group in progress.groups.items():
        is_whole[row] = is_whole.get(row, True) and group.done == group.cells
    most = max(most, LEAST_ROWS)
    rows = list(is_whole) if len(is_whole) <= most else sorted(is_whole, key=lambda row: is_whole[row])
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in by[:-1]:
        table.add_column(name, no_wrap=True)
    for column in columns:
        table.add_column(f"{by[-1]}={column}" if column == columns[0] else column, justify="right", no_wrap=True)
    for row in rows[:most]:
        table.add_row(*map(Text, row), *(_cell(progress, (row, column)) for column in columns))
    if len(rows) > most:
        table.add_row(Text(f"… {len(rows) - most:,} more", style="dim"))
    return table


def _number(text: str) -> tuple[float, str]:
    """Return a key that sorts numbers by their values, before words."""
    try:
        return float(text), ""
    except ValueError:
        return float("inf"), text


def _cell(progress: Progress, place: Place) -> Text:
    group = progress.groups.get(place)
    if group is None:
        return Text("")
    style = "green" if group.done == group.cells else "" if group.done or group.running else "dim"
    text = Text(f"{group.done}/{group.cells}", style=style)
    if group.failed:
        text.append(f" {group.failed}!", style="red")
    return text
