"""What is stored of measurements that a cell needs first (``sweeps.study.cell.Cell.first``)."""

from __future__ import annotations

from kbit.evaluation.spec import SLOPES
from sweeps.status import State
from sweeps.store.parts import Store
from sweeps.store.samples import decode_samples
from sweeps.store.schema import Row
from sweeps.study.cell import Cell


def stored_first(store: Store, cell: Cell) -> Row | None:
    """Return what became of the measurement that a cell needs first: its row (status, error_type, error, samples)."""
    assert cell.first is not None
    rows = store.read(["status", "error_type", "error", "samples"], measurements={cell.first.key}).to_pylist()
    return rows[0] if rows else None


def slopes_of(row: Row | None) -> list[float] | None:
    """Return the slopes of the loss that such a row has, one a layer; None where it has none."""
    if row is None or row["status"] != State.DONE:
        return None
    return [float(slope) for slope in decode_samples(row["samples"])[SLOPES]]


def stored_slopes(store: Store, cell: Cell) -> list[float] | None:
    """Return the slopes of the loss that a cell's method needs, one a layer; None of other methods, and where none are
    stored.
    """
    return None if cell.first is None else slopes_of(stored_first(store, cell))
