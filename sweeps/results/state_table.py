"""Counts of cells by axes and state, laid out for a terminal of any width, and for a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kbit.spec import axes as kbit_axes

if TYPE_CHECKING:
    import pandas as pd

NO_VALUE: Final = "-"
"""Written where an axis does not apply."""
LEAST_WORDS: Final = 16
"""Columns for states in words; what needs more takes several lines."""


@dataclass(frozen=True, kw_only=True)
class StateCounts:
    """How many cells are in which state, by axes.

    Attributes:
        axes, states: names of the columns.
        rows: the axes' values, and a number per state.
    """

    axes: tuple[str, ...]
    states: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]

    @classmethod
    def of(cls, results: pd.DataFrame, axes: Sequence[str], states: Sequence[str]) -> StateCounts:
        """Count cells.

        Args:
            results: a row per cell, with the columns ``axes`` and ``status``.
            axes: what to count by.
            states: to count, in this order.
        """
        import pandas as pd

        known = kbit_axes()
        named = [known[a].name_of if a in known else str for a in axes]
        rows = []
        for values, group in results.groupby(list(axes), dropna=False, sort=True):
            counts = group["status"].value_counts()
            of_axes = tuple(
                NO_VALUE if missing else str(name_of(v))
                for v, missing, name_of in zip(values, pd.isna(list(values)), named, strict=True)
            )
            rows.append((of_axes, tuple(int(counts.get(s, 0)) for s in states)))
        return cls(axes=tuple(axes), states=tuple(states), rows=tuple(rows))

    def show(self, console: Console) -> None:
        """Print it: in a pipe a line per group, in a terminal the widest of three layouts that cuts nothing."""
        if not console.is_terminal:
            self._show_lines(console)
        elif _measured(boxed := self._boxed(), console).maximum <= console.width:
            console.print(boxed)
        elif _measured(compact := self._compact(), console).minimum <= console.width:
            same = ", ".join(f"{self.axes[i]}={self.rows[0][0][i]}" for i in self._constant())
            if same:
                console.print(f"all with {same}", markup=False, highlight=False)
            console.print(compact)
        else:
            self._show_records(console)

    def _constant(self) -> list[int]:
        """Return the axes that have one value only, where there is more than one group."""
        columns = list(zip(*(values for values, _ in self.rows), strict=True)) if len(self.rows) > 1 else []
        return [i for i, values in enumerate(columns) if len(set(values)) == 1]

    def _show_lines(self, console: Console) -> None:
        """Print columns of text, each value in each line and each zero a 0: for grep, awk and people."""
        head = [*self.axes, *self.states, "all"]
        body = [[*values, *map(str, counts), str(sum(counts))] for values, counts in self.rows]
        widths = [max(cell_len(line[i]) for line in [head, *body]) for i in range(len(head))]
        for line in [head, *body]:
            padded = [_padded(line[i], widths[i], is_number=i >= len(self.axes)) for i in range(len(line))]
            console.print("  ".join(padded).rstrip(), markup=False, highlight=False, soft_wrap=True)

    def _boxed(self) -> Table:
        table = Table()
        for name in self.axes:
            table.add_column(name, no_wrap=True)
        for name in (*self.states, "all"):
            table.add_column(name, justify="right", no_wrap=True)
        for values, counts in self.rows:
            table.add_row(*map(Text, values), *_numbers(counts))
        return table

    def _compact(self) -> Table:
        """Lay it out without rules: names take several lines, what is as above is left out, states are words."""
        constant = self._constant()
        shown = [i for i in range(len(self.axes)) if i not in constant]
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for i in shown:
            table.add_column(self.axes[i].replace("_", "\n"), vertical="bottom", no_wrap=True)
        table.add_column("cells", vertical="bottom", min_width=LEAST_WORDS)
        above: tuple[str, ...] = ()
        for values, counts in self.rows:
            now = tuple(values[i] for i in shown)
            same = 0
            while same < min(len(above), len(now) - 1) and above[same] == now[same]:
                same += 1
            table.add_row(*[""] * same, *map(Text, now[same:]), self._in_words(counts))
            above = now
        return table

    def _show_records(self, console: Console) -> None:
        """Print a paragraph per group, for terminals that no table fits."""
        for values, counts in self.rows:
            pairs = [f"{name}={value}" for name, value in zip(self.axes, values, strict=True) if value != NO_VALUE]
            _print_folded(pairs or ["no axis applies"], console)
            console.print("  " + self._in_words(counts), markup=False, highlight=False, style="bold")

    def _in_words(self, counts: Sequence[int]) -> str:
        return ", ".join(f"{n} {state}" for state, n in zip(self.states, counts, strict=True) if n)


def _measured(table: Table, console: Console) -> Measurement:
    return Measurement.get(console, console.options.update(max_width=10_000), table)


def _numbers(counts: Sequence[int]) -> list[str]:
    return [*(str(n or "") for n in counts), str(sum(counts))]


def _padded(text: str, width: int, *, is_number: bool) -> str:
    gap = " " * (width - cell_len(text))
    return gap + text if is_number else text + gap


def _print_folded(words: Sequence[str], console: Console) -> None:
    """Print words in lines, broken between them."""
    line = ""
    for word in words:
        if line and cell_len(line) + 1 + cell_len(word) > console.width:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            line = ""
        line = f"{line} {word}" if line else word
    console.print(line, markup=False, highlight=False, soft_wrap=True)
