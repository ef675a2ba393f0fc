"""What is stored of measurements that a cell needs first (``sweeps.study.cell.Cell.first``)."""

from __future__ import annotations

from kbit.evaluation.spec import SLOPES
from sweeps.status import State
from sweeps.store.parts import Store, decode_samples
from sweeps.study.cell import Cell


def stored_slopes(store: Store, cell: Cell) -> list[float] | None:
    """Return the slopes of the loss that a cell's method needs, one a layer; None of other methods, and where none are
    stored.
    """
    if cell.first is None:
        return None
    rows = store.read(["status", "samples"], measurements={cell.first.key}).to_pylist()
    found = next((decode_samples(row["samples"]) for row in rows if row["status"] == State.DONE), None)
    return None if found is None else [float(slope) for slope in found[SLOPES]]
