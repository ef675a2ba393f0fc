"""Show a running study: cells done, the current cells, rate, time left.

Where the output is no terminal, a plain line now and then.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sweeps.events import Crashed, Event, Measured, PackDone, Started
from sweeps.store.schema import Row

LINE_SECONDS: Final = 15.0


@dataclass(kw_only=True)
class RunView:
    """Live progress of a run; feed it the executor's events.

    Attributes:
        cells: to run, and how many measurements each still needs.
    """

    console: Console
    cells: Mapping[str, int]
    failed: dict[str, str] = field(default_factory=dict)
    diverged: int = 0
    measured: int = 0
    _left: dict[str, int] = field(default_factory=dict)
    _current: dict[int, str] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)
    _last_line: float = 0.0

    def __post_init__(self) -> None:
        self._left = dict(self.cells)
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("cells  {task.fields[rate]}  left {task.fields[eta]}  "),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[current]}"),
            console=self.console,
            disable=not self.console.is_terminal,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("run", total=len(self.cells), rate="", eta="?", current="starting workers")

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)

    @property
    def done(self) -> int:
        return sum(1 for left in self._left.values() if left <= 0)

    def on_event(self, event: Event, worker: int) -> None:
        """Take in one event of a worker."""
        match event:
            case Started():
                self._current[worker] = event.label
            case Measured():
                self._on_row(event.row)
            case PackDone():
                self._current.pop(worker, None)
            case Crashed():
                self._current.pop(worker, None)
                self.console.print(f"[yellow]worker {worker} {event.how}: starting another[/] ({event.log})")
        self._show()

    def _on_row(self, row: Row) -> None:
        self.measured += 1
        self._left[row["key"]] -= 1
        if row["status"] == "failed":
            self.failed.setdefault(row["key"], f"{row['model']} {row['label']}: {row['error_type']} in {row['eval']}")
        self.diverged += row["status"] == "diverged"

    def _show(self) -> None:
        elapsed = time.monotonic() - self._began
        share = self.measured / max(1, sum(self.cells.values()))
        rate = f"{self.done / elapsed * 60:.0f}/min" if self.done else ""
        left = _duration(elapsed / share - elapsed) if share > 0.02 else "?"
        current = " | ".join(self._current[w] for w in sorted(self._current))
        if self.failed:
            current = f"{len(self.failed)} failed | {current}"
        self._progress.update(self._task, completed=self.done, rate=rate, eta=left, current=current)
        if not self.console.is_terminal and time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            self.console.print(f"{self.done}/{len(self.cells)} cells  {rate}  left {left}  {current}", highlight=False)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
