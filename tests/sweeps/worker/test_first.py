"""What a method needs first of the 16-bit model: measured once, stored, and read by every pack that comes later."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from kbit.calibration import Calibration
from kbit.errors import SpecError
from kbit.evaluation import sensitivity
from kbit.evaluation.sensitivity import prepare_sensitivity
from kbit.evaluation.spec import SLOPES, EvalSpec
from kbit.methods import noise
from kbit.models.loading import load_model
from kbit.models.quantize import Calibrated, quantize_model
from kbit.models.whole import WholeModel
from kbit.specs.mixed import MixedSpec
from sweeps.commands.selection import chosen_part
from sweeps.errors import UserError
from sweeps.events import Withheld
from sweeps.plan.pack import Pack
from sweeps.results.table import load_samples
from sweeps.store.first import stored_slopes
from sweeps.store.rows import OOM_ERROR
from sweeps.study.cell import Cell, Measurement
from sweeps.study.choice import Choice
from sweeps.study.evals import resolve_evals
from sweeps.study.manifest import Manifest
from sweeps.study.resolve import Resolver
from tests.sweeps.worker.test_worker import NEOX_XS, Bench, evaluation, pack_of

DATA = Calibration(
    dataset="sha256:x", samples=2, length=64, compute_dtype="float32", name="jargon", source=evaluation().source
)
SPECS = [MixedSpec(budget=budget, dtype="int", candidates="2-5") for budget in (3.25, 4.0)]
TEXT = evaluation(limit=512)


def cell_of(spec: MixedSpec, data: Calibration = DATA) -> Cell:
    return Cell(model=pack_of().model, quant=spec, calibration=data)


def pack(*specs: MixedSpec, table: bool, data: Calibration = DATA) -> Pack:
    cells = [cell_of(spec, data) for spec in specs]
    items: list[tuple[Cell, tuple[EvalSpec, ...]]] = [(cell, (TEXT,)) for cell in cells]
    if table:
        items.insert(0, (first_of(cells[0]).cell, (first_of(cells[0]).eval,)))
    return replace(pack_of(), items=tuple(items))


def first_of(cell: Cell) -> Measurement:
    assert cell.first is not None
    return cell.first


def rows_of(bench: Bench) -> dict[str, dict[str, Any]]:
    return {row["measurement"]: row for row in bench.rows()}


def test_a_table_is_measured_once_and_read_by_every_later_worker(tmp_path: Path) -> None:
    first = first_of(cell_of(SPECS[0]))
    with patch.object(sensitivity.SensitivityEval, "run", side_effect=ValueError("a launch before")):
        Bench(tmp_path).worker.run_pack(pack(SPECS[0], table=True))
    bench = Bench(tmp_path)
    with patch.object(noise, "loss_slopes", wraps=noise.loss_slopes) as measured:
        bench.worker.run_pack(pack(SPECS[0], table=True))
        Bench(tmp_path).worker.run_pack(pack(SPECS[1], table=False))
        assert measured.call_count == 1
    rows = rows_of(bench)
    assert {row["status"] for row in rows.values()} == {"done"}
    row = rows[first.key]
    assert (row["eval"], row["eval_seed"]) == ("jargon_2x64_seed0_float32_sensitivity", 0)
    assert (row["bits"], row["method"], row["n_samples"]) == (16, "baseline", 2)
    slopes = load_samples(tmp_path, [first.key])[first.key][SLOPES]
    assert dict(row["metrics"])["noise_rise"] == pytest.approx(0.01 * slopes.sum(dtype=np.float64))
    # As measured in the method itself, without a store.
    loaded = load_model(str(NEOX_XS), device="cpu", compute_dtype="float32")
    prepared = prepare_sensitivity(first.eval, loaded.tokenizer, context=loaded.context, vocab_size=loaded.vocab_size)
    own = noise.loss_slopes(WholeModel(module=loaded.model), prepared.windows)
    assert stored_slopes(bench.store, cell_of(SPECS[0])) == pytest.approx(list(own.values()), rel=1e-6)
    for spec in SPECS:
        with quantize_model(
            loaded.model,
            spec,
            storage_dtype=loaded.storage_dtype,
            calibration=Calibrated(tokens=prepared.windows),
        ) as handle:
            stored = rows[Measurement(cell=cell_of(spec), eval=TEXT).key]
            assert (stored["allocation_hash"], stored["codes_hash"]) == (handle.allocation_hash, handle.codes_hash)
            assert stored["predicted_loss_change"] == handle.predicted_change


def test_cells_whose_table_nobody_has_stored_are_left_for_a_launch_that_plans_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.worker.run_pack(pack(*SPECS, table=False))
    assert bench.rows() == []
    assert "loaded" not in bench.names()
    withheld = [event for event in bench.events if isinstance(event, Withheld)]
    assert [event.measurement for event in withheld] == [m.key for m in pack(*SPECS, table=False).measurements()]
    assert "sensitivity of neox-xs is not stored: another launch may be measuring it" in withheld[0].why
    assert bench.names()[-1] == "pack_done"


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (ValueError("no loss"), "ActivationError", "ValueError: no loss"),
        (MemoryError("full"), OOM_ERROR, "MemoryError: full"),
    ],
)
def test_what_kept_a_table_from_being_measured_keeps_its_cells_and_is_not_tried_for_each(
    tmp_path: Path, error: Exception, kind: str, said: str
) -> None:
    bench, later = Bench(tmp_path), Bench(tmp_path)
    with patch.object(sensitivity.SensitivityEval, "run", side_effect=error) as tried:
        bench.worker.run_pack(pack(SPECS[0], table=True))
        # A worker that comes after one that died of it.
        later.worker.run_pack(pack(SPECS[1], table=False))
    assert tried.call_count == 1
    assert "smaller_batch" not in bench.names()
    rows = rows_of(bench)
    assert [row["status"] for row in rows.values()] == ["failed"] * 3
    mine = [rows[Measurement(cell=cell_of(spec), eval=TEXT).key] for spec in SPECS]
    assert [row["error_type"] for row in mine] == [kind] * 2
    text = f"needs the table of sensitivity of neox-xs, which could not be measured: {said}"
    assert all(text in row["error"] for row in mine)


def test_who_chooses_cells_gets_what_they_need_first(tmp_path: Path) -> None:
    cells = [cell_of(spec) for spec in SPECS]  # without a baseline
    study = Manifest(sweep="s", cells=tuple(cells), evals=(TEXT,), excluded=(), config={})
    assert [m.key for m in study.measurements()][2:] == [first_of(cells[0]).key]
    chosen = chosen_part(Choice.parse([], {"budget": 4.0}, None), tmp_path, study)
    assert {m.key for m in chosen.wanted()} == {Measurement(cell=cells[1], eval=TEXT).key, first_of(cells[0]).key}
    for where in ({"label": cells[1].quant_label}, {"calibration": "jargon", "budget": 4.0}):
        again = chosen_part(Choice.parse([], where, None), tmp_path, study)
        assert again.chosen == chosen.chosen
    with pytest.raises(
        UserError, match=r"where=\{calibration: jarg\} matches no cell: calibration is one of jargon 2x64"
    ):
        chosen_part(Choice.parse([], {"calibration": "jarg"}, None), tmp_path, study)
    chosen = chosen_part(Choice.parse([], {"method": "baseline"}, None), tmp_path, study)
    assert [m.key for m in chosen.wanted()] == [first_of(cells[0]).key]


def test_users_do_not_name_it() -> None:
    settings = {
        "task_dirs": [],
        "kinds": {"sensitivity": ["jargon"]},
        "compute_dtype": "float32",
        "data_dir": None,
        "perplexity": [],
    }
    with pytest.raises(UserError, match=r"eval\.kinds\.sensitivity=\['jargon'\] is not valid: methods ask for it"):
        resolve_evals({**settings, "tasks": []}, Resolver(strict=True), "cpu", lambda: "cpu")
    with pytest.raises(SpecError, match="seed=1 is not valid: null, for an evaluation of kind perplexity"):
        evaluation(seed=1)


def test_the_recipe_is_the_identity_of_a_table() -> None:
    key = first_of(cell_of(SPECS[0])).key
    assert first_of(cell_of(SPECS[1])).key == key
    assert first_of(cell_of(MixedSpec(budget=5, dtype="normal", blocksize=128))).key == key
    assert first_of(cell_of(SPECS[0], replace(DATA, source=None))).key == key
    changes: list[dict[str, Any]] = [{"seed": 1}, {"samples": 3}, {"length": 32}, {"compute_dtype": "bfloat16"}]
    others = [replace(DATA, **change) for change in [*changes, {"dataset": "sha256:y"}]]
    found = [first_of(cell_of(SPECS[0], data)) for data in others]
    assert len({key, *(m.key for m in found)}) == 6
    assert len({m.eval.name for m in found[:4]}) == 4
    assert [m.eval.calibration for m in found] == others
    assert [m.eval.calibration.name for m in found] == ["jargon"] * 5
    assert pack_of().model == first_of(cell_of(SPECS[0])).cell.model
