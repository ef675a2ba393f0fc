"""An audit finds what is not there once and whole, by name, and nothing else: in real results and in broken ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kbit.evaluation.evaluators import EVALUATORS
from sweeps.results.audit import Fault, differs, disagrees
from sweeps.results.table import load_results
from sweeps.store.parts import Store
from sweeps.store.samples import encode_samples
from sweeps.store.schema import Row
from sweeps.study import cell
from sweeps.study.cell import Measurement
from sweeps.study.manifest import load_manifests
from tests.sweeps.commands.test_merge import EARLIER
from tests.sweeps.studies import command, result, store_study, stored_row, study

Capture = pytest.CaptureFixture[str]


def test_a_whole_study_passes(tmp_path: Path, capsys: Capture) -> None:
    store_study(tmp_path, study()).fold()
    assert command("mode=audit", f"out={tmp_path}") == 0
    assert capsys.readouterr().out.startswith("6 of 6 planned measurements there once")


def test_real_results_of_every_kind_are_what_their_keys_and_samples_say() -> None:
    """42 rows that a worker wrote at commit c368867, before many of today's columns."""
    planned = {m.key: m for manifest in load_manifests(EARLIER) for m in manifest.measurements()}
    rows = [row for table in Store(out=EARLIER).scan() for row in table.to_pylist() if row["status"] != "failed"]
    assert len({row["measurement"] for row in rows}) > 30
    for row in rows:
        assert (differs(row, planned[row["measurement"]]), disagrees(row)) == ("", "")


def test_real_studies_are_named_for_what_they_lack_and_for_that_alone(tmp_path: Path, capsys: Capture) -> None:
    for name, code in (("local_done", 0), ("local_part", 1), ("local_wrong", 1), ("slurm_done", 0)):
        assert command("mode=audit", f"out={EARLIER}", f"sweep.name={name}") == code
        said = capsys.readouterr().out
        assert {fault for fault in Fault if f" {fault}:" in said} == {
            "local_part": {Fault.MISSING},
            "local_wrong": {Fault.FAILED},
        }.get(name, set()), said


def with_sample(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Measurement], Row]:
    def changed(m: Measurement) -> Row:
        samples = dict(result(m).samples)
        return {**stored_row(m), "samples": {**samples, name: change(samples[name].copy())}}

    return changed


def one_flipped(right: np.ndarray) -> np.ndarray:
    right[7] = ~right[7]
    return right


