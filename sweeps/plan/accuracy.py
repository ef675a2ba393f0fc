"""How good predictions have been: what was predicted of each pack when it began, and what it took."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from sweeps.store.rows import moment
from sweeps.store.schema import Row
from sweeps.text import counted

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


def accuracy_of(rows: Iterable[Row]) -> Accuracy | None:
    """Compare stored rows (``COLUMNS``) by launch and pack; None where no prediction is stored."""
    errors = [abs(predicted - took) / took for predicted, took in compared(rows) if took > 0]
    if not errors:
        return None
    middle, most = np.percentile(errors, [50, 95])
    return Accuracy(packs=len(errors), median=float(middle), p95=float(most))


def compared(rows: Iterable[Row]) -> list[tuple[float, float]]:
    """Return predicted and measured seconds of each pack of each launch, without loading, in the order they ended.

    What it took is from the beginning of its first quantization to the end of its last measurement.
    """
    packs: dict[tuple[object, object], list[Row]] = defaultdict(list)
    for row in rows:
        if row.get("predicted_seconds") is not None and row.get("started") is not None:
            packs[row["launch"], row["pack"]].append(row)
    found = []
    for of_pack in packs.values():
        first = min(of_pack, key=lambda row: moment(row["started"]))
        end = max(moment(row["finished"]) for row in of_pack)
        took = (end - moment(first["started"])).total_seconds() + (first.get("quantize_seconds") or 0.0)
        found.append((end, sum(row["predicted_seconds"] for row in of_pack), took))
    return [(predicted, took) for _, predicted, took in sorted(found, key=lambda pack: pack[0])]
