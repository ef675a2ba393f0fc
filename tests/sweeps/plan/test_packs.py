"""What is left to do: missing work once, finished work never, lost and failed work as asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kbit.calibration import Calibration
from kbit.evaluation.spec import EvalSpec
from sweeps.errors import UserError
from sweeps.plan.cost import CostModel
from sweeps.plan.order import ORDERS
from sweeps.plan.pack import Pack
from sweeps.plan.packs import Known, Packing, Plan, make_plan, parse_retry
from sweeps.status import UNRECORDED
from sweeps.study.cell import Measurement, ModelRef
from sweeps.study.grid import expand
from sweeps.study.manifest import Manifest, load_manifests
from tests.sweeps.plan.known_costs import cost_of

MODELS = [
    ModelRef(family="neox", name=f"neox-{s}", params=n, path=f"/{s}", weights_hash=s * 64)
    for s, n in (("a", 10**6), ("b", 10**7))
]
EVALS = tuple(
    EvalSpec(kind="perplexity", name=n, dataset="sha256:" + n * 64, compute_dtype="float32", limit=1000, window=512)
    for n in ("x", "y")
)
EXCLUDED = {"bits": 2, "dtype": "int"}
RULE = {"when": {"bits": 2}, "reason": "too few bits"}
GRID = expand([{"bits": [3, 4, 5], "dtype": ["int", "float"]}, {"bits": 16}, EXCLUDED], MODELS, [RULE])
MANIFEST = Manifest(sweep="s", cells=GRID.cells, evals=EVALS, excluded=GRID.excluded, config={})
KEYS = [m.key for m in MANIFEST.measurements()]


def plan(statuses: dict[str, str], retry: object = "lost", **more: object) -> Plan:
    packing = more.pop("packing", Packing(workers=2))
    known = Known(statuses=statuses, **more)  # type: ignore[arg-type]
    return make_plan(MANIFEST, known, retry=parse_retry(retry), cost=lambda: CostModel(device="cpu"), packing=packing)  # type: ignore[arg-type]


def test_everything_is_planned_once_at_first() -> None:
    first = plan({})
    assert sorted(first.measurement_keys()) == sorted(KEYS)
    assert first.todo == len(KEYS) == 2 * 7 * 2


def test_results_are_never_run_again_whatever_retry_says() -> None:
    assert plan(dict.fromkeys(KEYS, "done"), retry="all").todo == 0


@pytest.mark.parametrize(
    ("retry", "again"),
    [
        ("lost", {"lost"}),
        ("none", set()),
        ("all", {"lost", "failed", "diverged"}),
        (["failed"], {"lost", "failed"}),
        (["diverged", "lost"], {"lost", "diverged"}),
    ],
)
def test_retry_chooses_what_runs_again(retry: object, again: set[str]) -> None:
    statuses = dict.fromkeys(KEYS[3:], "done") | {KEYS[0]: "failed", KEYS[1]: "diverged"}
    planned = plan(statuses, retry=retry, ended={KEYS[2]: "lost"})
    names = {KEYS[0]: "failed", KEYS[1]: "diverged", KEYS[2]: "lost"}
    assert {names[k] for k in planned.measurement_keys()} == again


def test_what_others_are_at_is_left_to_them() -> None:
    planned = plan({KEYS[5]: "failed"}, retry="all", in_flight=set(KEYS[:10]))
    assert not set(planned.measurement_keys()) & set(KEYS[:10])
    assert planned.counts["in flight"] == 10


def test_what_is_done_counts_as_done_while_its_launch_still_runs() -> None:
    assert plan({KEYS[0]: "done"}, in_flight=set(KEYS)).counts["done"] == 1


def test_an_added_evaluation_runs_alone() -> None:
    first_eval = {m.key: "done" for m in MANIFEST.measurements() if m.eval.name == "x"}
    planned = plan(first_eval)
    assert planned.todo == len(KEYS) // 2
    assert {m.eval.name for p in planned.packs for m in p.measurements()} == {"y"}


def test_a_pack_is_one_model_and_packs_are_shared_out() -> None:
    slow = {("neox-b", n, 1000): 10.0 for n in ("x", "y")}
    cost = cost_of(slow, MODELS)
    packs = make_plan(MANIFEST, Known(), retry=parse_retry("lost"), cost=lambda: cost, packing=Packing(workers=2)).packs
    assert all({c.model for c, _ in p.items} == {p.model} for p in packs)
    assert len([p for p in packs if p.model.name == "neox-b"]) > 1
    assert len({p.id for p in packs}) == len(packs)


def test_a_pack_survives_the_way_to_a_worker() -> None:
    for pack in plan({}).packs:
        back = Pack.from_dict(json.loads(json.dumps(pack.to_dict())))
        assert back == pack
        assert [m.key for m in back.measurements()] == [m.key for m in pack.measurements()]


def test_a_manifest_is_named_by_its_content_and_comes_back(tmp_path: Path) -> None:
    assert MANIFEST.save(tmp_path) == MANIFEST.save(tmp_path)
    (back,) = load_manifests(tmp_path)
    assert [m.key for m in back.measurements()] == KEYS
    assert load_manifests(tmp_path, "other") == []
    assert back.excluded == GRID.excluded
    assert [e.axes["model"] for e in back.excluded] == ["neox-a", "neox-b"]
    assert all(e.reason == "too few bits" for e in back.excluded)


@pytest.mark.parametrize("retry", ["faild", ["failed", "done"], [3]])
def test_an_unknown_retry_is_refused(retry: object) -> None:
    with pytest.raises(UserError, match="failed, oom, diverged, timeout"):
        parse_retry(retry)


@pytest.mark.parametrize("state", UNRECORDED)
def test_what_ended_without_a_record_runs_again_unless_told_not_to(state: str) -> None:
    assert plan(dict.fromkeys(KEYS[1:], "done"), ended={KEYS[0]: state}).measurement_keys() == [KEYS[0]]
    idle = plan(dict.fromkeys(KEYS[1:], "done"), retry="none", ended={KEYS[0]: state})
    assert idle.todo == 0
    assert idle.counts[state] == 1


def test_what_ran_out_of_memory_runs_again_when_asked_and_one_rung_up() -> None:
    statuses = dict.fromkeys(KEYS[4:], "done") | dict.fromkeys(KEYS[:2], "oom")
    assert set(plan(statuses).measurement_keys()) == set(KEYS[2:4])
    again = plan(statuses, retry=["oom"], rungs=dict.fromkeys(KEYS[:2], 1))
    assert {p.rung: {k.key for k in p.measurements()} for p in again.packs} == {0: set(KEYS[2:4]), 1: set(KEYS[:2])}


def test_a_pack_has_as_many_cells_as_asked_for() -> None:
    packs = plan({}, packing=Packing(cells=3)).packs
    assert sorted(len(p.items) for p in packs) == [1, 1, 3, 3, 3, 3]


def test_a_pack_is_predicted_to_fit_its_time() -> None:
    cost = cost_of({(m, n, 1000): 30.0 for m in ("neox-a", "neox-b") for n in ("x", "y")}, MODELS)
    packs = make_plan(
        MANIFEST, Known(), retry=parse_retry("lost"), cost=lambda: cost, packing=Packing(seconds=130.0)
    ).packs
    assert {len(p.items) for p in packs} == {2, 1}
    assert all(p.seconds == sum(p.item_seconds) <= 130.0 for p in packs)


def test_a_baseline_gets_a_pack_of_its_own_when_cells_wait_for_it() -> None:
    packs = plan({}, packing=Packing(baseline_apart=True)).packs
    assert [len(p.items) for p in packs if any(c.quant.is_baseline for c, _ in p.items)] == [1, 1]


def test_what_cells_need_first_stands_before_them_in_one_pack_and_costs_apart() -> None:
    data = Calibration(dataset="sha256:x", samples=4, length=128, name="x")
    blocks = [{"method": "mixed", "budget": [3.25, 4.25], "dtype": ["int", "normal"]}, {"bits": [3, 4], "dtype": "int"}]
    cells = expand([*blocks, {"bits": 16}], MODELS, calibrations=lambda _: [data]).cells
    study = Manifest(sweep="s", cells=cells, evals=EVALS, excluded=(), config={})
    firsts = list(dict.fromkeys(c.first for c in cells if c.first is not None))
    assert len(firsts) == len(MODELS)
    assert list(study.measurements())[-2:] == firsts

    def packs_of(statuses: dict[str, str], **packing: object) -> tuple[Pack, ...]:
        known, how = Known(statuses=statuses), Packing(**packing)  # type: ignore[arg-type]
        cost = CostModel(device="cpu")
        return make_plan(study, known, retry=parse_retry("lost"), cost=lambda: cost, packing=how).packs

    for order in ORDERS:
        packs = packs_of({}, seconds=1e-9, order=order)  # each cell that can be gets a pack of its own
        assert sorted(len(p.items) for p in packs) == [1] * 6 + [5, 5]
        for pack in packs:
            if len(pack.items) > 1:
                (cell, evals), *others = pack.items
                assert Measurement(cell=cell, eval=evals[0]) in firsts
                assert {c.quant.method for c, _ in others} == {"mixed"}
                assert pack.item_seconds[0] > max(pack.item_seconds[1:])
    assert [len(p.items) for p in packs_of({}, seconds=1e9)] == [8, 8]
    (apart, *_) = packs_of({}, seconds=1e9, baseline_apart=True)
    assert [[e.kind for e in evals] for _, evals in apart.items] == [["perplexity", "perplexity"]]
    done = packs_of({m.key: "done" for m in firsts}, seconds=1e-9)
    assert {len(p.items) for p in done} == {1}
    alone = packs_of({m.key: "done" for m in study.measurements() if m not in firsts})
    assert [p.measurements() for p in alone] == [[m] for m in firsts]


MIXED = expand(
    [{"method": "mixed", "budget": [3.25, 4.25], "dtype": "int"}, {"bits": 16}],
    MODELS[:1],
    calibrations=lambda _: [Calibration(dataset="sha256:x", samples=4, length=128, name="x")],
).cells
STUDY = Manifest(sweep="s", cells=MIXED, evals=EVALS[:1], excluded=(), config={})
*_OTHERS, TABLE = STUDY.measurements()
ON_BASELINE, ON_TABLE = (
    [m.key for m in _OTHERS if m.cell.quant.is_baseline is is_baseline] for is_baseline in (True, False)
)


def plan_mixed(statuses: dict[str, str], retry: object = "lost", **more: object) -> Plan:
    known = Known(statuses=statuses, **more)  # type: ignore[arg-type]
    return make_plan(STUDY, known, retry=parse_retry(retry), cost=lambda: CostModel(device="cpu"), packing=Packing())


def test_cells_wait_for_a_table_that_another_launch_measures() -> None:
    planned = plan_mixed({}, in_flight={TABLE.key})
    assert planned.measurement_keys() == ON_BASELINE
    assert planned.counts == {"to do": 1, "in flight": 1, "waiting for what is in flight": 2}
    done = plan_mixed({TABLE.key: "done"}, in_flight={TABLE.key})
    assert sorted(done.measurement_keys()) == sorted([*ON_BASELINE, *ON_TABLE])


def test_a_table_that_failed_is_measured_again_only_where_that_is_asked_for() -> None:
    statuses = {TABLE.key: "failed", ON_BASELINE[0]: "done", ON_TABLE[0]: "failed"}
    assert plan_mixed(statuses).measurement_keys() == ON_TABLE[1:]
    (again,) = plan_mixed(statuses, retry="failed").packs
    assert [m.key for m in again.measurements()] == [TABLE.key, *ON_TABLE]


def test_a_table_and_its_cells_are_one_pack_at_the_highest_of_their_rungs() -> None:
    rungs = {ON_TABLE[0]: 1, ON_BASELINE[0]: 3}
    packs = plan_mixed(dict.fromkeys(rungs, "oom"), retry="oom", rungs=rungs).packs
    assert {p.rung: {m.key for m in p.measurements()} for p in packs} == {
        3: set(ON_BASELINE),
        1: {TABLE.key, *ON_TABLE},
    }


def test_what_is_left_of_a_pack_keeps_its_id_and_order() -> None:
    pack = plan({}).packs[0]
    keys = [m.key for m in pack.measurements()]
    left = pack.without(keys[:3])
    assert left is not None
    assert left.id == pack.id
    assert [m.key for m in left.measurements()] == keys[3:]
    assert len(left.items) == len(left.item_seconds)
    assert pack.without(keys) is None
