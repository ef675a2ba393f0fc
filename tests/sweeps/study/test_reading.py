"""Readings: models whose numbers a repair changed have other keys, the others keep theirs; old rows are superseded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from kbit.errors import SpecError
from kbit.evaluation.evaluators import EVALUATORS
from kbit.evaluation.spec import EvalSpec
from kbit.models.readings import reading_of
from kbit.spec import QuantSpec, Spec
from kbit.specs.block_float import FORMATS, BlockFloatSpec
from kbit.specs.hqq import HqqSpec
from sweeps.errors import UserError
from sweeps.plan.notices import notices
from sweeps.results.table import left_out, load_results
from sweeps.store.parts import Store
from sweeps.store.rows import Origin, run_row
from sweeps.study.cell import KEY_VERSION, Cell, ModelRef, canonical_json, model_to_dict
from sweeps.study.grid import expand
from sweeps.study.manifest import Manifest
from sweeps.study.reading import (
    check_baselines,
    check_context,
    check_packed,
    config_of,
    superseded,
    unfit,
    with_reading,
)
from tests.kbit.methods.one_shot import ScaledSpec

TOWER = {"hidden_size": 64, "num_hidden_layers": 12}
MIXTURE = {"model_type": "mixtral", "num_local_experts": 8}


def local(path: Path, config: dict[str, object], **more: object) -> ModelRef:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return ModelRef(family="f", name=path.name, path=str(path), weights_hash=f"hash of {path.name}", **more)


@pytest.mark.parametrize(
    ("config", "reading"),
    [
        (MIXTURE, 2),
        ({"model_type": "mixtral"}, 2),
        ({"model_type": "granitemoehybrid", "num_local_experts": 0}, 1),
        ({"model_type": "gemma4_text", "num_experts": None}, 1),
        ({"model_type": "llama4", "text_config": {"model_type": "llama4_text", "num_local_experts": 16}}, 2),
        ({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}}, 2),
        ({"model_type": "hunyuan_v1_moe", "num_experts": [1, 8]}, 2),
        ({"model_type": "of_another_package", "n_routed_experts": 64}, 2),
        ({"model_type": "zamba"}, 2),
        ({"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text"}}, 2),
        ({"model_type": "qwen3_5_text"}, 1),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, 1),
        ({"model_type": "doge", "num_experts": 16384}, 1),
        ({"model_type": "git", "hidden_size": 64, "num_hidden_layers": 6, "vision_config": TOWER}, 2),
        ({"model_type": "git", "hidden_size": 64, "num_hidden_layers": 24, "vision_config": TOWER}, 1),
        ({"model_type": "git", "hidden_size": 64, "num_hidden_layers": 24, "vision_config": {}}, 2),
        ({"model_type": "gemma3", "text_config": {**TOWER, "hidden_size": 80}, "vision_config": TOWER}, 1),
        ({"model_type": "llama"}, 1),
    ],
)
def test_the_configuration_says_which_reading_a_model_has(config: dict[str, object], reading: int) -> None:
    found, reason = reading_of(config)
    assert found == reading
    assert (reason is None) == (reading == 1)


def content_key(value: dict[str, object]) -> str:
    """The definition, which ``Cell.key`` computes from parts."""
    return hashlib.sha256(canonical_json({"key_version": KEY_VERSION, **value}).encode()).hexdigest()


def test_only_a_later_reading_is_part_of_a_key(tmp_path: Path) -> None:
    quant = QuantSpec(bits=4, dtype="int")
    dense = local(tmp_path / "dense", {"model_type": "llama"})
    mixture = local(tmp_path / "mixture", MIXTURE)
    assert with_reading(dense) == dense
    assert "reading" not in model_to_dict(dense)
    later = with_reading(mixture)
    identity = {"weights": "hash of mixture", "reading": 2}
    assert Cell(model=later, quant=quant).key == content_key({"model": identity, "quant": quant.canonical()})
    assert Cell(model=later, quant=quant).key != Cell(model=mixture, quant=quant).key
    assert ModelRef(**model_to_dict(later)) == later  # type: ignore[arg-type]


def test_models_of_an_earlier_reading_are_superseded_with_the_reason(tmp_path: Path) -> None:
    dense = local(tmp_path / "dense", {"model_type": "llama"})
    mixture = local(tmp_path / "mixture", MIXTURE)
    found = superseded([dense, mixture, with_reading(mixture)])
    assert set(found) == {mixture}
    assert "its experts (3-D parameters) were left in 16 bits" in found[mixture]
    # Where the directory is gone, what another launch planned of the same files says it.
    gone, later = tmp_path / "gone", with_reading(mixture)
    elsewhere = ModelRef(family="f", name="copy", path=str(gone), weights_hash=mixture.weights_hash)
    assert set(superseded([elsewhere, later])) == {elsewhere}
    assert superseded([elsewhere]) == {}


def test_tables_leave_out_what_is_superseded_and_say_so(tmp_path: Path) -> None:
    dense = local(tmp_path / "dense", {"model_type": "llama"})
    mixture = local(tmp_path / "mixture", MIXTURE)
    evaluation = EvalSpec(kind="perplexity", name="jargon", window=512, dataset="x", compute_dtype="float32")
    quants = [QuantSpec(bits=16), QuantSpec(bits=4, dtype="int")]
    for models in ([mixture, dense], [with_reading(mixture)]):
        cells = tuple(Cell(model=model, quant=quant) for model in models for quant in quants)
        Manifest(sweep="s", cells=cells, evals=(evaluation,), excluded=(), config={}).save(tmp_path / "out")
    kept = {Cell(model=m, quant=quant).key for m in (dense, with_reading(mixture)) for quant in quants}
    assert set(load_results(tmp_path / "out")["key"]) == kept
    [note] = left_out(tmp_path / "out")
    assert note.startswith("2 cells of mixture left out: its experts")


def test_a_study_that_measures_a_model_again_says_why(tmp_path: Path) -> None:
    mixture = local(tmp_path / "mixture", MIXTURE)
    evaluation = EvalSpec(kind="perplexity", name="jargon", window=512, dataset="x", compute_dtype="float32")
    quants = [QuantSpec(bits=16), QuantSpec(bits=4, dtype="int")]
    store = Store(out=tmp_path / "out")

    def study(model: ModelRef) -> Manifest:
        cells = tuple(Cell(model=model, quant=quant) for quant in quants)
        manifest = Manifest(sweep="s", cells=cells, evals=(evaluation,), excluded=(), config={})
        manifest.save(store.out)
        return manifest

    def measure(manifest: Manifest) -> None:
        for m in manifest.measurements():
            row = {**run_row(m, Origin(sweep="s", pack="p"), datetime.now(UTC)), "status": "done", "metrics": {}}
            store.write(row)

    measure(study(mixture))
    again = study(with_reading(mixture))
    [notice] = notices(store, again)
    assert notice.startswith("2 earlier cells of mixture stay and don't count, and it is measured again: its experts")
    measure(again)
    assert notices(store, again) == []


def test_a_model_without_a_known_order_has_no_cells_with_outliers_beside_one_that_has(tmp_path: Path) -> None:
    llama = local(tmp_path / "llama", {"model_type": "llama"})
    phi = local(tmp_path / "phi", {"model_type": "phi3"})
    block = {"bits": 4, "dtype": "int", "outlier_fraction": [0.0, 0.02]}
    grid = expand([block], [llama, phi], unfit=fits)
    assert [(c.model.name, c.axes()["outlier_fraction"]) for c in grid.cells] == [
        ("llama", 0.0),
        ("llama", 0.02),
        ("phi", 0.0),
    ]
    [left_out] = grid.excluded
    assert left_out.axes["model"] == "phi"
    assert left_out.reason.startswith("outlier_fraction=0.02 is not valid: 0, since phi3 has fused projections")
    with pytest.raises(SpecError, match=r"outlier_fraction=0\.02 is not valid: 0, since phi3 has"):
        expand([block], [phi], unfit=fits)
    rule = {"when": {"outlier_fraction": 0.02}, "reason": "not here"}
    assert len(expand([block], [phi], [rule], unfit=fits).cells) == 1


@pytest.mark.parametrize(
    ("config", "is_known"),
    [
        ({"model_type": "falcon"}, False),
        ({"model_type": "falcon", "multi_query": False}, True),
        ({"model_type": "falcon", "multi_query": False, "new_decoder_architecture": True}, False),
        ({"model_type": "gemma4", "text_config": {"hidden_size_per_layer_input": 0}}, True),
        ({"model_type": "gemma4", "text_config": {"hidden_size_per_layer_input": 64}}, False),
        ({"model_type": "jamba"}, False),
        ({"model_type": "mixtral"}, True),
        ({"model_type": "of_another_package"}, True),
    ],
)
def test_the_configuration_says_whether_outliers_can_be_found(config: dict[str, object], is_known: bool) -> None:
    assert (unfit(config, QuantSpec(bits=4, dtype="int", outlier_fraction=0.02)) is None) == is_known
    assert unfit(config, QuantSpec(bits=4, dtype="int")) is None
    assert unfit(config, QuantSpec(bits=16)) is None


def test_experts_are_calibrated_on_but_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = ScaledSpec(bits=4, dtype="int")
    assert unfit(MIXTURE, scaled) is None
    mixture = local(tmp_path / "mixture", MIXTURE)
    monkeypatch.setitem(EVALUATORS._entries, "packed", replace(EVALUATORS["perplexity"], packed=True))
    evaluation = EvalSpec(kind="packed", name="speed", dataset="x", compute_dtype="float32")
    with pytest.raises(UserError, match="eval 'speed' holds layers in k bits, and the experts of mixture"):
        check_packed([evaluation], [QuantSpec(bits=16)], {mixture: MIXTURE})
    held = [QuantSpec(bits=4, dtype="int"), HqqSpec(bits=4), *(BlockFloatSpec(format=name) for name in FORMATS)]
    check_packed([evaluation], held, {mixture: {"model_type": "llama"}})
    monkeypatch.setattr(ScaledSpec, "packs", False)
    with pytest.raises(
        UserError, match=r"eval 'speed' holds layers in k bits, and those of method=scaled can't be held so"
    ):
        check_packed([evaluation], [QuantSpec(bits=16), scaled], {mixture: {"model_type": "llama"}})


def test_a_context_that_is_too_short_for_an_evaluation_is_refused(tmp_path: Path) -> None:
    model = local(tmp_path / "short", {"model_type": "gpt2", "n_positions": 128})
    timed = EvalSpec(kind="latency", name="speed", dataset="x", compute_dtype="float32", device="cpu (x)")
    text = EvalSpec(kind="perplexity", name="text", dataset="x", compute_dtype="float32")
    said = r"eval 'speed' needs a context of 256 tokens, which short \(128\) does not have"
    with pytest.raises(UserError, match=said):
        check_context([text, timed], {model: config_of(model)})
    check_context([text], {model: config_of(model)})
    check_context([timed], {model: None})
    check_context([timed], {model: {"model_type": "gpt2", "n_positions": 256}})


def test_an_evaluation_of_baselines_is_of_no_other_cell_and_refused_where_there_is_none(tmp_path: Path) -> None:
    model = local(tmp_path / "llama", {"model_type": "llama"})
    phi = local(tmp_path / "phi", {"model_type": "phi3"})
    text, inside = (
        EvalSpec(kind=kind, name=name, dataset="x", compute_dtype="float32")
        for kind, name in (("perplexity", "text"), ("outliers", "text_outliers"))
    )
    baseline, int4 = QuantSpec(bits=16), QuantSpec(bits=4, dtype="int")
    cells = tuple(Cell(model=model, quant=spec) for spec in (baseline, int4))
    manifest = Manifest(sweep="s", cells=cells, evals=(inside, text), excluded=(), config={})
    found = [(m.cell.quant.bits, m.eval.name) for m in manifest.measurements()]
    assert found == [(16, "text_outliers"), (16, "text"), (4, "text")]
    configs = {model: config_of(model)}
    check_baselines([text, inside], [baseline, int4], configs)
    check_baselines([inside], [baseline], configs)
    check_baselines([text], [int4], {phi: config_of(phi)})
    with pytest.raises(UserError, match="eval 'text_outliers' is of 16-bit baselines, and the study has none"):
        check_baselines([text, inside], [int4], configs)
    with pytest.raises(UserError, match=r"and nothing is measured of 'int4 b64': leave quantized cells out"):
        check_baselines([inside], [baseline, int4], configs)
    with pytest.raises(UserError, match=r"which layer follows which, and in phi that isn't known: .*fused projections"):
        check_baselines([text, inside], [baseline], {**configs, phi: config_of(phi)})


def fits(model: ModelRef, spec: Spec) -> SpecError | None:
    return unfit(config_of(model), spec)
