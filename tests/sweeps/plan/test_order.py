"""The order of cells: of a model its baseline first, then the cheapest; as written; or the longest packs first."""

from __future__ import annotations

import pytest

from kbit.evaluation.spec import EvalSpec
from sweeps.errors import UserError
from sweeps.plan.cost import CostModel
from sweeps.plan.order import ORDERS, parse_order
from sweeps.plan.packs import Known, Packing, Plan, make_plan
from sweeps.study.cell import ModelRef
from sweeps.study.grid import expand
from sweeps.study.manifest import Manifest

MODELS = [
    ModelRef(family="neox", name=f"neox-{s}", params=n, path=f"/{s}", weights_hash=s * 64)
    for s, n in (("b", 10**8), ("a", 10**6))
]
EVAL = EvalSpec(kind="perplexity", name="x", dataset="sha256:" + "0" * 64, compute_dtype="float32", window=512)
GRID = expand([{"bits": [3, 4], "dtype": "int"}, {"bits": 16}, {"bits": 5, "dtype": "int"}], MODELS)
MANIFEST = Manifest(sweep="s", cells=GRID.cells, evals=(EVAL,), excluded=(), config={})


def planned(order: str, **packing: int) -> Plan:
    cost = CostModel(device="cpu")
    packing_ = Packing(order=order, **packing)  # type: ignore[arg-type]
    return make_plan(MANIFEST, Known(), retry=(), cost=lambda: cost, packing=packing_)


def run_order(order: str, **packing: int) -> list[tuple[str, int]]:
    return [(c.model.name, c.quant.bits) for p in planned(order, **packing).packs for c, _ in p.items]


def test_by_default_baselines_come_first_then_the_cheapest_cells() -> None:
    assert Packing().order == "cheapest"
    cells = run_order("cheapest", cells=1)
    assert [bits for _, bits in cells[:2]] == [16, 16]
    assert cells[0][0] == "neox-a"
    assert [name for name, _ in cells[2:]] == ["neox-a"] * 3 + ["neox-b"] * 3


def test_a_model_is_not_loaded_once_more_for_its_baseline() -> None:
    """Packs that have a baseline come first, and in each the baseline does."""
    cells = run_order("cheapest", cells=2)
    assert cells == [
        *(("neox-a", 16), ("neox-a", 3)),
        *(("neox-b", 16), ("neox-b", 3)),
        *(("neox-a", 4), ("neox-a", 5)),
        *(("neox-b", 4), ("neox-b", 5)),
    ]


def test_as_the_study_writes_it() -> None:
    assert run_order("grid", cells=2) == [(m, bits) for m in ("neox-b", "neox-a") for bits in (3, 4, 16, 5)]


def test_the_longest_packs_first() -> None:
    seconds = [p.seconds for p in planned("longest", cells=2).packs]
    assert seconds == sorted(seconds, reverse=True)
    assert len(set(seconds)) > 1


@pytest.mark.parametrize("order", ORDERS)
def test_each_order_runs_everything_once(order: str) -> None:
    cells = run_order(order, cells=3)
    assert sorted(cells) == sorted((c.model.name, c.quant.bits) for c in GRID.cells)


def test_an_unknown_order_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(UserError, match=r"order='cheap' is not valid: one of cheapest: baselines first.*grid.*longest"):
        parse_order("cheap")
