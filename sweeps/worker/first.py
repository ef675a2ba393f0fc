"""What cells need first of their 16-bit models (``sweeps.study.cell.Cell.first``), as a worker knows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from kbit.errors import ActivationError
from sweeps.errors import NotYetError
from sweeps.status import State
from sweeps.store.first import slopes_of, stored_first
from sweeps.store.parts import Store
from sweeps.store.rows import recorded_state
from sweeps.store.schema import Row
from sweeps.study.cell import Cell

_TRACEBACK: Final = "Traceback"


@dataclass(kw_only=True)
class KnownFirst:
    """The stored tables of slopes, by measurement, or why one can't be had: each is read once.

    A plan puts a table before its cells, so it is stored by the time that one of them asks.
    """

    store: Store
    _known: dict[str, Row] = field(default_factory=dict)

    def slopes(self, cell: Cell) -> Sequence[float] | None:
        """Return the slopes of the loss that a cell's method needs; None of other methods.

        Raises:
            NotYetError: they are not stored.
            ActivationError: they couldn't be measured.
            MemoryError: memory ran out when they were: a larger job may have both, the table and the cell.
        """
        if cell.first is None:
            return None
        what = f"the table of sensitivity of {cell.model.label}"
        if cell.first.key not in self._known:
            row = stored_first(self.store, cell)
            if row is None:
                raise NotYetError(
                    f"{what} is not stored: another launch may be measuring it. The same command goes on when it is"
                )
            self._known[cell.first.key] = row
        row = self._known[cell.first.key]
        slopes = slopes_of(row)
        if slopes is not None:
            return slopes
        text = f"it needs {what}, which could not be measured: {_reason(row)}"
        if recorded_state(row) is State.OOM:
            raise MemoryError(text)
        raise ActivationError(text)


def _reason(row: Row) -> str:
    """Return a stored failure in a line: the last of a traceback, the first of other words."""
    lines = str(row["error"] or row["status"]).strip().splitlines()
    return lines[-1] if lines[0].startswith(_TRACEBACK) else lines[0]
