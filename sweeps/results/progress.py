"""Show a running study: cells done, the current cells, rate, time left.

Where the output is no terminal, a plain line now and then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from sweeps.events import BlockDone, Crashed, Event, Measured, PackDone, Started, Withheld
from sweeps.store.schema import Row
from sweeps.terminal import LiveView

LINE_SECONDS: Final = 15.0
BAR_WIDTHS: Final = (8, 30)
LEAST_CURRENT: Final = 12
"""Columns below which the current cells say nothing."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """What the live line says; it fits its terminal by leaving out what matters least.

    Attributes:
        done, total: cells.
        left: time left.
        rate, elapsed, failed, current: may be empty.
    """

    done: int
    total: int
    left: str
    rate: str = ""
    elapsed: str = ""
    failed: str = ""
    current: str = ""

    def fit(self, width: int) -> tuple[int, list[tuple[str, str]]]:
        """Return the width of the bar (0 is none), and the other parts in their order, each with a style.

        The current cells are the first to go; cells done and the time left stay.
        """
        counts, left = f"{self.done}/{self.total}", f"left {self.left}"
        parts = [
            # In the order of the line; the number is the rank to keep it by.
            (0, f"{counts} cells" if width >= 60 else counts, ""),
            (3, self.failed, "red"),
            (4, self.rate, ""),
            (1, left, "bold"),
            (5, self.elapsed, "dim"),
        ]
        parts = [part for part in parts if part[1]]
        least, most = BAR_WIDTHS
        # A spinner with a gap behind it comes first, and a gap stands between what follows.
        while (room := width - 3 - sum(len(text) + 2 for _, text, _ in parts)) < least and len(parts) > 2:
            parts.remove(max(parts))
        bar = min(most, room) if room >= least else 0
        shown = [(text, style) for _, text, style in parts]
        if self.current and (rest := room - bar - 2) >= LEAST_CURRENT:
            current = self.current if cell_len(self.current) <= rest else f"{set_cell_size(self.current, rest - 1)}…"
            shown.append((current, "dim"))
        return bar, shown

    def drawn(self, width: int, spinner: Spinner) -> Table:
        """Return it in one row of ``width`` columns at most."""
        bar, parts = self.fit(width)
        table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        cells: list[Text | Spinner | ProgressBar] = [Text(text, style) for text, style in parts]
        widths = [cell_len(text) for text, _ in parts]
        if bar:
            cells = [spinner, ProgressBar(total=max(1, self.total), completed=self.done, width=bar), *cells]
            widths = [1, bar, *widths]
        for each in widths:
            table.add_column(width=each, no_wrap=True)
        table.add_row(*cells)
        return table


@dataclass(kw_only=True)
class RunView(LiveView):
    """Live progress of a run; feed it the executor's events.

    Attributes:
        cells: to run, and how many measurements each still needs.
        left: predicts the seconds that are left.
    """

    console: Console
    cells: Mapping[str, int]
    left: Callable[[], float]
    failed: dict[str, str] = field(default_factory=dict)
    withheld: set[str] = field(default_factory=set)
    diverged: int = 0
    measured: int = 0
    done: int = 0
    _left: dict[str, int] = field(default_factory=dict)
    _current: dict[int, str] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)
    _last_line: float = 0.0

    def __post_init__(self) -> None:
        self._left = dict(self.cells)
        self._is_terminal = self.console.is_terminal
        self._spinner = Spinner("dots" if self.console.encoding.startswith("utf") else "line")
        self._live = Live(console=self.console, get_renderable=self._drawn, refresh_per_second=1, transient=False)

    def on_event(self, event: Event, worker: int) -> None:
        """Take in one event of a worker."""
        match event:
            case Measured():
                self._on_row(event.row)
            case Started():
                self._current[worker] = event.label
            case BlockDone():
                self._current[worker] = f"{event.label}: block {event.done} of {event.count}"
            case Withheld():
                if event.why not in self.withheld:
                    self.console.print(f"[yellow]not measured:[/] {escape(event.why)}", highlight=False)
                self.withheld.add(event.why)
            case PackDone():
                self._current.pop(worker, None)
            case Crashed():
                self._current.pop(worker, None)
                self.console.print(f"[yellow]worker {worker} {event.how}: starting another[/] ({event.log})")
        self._show()

    def _on_row(self, row: Row) -> None:
        if row["key"] not in self._left:
            return  # what a cell needed first, and no launch had left
        self.measured += 1
        self._left[row["key"]] -= 1
        self.done += self._left[row["key"]] == 0
        if row["status"] == "failed":
            self.failed.setdefault(row["key"], f"{row['model']} {row['label']}: {row['error_type']} in {row['eval']}")
        self.diverged += row["status"] == "diverged"

    def _line(self) -> Line:
        elapsed = time.monotonic() - self._began
        return Line(
            done=self.done,
            total=len(self.cells),
            left=_duration(self.left()),
            rate=f"{self.done / elapsed * 60:.0f}/min" if self.done else "",
            elapsed=_duration(elapsed),
            failed=f"{len(self.failed)} failed" if self.failed else "",
            current=" | ".join(self._current[w] for w in sorted(self._current))
            or ("" if self.measured else "starting workers"),
        )

    def _drawn(self) -> Table:
        return self._line().drawn(self.console.width, self._spinner)

    def _show(self) -> None:
        if self._is_terminal or (now := time.monotonic()) - self._last_line <= LINE_SECONDS:
            return
        self._last_line = now
        line = self._line()
        words = [f"{line.done}/{line.total} cells", line.rate, f"left {line.left}", line.failed, line.current]
        self.console.print("  ".join(w for w in words if w), highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
