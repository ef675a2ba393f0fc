"""Predict whether a worker has time for its next cell, corrected by how long earlier cells took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

LEAST_SCALE: Final = 0.5
"""Cells that were quicker than predicted (or failed at once) don't make the next one seem quicker than this."""


@dataclass(kw_only=True)
class Pace:
    """The time that the cells of one pack take.

    Attributes:
        until: epoch seconds at which the worker must be done; None is never.
        predicted: seconds of each cell; empty where nothing is known.
    """

    until: float | None
    predicted: Sequence[float] = ()
    _cells: int = 0
    _seconds: float = 0.0
    _predicted_seconds: float = 0.0

    def over(self, now: float) -> bool:
        """Tell whether the time is up."""
        return self.until is not None and now >= self.until

    def fits(self, cell: int, *, now: float, load_seconds: float = 0.0) -> bool:
        """Tell whether the pack's cell of this number would end in time, the model being loaded first."""
        return self.until is None or now + load_seconds + self.seconds(cell) <= self.until

    def seconds(self, cell: int) -> float:
        """Predict the seconds of the pack's cell of this number; without a prediction, the mean of those before."""
        if not self.predicted:
            return self._seconds / self._cells if self._cells else 0.0
        scale = self._seconds / self._predicted_seconds if self._predicted_seconds else 1.0
        return self.predicted[cell] * max(LEAST_SCALE, scale)

    def took(self, cell: int, seconds: float) -> None:
        """Note the seconds that a cell took."""
        self._cells += 1
        self._seconds += seconds
        self._predicted_seconds += self.predicted[cell] if self.predicted else 0.0
