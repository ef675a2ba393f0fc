"""How good predictions have been: what was predicted of each pack when it began, and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

import numpy as np

from sweeps.text import counted

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS: Final = ("launch", "pack", "model", "started", "finished", "quantize_seconds", "predicted_seconds")
"""Of a row, what is compared."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A pack of a launch.

    Attributes:
        predicted: seconds when it began, without loading the model.
        took: from the beginning of its first quantization to the end of its last measurement.
        is_first: no pack of its model had ended when it began: others' values were all that was known.
    """

    predicted: float
    took: float
    is_first: bool


def accuracy_of(rows: pa.Table) -> str | None:
    """Say how far predictions of stored rows (``COLUMNS``) were off; None where none is stored."""
    packs = [pack for pack in compared(rows) if pack.took > 0]
    later = _errors([pack for pack in packs if not pack.is_first], "after a model's first")
    first = _errors([pack for pack in packs if pack.is_first], "before one of their model had ended")
    said = [text for text in (later, first) if text]
    return f"median error and 95th percentile of the time taken here: {'; '.join(said)}" if said else None


def _errors(packs: Sequence[Compared], which: str) -> str | None:
    if not packs:
        return None
    middle, most = np.percentile([abs(pack.predicted - pack.took) / pack.took for pack in packs], [50, 95])
    return f"{middle:.0%} and {most:.0%} of {counted(len(packs), 'pack')} {which}"


def compared(rows: pa.Table) -> list[Compared]:
    """Return each pack of each launch, in the order they ended."""
    if not rows.num_rows:
        return []
    import pyarrow.compute as pc

    is_told = pc.and_(pc.is_valid(rows.column("predicted_seconds")), pc.is_valid(rows.column("started")))
    # By columns: as rows of Python those of a large study take more memory than all else in a plan.
    packs = rows.filter(is_told).sort_by("started").group_by(["launch", "pack", "model"], use_threads=False)
    of_first = pc.ScalarAggregateOptions(skip_nulls=False)
    found = packs.aggregate(
        [
            *(("started", "first"), ("quantize_seconds", "first", of_first)),
            *(("finished", "max"), ("predicted_seconds", "sum")),
        ]
    )
    ended: dict[str, datetime] = {}
    result = []
    for pack in found.sort_by("finished_max").to_pylist():
        end, began = (
            pack["finished_max"],
            pack["started_first"] - timedelta(seconds=pack["quantize_seconds_first"] or 0),
        )
        is_first = began < ended.setdefault(pack["model"], end)
        took = (end - began).total_seconds()
        result.append(Compared(predicted=pack["predicted_seconds_sum"], took=took, is_first=is_first))
    return result
