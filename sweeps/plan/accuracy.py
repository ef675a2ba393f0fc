"""How good predictions have been: what was predicted of each pack when it began, and what it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from sweeps.text import counted

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS: Final = ("launch", "pack", "started", "finished", "quantize_seconds", "predicted_seconds")
"""Of a row, what is compared."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Errors of predictions, as fractions of what packs took.

    Attributes:
        packs: compared.
        median, p95: absolute errors, without sign.
    """

    packs: int
    median: float
    p95: float

    @property
    def text(self) -> str:
        """The errors in words."""
        return (
            f"median error {self.median:.0%}, 95th percentile {self.p95:.0%} of the time that "
            f"{counted(self.packs, 'pack')} took here"
        )


def accuracy_of(rows: pa.Table) -> Accuracy | None:
    """Compare stored rows (``COLUMNS``) by launch and pack; None where no prediction is stored."""
    errors = [abs(predicted - took) / took for predicted, took in compared(rows) if took > 0]
    if not errors:
        return None
    middle, most = np.percentile(errors, [50, 95])
    return Accuracy(packs=len(errors), median=float(middle), p95=float(most))


def compared(rows: pa.Table) -> list[tuple[float, float]]:
    """Return predicted and measured seconds of each pack of each launch, without loading, in the order they ended.

    What it took is from the beginning of its first quantization to the end of its last measurement.
    """
    if not rows.num_rows:
        return []
    import pyarrow.compute as pc

    is_told = pc.and_(pc.is_valid(rows.column("predicted_seconds")), pc.is_valid(rows.column("started")))
    # By columns: as rows of Python those of a large study take more memory than all else in a plan.
    packs = rows.filter(is_told).sort_by("started").group_by(["launch", "pack"], use_threads=False)
    of_first = pc.ScalarAggregateOptions(skip_nulls=False)
    found = packs.aggregate(
        [
            *(("started", "first"), ("quantize_seconds", "first", of_first)),
            *(("finished", "max"), ("predicted_seconds", "sum")),
        ]
    )
    return [
        (
            pack["predicted_seconds_sum"],
            (pack["finished_max"] - pack["started_first"]).total_seconds() + (pack["quantize_seconds_first"] or 0.0),
        )
        for pack in found.sort_by("finished_max").to_pylist()
    ]
