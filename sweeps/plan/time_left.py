"""Predict when a run on this machine ends, by what its measurements took so far."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from sweeps.plan.cost import CostModel
from sweeps.plan.pack import Pack
from sweeps.study.cell import ModelRef

SAMPLE: Final = 16
"""Cells of a model that are predicted again; the rest are taken to have changed as they did."""
FIRST_SECONDS: Final = 2.0
GROWTH: Final = 0.03
"""It is predicted again after this part of the time that has passed, or is left: often at first and at the end."""


@dataclass(kw_only=True)
class TimeLeft:
    """Predicts the seconds that are left of packs that workers share.

    Not by the mean over what was measured: the first cells wait for kernels and caches, small models come before large
    ones, and cells before those of a slower method.

    Attributes:
        packs: the plan's.
        cost: predicts, and learns while the run goes on.
        workers: how many share the packs.
        clock: seconds that only grow.
    """

    packs: Sequence[Pack]
    cost: CostModel
    workers: int
    clock: Callable[[], float] = time.monotonic
    _sizes: Mapping[str, int] = field(init=False)
    _done: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _began: float = field(init=False)
    _told: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        self._sizes = {pack.id: len(pack.measurements()) for pack in self.packs}
        self._began = self.clock()

    def measured(self, pack: str) -> None:
        """Take in that a measurement of a pack has ended, or will not be made."""
        self._done[pack] += 1

    def __call__(self) -> float:
        """Return seconds."""
        now = self.clock()
        if self._told is not None:
            at, left = self._told
            if now - at <= max(FIRST_SECONDS, min(GROWTH * (now - self._began), GROWTH * left)):
                return max(0.0, left - (now - at))
        self._told = now, self._predicted()
        return self._told[1]

    def _predicted(self) -> float:
        parts: dict[ModelRef, list[tuple[Pack, float]]] = defaultdict(list)
        for pack in self.packs:
            part = 1 - self._done[pack.id] / self._sizes[pack.id]
            if part > 0:
                parts[pack.model].append((pack, part))
        total = sum(self._seconds(model, packs) for model, packs in parts.items())
        return total / max(1, min(self.workers, sum(map(len, parts.values()))))

    def _seconds(self, model: ModelRef, packs: Sequence[tuple[Pack, float]]) -> float:
        """Return worker-seconds for parts of a model's packs; what has begun is loaded."""
        planned = sum(pack.seconds * part for pack, part in packs)
        items = [item for pack, _ in packs for item in zip(pack.items, pack.item_seconds, strict=True)]
        some = items[:: max(1, len(items) // SAMPLE)]
        now = sum(self.cost.cell_seconds(cell, evals) for (cell, evals), _ in some)
        before = sum(seconds for _, seconds in some)
        loads = sum(self.cost.load(model) for pack, _ in packs if not self._done[pack.id])
        return planned * now / before + loads if before else planned + loads