TEXT, TASK = "jargon", "choice"
BROKEN: dict[str, tuple[str, Callable[[Measurement], Row], str, str]] = {
    "another axis": (TEXT, lambda m: {**stored_row(m), "blocksize": 128}, Fault.IDENTITY, "blocksize is 128, and 64"),
    "an axis that came later": (TEXT, lambda m: {**stored_row(m), "clip": True}, Fault.IDENTITY, "clip is True"),
    "another cell's key": (TEXT, lambda m: {**stored_row(m), "key": "0" * 64}, Fault.IDENTITY, "key is '000"),
    "other weights": (TASK, lambda m: {**stored_row(m), "weights_hash": "sha256:x"}, Fault.IDENTITY, "weights_hash"),
    "other data": (TASK, lambda m: {**stored_row(m), "dataset": "sha256:x"}, Fault.IDENTITY, "dataset is 'sha256:x'"),
    "another window": (TEXT, lambda m: {**stored_row(m), "window": 64}, Fault.IDENTITY, "window is 64"),
    "no commit": (TEXT, lambda m: {**stored_row(m), "commit": None}, Fault.PROVENANCE, "no commit"),
    "no versions": (
        TEXT,
        lambda m: {**stored_row(m), "versions": "{}"},
        Fault.PROVENANCE,
        "versions doesn't name torch",
    ),
    "a window of nats": (TEXT, with_sample("nats", lambda n: n + np.eye(20)[3]), Fault.NUMBERS, "loss is"),
    "a document": (TASK, with_sample("acc", one_flipped), Fault.NUMBERS, "acc is"),
    "no samples": (TEXT, lambda m: {**stored_row(m), "samples": {}}, Fault.NUMBERS, "it has no samples 'nats'"),
    "no metrics": (TEXT, lambda m: {**stored_row(m), "metrics": {}}, Fault.NUMBERS, "it has no metrics"),
    "a made-up number": (
        TEXT,
        lambda m: {**stored_row(m), "metrics": dict(result(m).metrics) | {"perplexity": 1e6}},
        Fault.NUMBERS,
        "perplexity is 1000000.0",
    ),
    "an infinity that is done": (
        TEXT,
        lambda m: {**stored_row(m), "metrics": dict(result(m).metrics) | {"loss": math.inf}},
        Fault.NUMBERS,
        "it is done, and loss is inf: it diverged",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_whole_is_named_with_what_is_wrong(case: str, tmp_path: Path, capsys: Capture) -> None:
    of, make, fault, what = BROKEN[case]
    manifest = study(bits=(4,))
    (broken,) = (m for m in manifest.measurements() if m.eval.name == of)
    store = store_study(tmp_path, manifest, wanted=lambda m: m != broken)
    store.write(make(broken))
    assert command("mode=audit", f"out={tmp_path}") == 1
    said = capsys.readouterr().out
    assert f"1 measurement {fault}: {Fault(fault).advice}" in said
    assert f"{broken.cell.key[:10]}  m-s {broken.cell.quant_label}, {of}: {what}" in said
    assert "1 of 2 planned measurements there once" in said
    assert said.count(" measurement ") == 1


def test_what_is_missing_failed_or_measured_twice_is_named(tmp_path: Path, capsys: Capture) -> None:
    manifest = study()
    missing, failed, equal, other, dropped, retried = manifest.measurements()
    store = store_study(tmp_path, manifest, wanted=lambda m: m not in (missing, failed))
    store.write({**stored_row(failed), "status": "failed", "error_type": "ValueError", "metrics": None})
    store.drop(store.row_ids([dropped.key]), why="wrong")
    for measurement, seed in ((equal, 0), (other, 1), (dropped, 1)):
        store.write(stored_row(measurement, seed=seed))
    # What was measured again because it had diverged, or had failed, was not measured twice.
    store.write({**stored_row(retried, seed=3), "status": "diverged"})
    assert command("mode=audit", f"out={tmp_path}") == 1
    lines = capsys.readouterr().out.splitlines()
    named = {fault: [i for i, line in enumerate(lines) if f" {fault}:" in line] for fault in Fault}
    assert {fault for fault, at in named.items() if at} == {Fault.MISSING, Fault.FAILED, Fault.TWICE}
    assert "it is planned, and nobody has begun it" in lines[named[Fault.MISSING][0] + 1]
    assert "ValueError" in lines[named[Fault.FAILED][0] + 1]
    twice = "\n".join(lines[named[Fault.TWICE][0] + 1 :][:2])
    assert f"{equal.cell.quant_label}, jargon: 2 results, with equal numbers" in twice
    assert f"{other.cell.quant_label}, choice: 2 results, with different numbers" in twice
    assert lines[-1].startswith("2 of 6 planned measurements there once")


def test_a_row_that_lies_in_two_files_is_there_once(tmp_path: Path) -> None:
    store = store_study(tmp_path, study())
    (rows,) = tmp_path.glob("parts/*.rows")
    rows.with_stem("again").write_bytes(rows.read_bytes())
    assert len({table.num_rows for table in store.scan()}) == 1
    assert sum(table.num_rows for table in store.scan()) == 12
    assert command("mode=audit", f"out={tmp_path}") == 0


def test_damaged_files_are_named(tmp_path: Path, capsys: Capture) -> None:
    store = store_study(tmp_path, study())
    for measurement in study().measurements():
        store.write(stored_row(measurement))
    store.close()
    (damaged, *_) = sorted(tmp_path.glob("parts/*"))
    damaged.write_bytes(b"no record " * 9)
    assert command("mode=audit", f"out={tmp_path}") == 1
    assert f"{damaged} is damaged" in capsys.readouterr().out


def test_earlier_launches_need_not_be_complete_but_what_is_stored_of_them_must_be_right(
    tmp_path: Path, capsys: Capture
) -> None:
    """A study that was run by parts: of each model a launch of its own."""
    first, second = study(models=("m-s",)), study(models=("m-m",))
    dropped, wrong, *_ = first.measurements()
    store = store_study(tmp_path, first, wanted=lambda m: m not in (dropped, wrong))
    store_study(tmp_path, second)
    assert command("mode=audit", f"out={tmp_path}") == 0
    store.write({**stored_row(wrong), "commit": None})
    assert command("mode=audit", f"out={tmp_path}") == 1
    assert Fault.PROVENANCE in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plan, other: plan["keys"]["cells"].__setitem__(1, other), "the key of m-s int4 b64 is "),
        (lambda plan, _: plan["cells"][1][1].update(bits=5), "its content is not what its name says"),
        (lambda plan, _: plan["evals"].pop(), "its content is not what its name says"),
    ],
)
def test_a_plan_that_something_changed_is_named_and_its_launch_writes_it_again(
    change: Callable[[dict[str, Any], str], object], said: str, tmp_path: Path, capsys: Capture
) -> None:
    store_study(tmp_path, study())
    path = study().path(tmp_path)
    whole = path.read_bytes()
    plan = json.loads(whole)
    change(plan, study().cells[2].key[::-1])
    path.write_text(json.dumps(plan))
    assert command("mode=audit", f"out={tmp_path}") == 1
    assert f"{path} was changed: {said}" in capsys.readouterr().out
    study().save(tmp_path)
    assert path.read_bytes() == whole
    assert command("mode=audit", f"out={tmp_path}") == 0


