"""How a study is divided into W&B runs: bounded in number, with axes to group by, the same whoever mirrors it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from sweeps.errors import UserError
from sweeps.study.cell import ModelRef, axis_names
from sweeps.study.grid import expand
from sweeps.study.manifest import Manifest
from sweeps.tracking.runs import MOST_RUNS, chosen, divided, division, settled, steps

SIZES = ("70m", "160m", "410m")
MODELS = [
    ModelRef(family="pythia", name=name, params=10**6 * (n + 1), hub_id=f"p/{name}", commit="c" * 40)
    for n, name in enumerate(SIZES)
]
QUANTS: list[dict[str, object]] = [{"bits": 16}, {"bits": [3, 4], "dtype": ["int", "float"], "blocksize": [64, 128]}]


def study(*quants: dict[str, object]) -> Manifest:
    return Manifest(sweep="s", cells=expand(quants or QUANTS, MODELS).cells, evals=(), excluded=(), config={})


def axes_of(manifest: Manifest) -> list[dict[str, object]]:
    return [cell.axes() for cell in manifest.cells]


def results(manifest: Manifest, *names: str, **more: Any) -> list[dict[str, Any]]:
    """A row of each cell and evaluation, as the store gives them."""
    return [
        {
            **cell.axes(),
            "key": cell.key,
            "measurement": f"{cell.key}-{name}",
            "label": cell.quant_label,
            "params": cell.model.params,
            "total_bits": 4.0,
            "eval": name,
            "status": "done",
            "metrics": {"loss": float(n), "perplexity": math.inf},
            "stderr": {"loss": 0.5},
            "seconds": 2.0,
            **more,
        }
        for n, cell in enumerate(manifest.cells)
        for name in names or ("x",)
    ]


def test_a_run_of_a_small_study_is_a_cell_and_of_a_large_one_a_quantization() -> None:
    small = study()
    runs = divided("s", results(small), chosen(axes_of(small)))
    assert len(runs) == len(small.cells) == 27
    assert {(r.config["bits"], r.config["model"]) for r in runs} >= {(16, "pythia-70m"), (3, "pythia-410m")}
    large = study(
        {"bits": [2, 3, 4, 5, 6, 7, 8], "dtype": ["int", "dynamic"], "blocksize": [64 * n for n in range(1, 13)]}
    )
    by = chosen(axes_of(large))
    runs = divided("s", results(large), by)
    assert len(large.cells) > MOST_RUNS
    assert len(runs) == 168
    assert "model" not in by
    for run in runs:
        assert {"bits", "dtype", "blocksize", "method", "family"} <= run.config.keys()
        assert run.config["model"] == "several"
        assert "params" not in run.config
        assert [step["model"] for step in steps(run.rows.values())] == [m.label for m in MODELS]
    assert division(large, by) == ("W&B: s is 168 runs by bits, dtype, blocksize; steps differ in model")


def test_what_would_be_too_many_runs_is_divided_by_less_and_said_where_somebody_asks_for_it() -> None:
    huge = study({"bits": [3, 4], "dtype": "int", "blocksize": list(range(16, 716, 2))})
    by = chosen(axes_of(huge))
    assert "blocksize" not in by
    assert "More than" not in division(huge, by)
    assert len(divided("s", results(huge), by)) == 2 * len(MODELS)
    assert division(huge, ["model", "blocksize"]).endswith(
        "1,050 runs by model, blocksize; steps differ in bits. More than 1,000 are slow: "
        "take fewer axes (tracking.by=) in another tracking.project"
    )


def test_runs_are_the_same_whoever_mirrors_and_whatever_is_stored() -> None:
    rows = results(study())
    by = ("bits", "dtype")
    all_of_it = {run.id: run for run in divided("s", rows, by)}
    assert len(all_of_it) == 5
    assert {run.id for run in divided("s", reversed(rows[:7]), ("dtype", "bits"))} <= all_of_it.keys()
    assert {run.id for run in divided("t", rows, by)}.isdisjoint(all_of_it)
    # Rows of earlier versions lack the axes that came later.
    earlier = [
        {name: value for name, value in row.items() if name not in ("clip", "rotation", "center")} for row in rows
    ]
    assert {run.id for run in divided("s", earlier, chosen(rows))} == {r.id for r in divided("s", rows, chosen(rows))}


def test_a_study_that_grows_keeps_its_division(tmp_path: Path) -> None:
    by = settled(tmp_path, "s", None, axes_of(study()))
    assert set(by) == set(axis_names())
    more = axes_of(study({"bits": [3, 4], "dtype": "int", "blocksize": list(range(16, 716, 2))}))
    assert settled(tmp_path, "s", None, more) == by
    assert settled(tmp_path, "s", list(reversed(by)), more) == by
    with pytest.raises(
        UserError, match=r"tracking\.by=\[bits\]: the runs of s in W&B are by method, bits, .*remove .*s\.json"
    ):
        settled(tmp_path, "s", ["bits"], more)
    assert settled(tmp_path, "t", ["bits"], more) == ("bits",)


def test_a_cell_is_a_step_and_what_is_measured_again_another() -> None:
    rows = results(study({"bits": 4, "dtype": "int", "blocksize": 64}), "x", "y")
    first = {**rows[0], "measurement": "earlier", "status": "superseded"}
    failed = {**rows[1], "status": "failed", "metrics": {}, "stderr": {}, "error_type": "OSError"}
    made = steps([first, *rows[2:], rows[0], failed])
    assert [(step["model"], step["x/status"]) for step in made] == [
        ("pythia-70m", "superseded"),
        ("pythia-70m", "done"),
        ("pythia-160m", "done"),
        ("pythia-410m", "done"),
    ]
    assert "x/loss" not in made[0]
    assert (made[0]["y/status"], made[0]["y/error_type"]) == ("failed", "OSError")
    assert {"bits": 4, "dtype": "int", "x/loss": 1.0, "x/loss_stderr": 0.5, "y/loss": 1.0}.items() <= made[2].items()


def test_a_runs_summary_is_of_what_counts() -> None:
    rows = results(study({"bits": 4, "dtype": "int", "blocksize": 64}), "x")
    late = {**rows[2], "measurement": "late", "status": "superseded", "metrics": {"loss": 99.0}}
    (run,) = divided("s", [*rows, late], ("bits",))
    assert run.summary() == {
        **{"x/loss": 1.0, "x/perplexity": math.inf, "params": 2e6, "total_bits": 4.0},
        **{"done": 3, "diverged": 0, "failed": 0, "superseded": 1, "cells": 3, "measurements": 4},
    }
