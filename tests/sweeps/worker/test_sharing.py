"""What comes with another result is for an evaluation of the same data and settings that is due, and for no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from kbit.evaluation.spec import EvalResult, EvalSpec
from kbit.sources import LocalFile
from sweeps.worker.sharing import Brought, bringers_first
from tests.sweeps.worker.test_worker import evaluation

AGREEMENT = evaluation("jargon_agreement", kind="agreement")
PERPLEXITY = EvalResult(
    metrics={"loss": 4.0}, stderr={}, samples={}, diverged=False, n_samples=2, n_tokens=1024, dataset_hash="x"
)
RESULT = EvalResult(
    metrics={"kl": 0.1},
    stderr={},
    samples={},
    diverged=False,
    n_samples=2,
    n_tokens=1024,
    dataset_hash="x",
    also={"perplexity": PERPLEXITY},
)


def test_what_came_is_taken_once_and_the_seconds_add_up() -> None:
    brought = Brought(due=(evaluation(), AGREEMENT))
    assert brought.take(evaluation()) is None
    assert brought.keep(AGREEMENT, RESULT, 8.0) == 4.0
    assert brought.take(AGREEMENT) is None
    assert brought.take(evaluation()) == (PERPLEXITY, 4.0)
    assert brought.take(evaluation()) is None


@pytest.mark.parametrize(
    "other",
    [
        evaluation(window=256),
        evaluation(limit=2048),
        evaluation(bos="none"),
        evaluation(dataset="sha256:" + "1" * 64),
        evaluation(compute_dtype="storage"),
        evaluation(source=LocalFile(path=str(Path("elsewhere.jsonl")))),
        evaluation(kind="task", window=None),
    ],
    ids=["window", "limit", "bos", "dataset", "dtype", "place", "kind"],
)
def test_another_evaluation_gets_nothing_and_the_seconds_are_the_runs_own(other: EvalSpec) -> None:
    brought = Brought(due=(other, AGREEMENT))
    assert brought.keep(AGREEMENT, RESULT, 8.0) == 8.0
    assert brought.take(other) is None
    assert brought.take(evaluation()) is None


def test_what_brings_others_runs_before_them() -> None:
    task = evaluation("own", kind="task", window=None)
    assert bringers_first([evaluation(), task, AGREEMENT]) == [AGREEMENT, evaluation(), task]