def test_cells_keys_are_read_from_a_plan_and_made_from_its_content_where_it_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_study(tmp_path, study()).fold()
    path = study().path(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(cell, "spec_from_canonical", None)
        results = load_results(tmp_path)
        assert set(results["status"]) == {"done"}
    plan = json.loads(path.read_bytes())
    for keys in ({}, {"keys": {**plan["keys"], "version": 0}}):
        path.write_text(json.dumps({**{name: value for name, value in plan.items() if name != "keys"}, **keys}))
        (earlier,) = load_manifests(tmp_path)
        assert [m.key for m in earlier.measurements()] == [m.key for m in study().measurements()]
        pd.testing.assert_frame_equal(load_results(tmp_path), results)


def test_cells_can_be_chosen(tmp_path: Path, capsys: Capture) -> None:
    store_study(tmp_path, study(), wanted=lambda m: m.cell.quant.bits != 3)
    assert command("mode=audit", f"out={tmp_path}") == 1
    assert command("mode=audit", f"out={tmp_path}", "where={bits: [4, 16]}") == 0
    assert "4 of 4 planned measurements" in capsys.readouterr().out
    assert command("mode=audit", f"out={tmp_path}", "where={bits: 5}") == 2
    assert command("mode=audit", f"out={tmp_path}/none") == 2


def test_numbers_of_each_kind_follow_from_samples() -> None:
    """Against the numbers worked out here in float64."""
    rng = np.random.default_rng(0)
    kl, same, change = rng.random(30), rng.random(30), rng.normal(0, 0.01, 30)
    speeds = {f"{what}_{b}": rng.random(10) for what in ("ttft", "tokens_per_second") for b in (1, 16)}
    kinds: dict[str, tuple[dict[str, np.ndarray], dict[str, float]]] = {
        "agreement": (
            {"kl": kl, "top_token": same, "p_change": change, "p_change_squares": change**2},
            {"kl": sum(kl) / 30, "p_change": sum(change) / 30, "p_change_rms": math.sqrt(sum(change**2) / 30)},
        ),
        "latency": (speeds, {"ttft_1": float(np.median(speeds["ttft_1"])), **dict.fromkeys(("x",), 0.0)}),
        "outliers": ({"ffn1_ffn2": np.array([0.5, math.nan, 0.7])}, {"spearman_ffn1_ffn2": 0.6}),
        "sensitivity": ({"slopes": np.array([1.0, 2.0])}, {"noise_rise": 0.03}),
        "task": ({"perplexity": np.array([-1.0, -3.0])}, {"perplexity": math.exp(2)}),
    }
    assert {*kinds, "perplexity"} == set(EVALUATORS)
    for kind, (samples, metrics) in kinds.items():
        full = dict(metrics)
        if kind == "agreement":
            full["top_token"] = sum(same) / 30
        if kind == "latency":
            for name, values in speeds.items():
                full |= dict(
                    zip((f"{name}_q25", name, f"{name}_q75"), np.percentile(values, (25, 50, 75)), strict=True)
                )
        stored = {n: v.astype(np.float32) for n, v in samples.items()}
        row = {"status": "done", "eval_kind": kind, "stderr": {}, "samples": encode_samples(stored)}
        assert disagrees({**row, "metrics": full}) == ""
        for name in metrics.keys() - {"x"}:
            assert disagrees({**row, "metrics": {**full, name: full[name] * 1.001}}).startswith(f"{name} is")
