"""The baseline gate opens for a baseline that is what its reference says, and for nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sweeps.executors.slurm.node.baseline_gate import gate_problem


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
