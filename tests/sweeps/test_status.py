"""Each state says what it means, whether it runs again, and what to do; planning and reading do exactly that."""

from __future__ import annotations

import ast

import pytest

from analysis.cells import MEASURED
from kbit.evaluation.spec import EvalSpec
from sweeps.errors import UserError
from sweeps.executors.slurm.query.reconcile import _ENDED_AS
from sweeps.plan.cost import CostModel
from sweeps.plan.packs import Known, Packing, make_plan, parse_retry
from sweeps.status import FAILURES, FINAL, RECORDED, RETRY, UNRECORDED, Runs, State
from sweeps.store.rows import OOM_ERROR, recorded_state
from sweeps.study.cell import ModelRef
from sweeps.study.grid import expand
from sweeps.study.manifest import Manifest
from sweeps.tracking.runs import STATUSES
from tests import ROOT

MODEL = ModelRef(family="neox", name="neox-a", params=10**6, path="/a", weights_hash="a" * 64)
EVAL = EvalSpec(kind="perplexity", name="x", dataset="sha256:" + "x" * 64, compute_dtype="float32", window=512)
MANIFEST = Manifest(sweep="s", cells=expand([{"bits": 16}], [MODEL]).cells, evals=(EVAL,), excluded=(), config={})
(KEY,) = [m.key for m in MANIFEST.measurements()]


def runs(state: State, retry: object) -> bool:
    """Whether a launch runs the only measurement of a study, which is in a state."""
    recorded = {KEY: state} if state in (*RECORDED, State.OOM) else {}
    known = Known(
        statuses=recorded,
        in_flight={KEY} if state in (State.RUNNING, State.QUEUED) else (),
        ended={KEY: state} if state in UNRECORDED else {},
    )
    cost, packing = CostModel(device="cpu"), Packing(workers=1)
    plan = make_plan(MANIFEST, known, retry=parse_retry(retry), cost=lambda: cost, packing=packing)
    return plan.todo == 1


@pytest.mark.parametrize("state", State)
def test_a_state_says_all_of_itself(state: State) -> None:
    assert state.meaning
    assert state.advice
    assert isinstance(state.runs, Runs)
    assert str(state) == state.value == state.name.lower()


PLANNED = [s for s in State if s is not State.SUPERSEDED]
"""States of what a launch plans; what is superseded is what it does not plan."""


@pytest.mark.parametrize("state", PLANNED)
def test_a_launch_runs_exactly_what_a_state_says(state: State) -> None:
    by_default, told_not_to, all_asked = (runs(state, retry) for retry in ("lost", "none", "all"))
    says = state.runs
    assert by_default == (says in (Runs.ALWAYS, Runs.UNLESS_TOLD))
    assert told_not_to == (says is Runs.ALWAYS)
    assert all_asked == (says is not Runs.NEVER)


@pytest.mark.parametrize("state", State)
def test_retry_names_exactly_the_states_that_can_be_asked_for(state: State) -> None:
    if state.runs in (Runs.IF_ASKED, Runs.UNLESS_TOLD):
        assert state in parse_retry([str(state)])
        assert runs(state, [str(state)])
    else:
        with pytest.raises(UserError, match="is not valid"):
            parse_retry([str(state)])


def test_the_groups_are_those_of_today() -> None:
    assert FINAL == ("diverged", "done")
    assert UNRECORDED == ("timeout", "node_fail", "preempted", "cancelled", "lost")
    assert ("failed", "oom", "diverged", *UNRECORDED) == RETRY
    assert ("failed", "oom", *UNRECORDED) == FAILURES
    assert tuple(STATUSES) == ("done", "diverged", "failed", "superseded")


def test_a_cell_is_as_far_as_the_measurement_that_is_least_far() -> None:
    """The order is the precedence: what needs attention hides what does not."""
    assert next(iter(State)) is State.RUNNING
    assert list(State)[-3:] == [State.DIVERGED, State.DONE, State.SUPERSEDED]


def test_analysis_takes_the_same_states_for_results() -> None:
    assert set(MEASURED) == set(FINAL)


def test_stored_rows_and_ends_of_jobs_are_states() -> None:
    assert [recorded_state({"status": s.value, "error_type": None}) for s in RECORDED] == list(RECORDED)
    assert recorded_state({"status": "failed", "error_type": OOM_ERROR}) is State.OOM
    assert set(_ENDED_AS.values()) <= {*UNRECORDED, State.OOM}


def test_no_other_file_lists_states() -> None:
    """A tuple, list, set or dictionary with three states in it is a second list."""
    names, found = {str(s) for s in State}, []
    for path in (ROOT / "sweeps").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict):
                inside = node.keys if isinstance(node, ast.Dict) else node.elts
                words = {n.value for n in inside if isinstance(n, ast.Constant)}
                if len(words & names) >= 3:
                    found.append(f"{path}:{node.lineno}")
    assert not found
