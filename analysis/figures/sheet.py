"""Where panels, legend, title and notes stand: on the screen, or as wide as one or two columns of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any, Final

from analysis.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_IN_A_ROW: Final = {None: 5, 1: 2, 2: 4}
_MOST_PLAIN: Final = 3
"""Panels in a row on the screen, where each stands alone."""


class Sheet:
    """A figure with ``n`` panels, each of one or two parts (above: values; below: changes) that share an axis a kind.

    Args:
        n: panels.
        parts: 1, or 2 with changes.
        columns: of a page; None for the screen.
        alone: values have an axis of each panel's own.

    Attributes:
        fig: the figure.
        values, changes: the panels' parts, in order; ``changes`` may be empty.
    """

    def __init__(self, n: int, *, parts: int, columns: int | None, alone: bool = False) -> None:
        from matplotlib.figure import Figure as NewFigure

        self.columns = columns
        most = _MOST_PLAIN if columns is None and parts == 1 else _MOST_IN_A_ROW[columns]
        self.across = -(-n // -(-n // most))  # lines of about as many panels
        self.down = -(-n // self.across)
        self.fig: Figure = NewFigure(figsize=self._size(n, parts), layout="constrained")
        grid = self.fig.add_gridspec(self.down * parts, self.across)
        kinds: tuple[list[Axes], list[Axes]] = ([], [])
        for line in range(self.down):
            for part in range(parts):
                own = alone and part == 0
                for i in range(line * self.across, min(n, (line + 1) * self.across)):
                    shared = kinds[part][0] if kinds[part] and not own else None
                    ax = self.fig.add_subplot(grid[line * parts + part, i % self.across], sharey=shared)
                    ax.tick_params(labelleft=own or i % self.across == 0)
                    kinds[part].append(ax)
        self.values, self.changes = kinds

    def _size(self, n: int, parts: int) -> tuple[float, float]:
        """Inches, without the strips of title and notes."""
        if self.columns is not None:
            each = {1: 1.35, 2: 1.55}[self.columns] if n > 1 else {1: 2.0, 2: 2.4}[self.columns]
            return style.PAGE_WIDTH[self.columns], self.down * (each if parts == 1 else 1.75 * each) + 0.55
        if parts == 1:
            return (6.6, 3.8) if n == 1 else (3.0 * self.across + 1.2, 2.7 * self.down + 0.2)
        width = {1: 4.3, 2: 2.9, 3: 2.5}.get(self.across, 2.1) * self.across + 1.5
        return width, (4.8 + (0.4 if n == 1 else 0)) * self.down

    @property
    def panel_width(self) -> float:
        """Inches that a panel has for its ticks, about: the vertical axis' labels and a legend beside take the rest."""
        width = float(self.fig.get_size_inches()[0])
        return width * (0.72 if self.columns is None else 0.85) / self.across

    @property
    def label_letters(self) -> int:
        """Letters that fit beside a vertical axis, about."""
        if self.columns is None:
            return 28
        return 13 if self.columns == 1 and self.changes else 18

    def wrapped(self, label: str) -> str:
        """Break a vertical axis' label at blanks, and after underscores: names of text sets have no others."""
        return fill(label.replace("_", "_ "), self.label_letters).replace("_ ", "_")

    def is_left(self, i: int) -> bool:
        return i % self.across == 0

    def is_last(self, i: int) -> bool:
        """Tell whether no panel stands below the i-th."""
        return i + self.across >= len(self.values)

    def legend(self, order: Sequence[str], title: str) -> None:
        """One legend right of the panels on the screen, below them on a page, where it covers nothing."""
        found = {label: h for ax in self.fig.axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        self.legend_of({name: found[name] for name in order if name in found}, title)

    def legend_of(self, handles: Mapping[str, Any], title: str) -> None:
        if self.columns is None:
            where: dict[str, Any] = {"loc": "outside right center", "alignment": "left"}
        else:
            widest = 0.42 + 0.052 * max(map(len, handles), default=1)
            across = max(1, min(len(handles), int(style.PAGE_WIDTH[self.columns] / widest)))
            across = -(-len(handles) // -(-len(handles) // across)) if handles else 1
            where = {"loc": "outside lower center", "ncols": across, "columnspacing": 1.0, "handlelength": 2.2}
        if handles:
            self.fig.legend(list(handles.values()), list(handles), title=title, **where)

    def finish(self, title: str, notes: str) -> Figure:
        """Add title and notes; on a page they are left to the caption, and ``caption`` gives them back."""
        self.fig.set_label(f"{title}\n{notes}")
        if self.columns is None:
            style.finish(self.fig, title, notes)
        return self.fig


def caption(fig: Figure) -> tuple[str, str]:
    """Return the title and the notes that a figure was finished with; '' of one that wasn't."""
    title, _, notes = str(fig.get_label()).partition("\n")
    return title, notes
