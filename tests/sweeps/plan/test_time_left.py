"""The time that is left is what the rest takes, not what the first cells took."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from sweeps.plan.cost import CostModel, tokens_of
from sweeps.plan.learned import SPREAD
from sweeps.plan.packs import Known, Packing, Plan, make_plan
from sweeps.plan.time_left import TimeLeft
from sweeps.study.cell import Measurement
from sweeps.study.manifest import Manifest
from tests.sweeps.plan.known_costs import row
from tests.sweeps.plan.test_order import EVAL as LONG
from tests.sweeps.plan.test_order import GRID

EVAL = replace(LONG, limit=1000)
MANIFEST = Manifest(sweep="s", cells=GRID.cells, evals=(EVAL,), excluded=(), config={})


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def planned(cells: int) -> Plan:
    return make_plan(MANIFEST, Known(), retry=(), cost=lambda: CostModel(device="cpu"), packing=Packing(cells=cells))


def test_before_anything_is_measured_it_is_what_the_plan_says() -> None:
    plan = planned(2)
    for workers in (1, 2):
        left = TimeLeft(packs=plan.packs, cost=CostModel(device="cpu"), workers=workers)
        assert left() == pytest.approx(plan.seconds / workers, rel=0.01)


def test_a_slow_start_is_not_taken_for_the_pace() -> None:
    """The first measurement waits ten minutes, for kernels; all else takes what it is predicted to."""
    plan, cost, clock = planned(4), CostModel(device="cpu"), Clock()
    left = TimeLeft(packs=plan.packs, cost=cost, workers=1, clock=clock)
    items = [(pack, cell, s) for pack in plan.packs for (cell, _), s in zip(pack.items, pack.item_seconds, strict=True)]
    slow = 600.0
    for number, (pack, cell, predicted) in enumerate(items):
        seconds = predicted + (0.0 if number else slow)
        clock.now += seconds
        about = {"key": cell.key, "pack": pack.id, "quantize_seconds": 0.0}
        tokens = tokens_of(Measurement(cell=cell, eval=EVAL))
        cost.learn(row(pack.model, EVAL.name, EVAL.limit, seconds, n_tokens=tokens, **about))
        left.measured(pack.id)
        rest = sum(s for *_, s in items[number + 1 :])
        # By the mean of what was measured it would be 4,200 s after the first.
        assert rest / 2 - 3 < left() < rest * SPREAD + 3
    assert left() == 0.0


def test_it_counts_down_between_two_looks_and_what_is_not_measured_is_not_waited_for() -> None:
    plan, clock = planned(8), Clock()
    left = TimeLeft(packs=plan.packs, cost=CostModel(device="cpu"), workers=1, clock=clock)
    first = left()
    clock.now = 1.0
    assert left() == pytest.approx(first - 1.0)
    for pack in plan.packs:
        for _ in pack.measurements():
            left.measured(pack.id)
    clock.now = 100.0
    assert left() == 0.0
