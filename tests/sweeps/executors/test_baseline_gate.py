"""The baseline gate opens for a baseline that is what its reference says, and for nothing else."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from kbit.calibration import Calibration
from kbit.evaluation.spec import EvalSpec
from kbit.spec import QuantSpec
from kbit.specs.mixed import MixedSpec
from sweeps.executors.slurm.launch_plan import _baselines, _frozen
from sweeps.executors.slurm.node.baseline_gate import gate_problem
from sweeps.plan.cost import CostModel
from sweeps.plan.order import is_baseline
from sweeps.plan.pack import Pack
from sweeps.plan.packs import Known, Packing, make_plan
from sweeps.study.cell import Cell, Measurement, ModelRef
from sweeps.study.manifest import Manifest


def row(status: str = "done", **metrics: float) -> dict[str, Any]:
    return {"eval": "wikitext2", "status": status, "metrics": metrics}


@pytest.mark.parametrize("value", [10.0, 10.19, 9.81])
def test_a_baseline_within_the_tolerance_opens_it(value: float) -> None:
    assert gate_problem([row(perplexity=value)], {"wikitext2_perplexity": 10.0}, 0.02) is None


@pytest.mark.parametrize("value", [10.3, 9.7, math.nan, math.inf])
def test_a_baseline_that_is_off_says_by_how_much(value: float) -> None:
    problem = gate_problem([row(perplexity=value)], {"wikitext2_perplexity": 10.0}, 0.02)
    assert problem is not None
    assert "wikitext2_perplexity" in problem
    assert "off the reference 10" in problem


@pytest.mark.parametrize("status", ["diverged", "failed"])
def test_a_baseline_that_did_not_finish_well_keeps_it_shut(status: str) -> None:
    assert gate_problem([row(status, perplexity=10.0)], {}, 0.02) == f"its baseline is {status} on wikitext2"


def test_without_a_reference_finishing_is_enough() -> None:
    assert gate_problem([row(perplexity=10.0)], {}, 0.0) is None


def test_a_reference_for_what_is_not_measured_is_a_mistake() -> None:
    problem = gate_problem([row(perplexity=10.0)], {"wikitext2_loss": 2.3}, 0.02)
    assert problem is not None
    assert "has no wikitext2_loss" in problem


def test_a_baseline_that_is_not_measured_on_everything_keeps_it_shut() -> None:
    problem = gate_problem([row(perplexity=10.0)], {"wikitext2_perplexity": 10.0}, 0.02, missing=["c4", "piqa"])
    assert problem == "its baseline is not measured on c4, piqa"


def test_what_methods_need_first_of_a_model_is_no_baseline_that_others_wait_for() -> None:
    model = ModelRef(family="neox", name="neox-a", params=10**6, path="/a", weights_hash="a" * 64)
    text = EvalSpec(kind="perplexity", name="x", dataset="sha256:x", compute_dtype="float32", limit=1000, window=512)
    data = Calibration(dataset="sha256:y", samples=4, length=128, name="y")
    baseline = Cell(model=model, quant=QuantSpec(bits=16))
    mixed = Cell(model=model, quant=MixedSpec(budget=4.25, dtype="int"), calibration=data)
    study = Manifest(sweep="s", cells=(baseline, mixed), evals=(text,), excluded=(), config={})
    first = mixed.first
    assert first is not None
    assert _baselines(study) == {"neox-a": [Measurement(cell=baseline, eval=text).key]}
    packing = Packing(baseline_apart=True)
    packs = make_plan(study, Known(), retry=frozenset(), cost=lambda: CostModel(device="cuda"), packing=packing).packs
    assert [all(map(is_baseline, pack.items)) for pack in packs] == [True, False]
    assert packs[1].measurements() == [first, Measurement(cell=mixed, eval=text)]
    # Only the study's own evaluations have definitions to be frozen.
    assert _frozen(packs[1], {text: text}) == packs[1]
    # As a job reads it: the windows of the table belong to its key.
    assert Pack.from_dict(json.loads(json.dumps(packs[1].to_dict()))).measurements()[0].key == first.key
