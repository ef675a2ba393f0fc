"""What fits into a budget: cells in their order, with the loading of their models, and what each pack may take."""

from __future__ import annotations

import pytest

from sweeps.errors import UserError
from sweeps.plan.budget import fit, parse_budget
from sweeps.plan.cost import load_seconds
from sweeps.plan.pack import Pack
from sweeps.plan.packs import Known, Packing, make_plan
from tests.sweeps.plan.known_costs import cost_of
from tests.sweeps.plan.test_order import EVAL, MANIFEST, MODELS

SECONDS = {"neox-a": 10.0, "neox-b": 100.0}
COST = cost_of({(name, EVAL.name, None): s for name, s in SECONDS.items()}, MODELS)
LOAD = {m.name: load_seconds(m) for m in MODELS}


def packs() -> tuple[Pack, ...]:
    return make_plan(MANIFEST, Known(), retry=(), cost=lambda: COST, packing=Packing(cells=4)).packs


def one(_: Pack) -> int:
    return 1


def test_cells_are_taken_in_their_order_until_the_next_would_not_fit() -> None:
    left = LOAD["neox-a"] + 4 * 10 + LOAD["neox-b"] + 2 * 100 + 99
    fitting = fit(packs(), left, one)
    assert [(p.model.name, [c.quant.bits for c, _ in p.items]) for p in fitting.packs] == [
        ("neox-a", [16, 3, 4, 5]),
        ("neox-b", [16, 3]),
    ]
    assert fitting.seconds == pytest.approx(left - 99)
    assert fitting.beyond == 2
    whole, cut = fitting.packs
    assert whole == packs()[0]
    assert cut.id != packs()[1].id  # a pack is what it holds


def test_allowances_are_all_that_is_left_and_as_the_predictions() -> None:
    fitting = fit(packs(), 10_000.0, one)
    assert fitting.beyond == 0
    costs = [LOAD["neox-a"] + 40, LOAD["neox-b"] + 400]
    assert list(fitting.allowances.values()) == pytest.approx([10_000 * c / sum(costs) for c in costs])


def test_a_pack_on_two_devices_costs_twice() -> None:
    enough = 2 * (LOAD["neox-a"] + 40) + 2 * (LOAD["neox-b"] + 400)
    assert fit(packs(), enough + 1e-6, lambda _: 2).beyond == 0
    assert fit(packs(), enough - 1, lambda _: 2).beyond == 1


def test_each_pack_pays_for_its_start() -> None:
    both = LOAD["neox-a"] + 40 + LOAD["neox-b"] + 400 + 2 * 30
    assert fit(packs(), both + 1e-6, one, start=30.0).beyond == 0
    assert fit(packs(), both - 1, one, start=30.0).beyond == 1


@pytest.mark.parametrize("left", [0.0, 1.0])
def test_nothing_fits_where_not_even_one_cell_does(left: float) -> None:
    fitting = fit(packs(), left, one)
    assert fitting.packs == ()
    assert fitting.allowances == {}
    assert fitting.beyond == 8


def test_a_budget_is_hours_more_than_0() -> None:
    assert parse_budget(None) is None
    assert parse_budget(1.5) == 5400.0
    for wrong in (0, -1, "much", True, float("nan"), float("inf"), [1]):
        with pytest.raises(UserError, match=r"budget=.* is not valid: GPU-hours .*, e.g. budget=12"):
            parse_budget(wrong)
