"""A study of a mixture of experts beside an architecture without a known order, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sweeps import load_results
from sweeps.study.manifest import load_manifests
from tests.conftest import Launch
from tests.kbit.architectures import write

BLOCKWISE, GPTQ = "{bits: 4, dtype: int, outlier_fraction: [0.0, 0.05]}", "{method: gptq, bits: 3, dtype: int}"
QUANT = f"sweep.quant=[{{bits: 16}}, {BLOCKWISE}, {GPTQ}]"
CALIBRATION = ("calibration={set: jargon, samples: 4, length: 64, compute_dtype: float32}",)
SETTINGS = (
    "eval.tasks=[]",
    "eval.tokens=512",
    "eval.window=64",
    "executor.device=cpu",
    "executor.workers=1",
    QUANT,
    *CALIBRATION,
)


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    return {name: write(name, tmp_path / name) for name in ("mixtral", "phi3")}


def test_experts_are_quantized_and_what_has_no_order_is_left_out(
    paths: dict[str, Path], here: Launch, tmp_path: Path
) -> None:
    ran = here(f"path=[{paths['mixtral']},{paths['phi3']}]", *SETTINGS, "report=false")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    results = load_results(tmp_path / "results")
    assert set(results["status"]) <= {"done", "diverged"}
    fractions = results.groupby("model")["outlier_fraction"].agg(lambda values: sorted(set(values)))
    assert fractions.to_dict() == {"mixtral": [0.0, 0.05], "phi3": [0.0]}
    assert len(results) == 7
    calibrated = results[results["method"] == "gptq"].set_index("model")
    # Of 4 windows of 64 tokens each token goes to two of four experts.
    assert calibrated["least_tokens"]["phi3"] == 256 > calibrated["least_tokens"]["mixtral"] > 0
    assert calibrated["unseen_layers"].tolist() == [0, 0]
    assert results[results["method"] != "gptq"]["least_tokens"].isna().all()
    by_hand = results[(results["model"] == "mixtral") & (results["bits"] == 4) & (results["outlier_fraction"] == 0)]
    assert by_hand["bits_per_param"].tolist() == [4.25]
    assert by_hand["total_bits"].tolist() == [5_147_648]

    # What the version before had planned of the same files is superseded.
    [manifest] = (tmp_path / "results" / "manifests").glob("*.json")
    earlier = json.loads(manifest.read_text())
    earlier.pop("keys")  # it knew none
    for model in earlier["models"]:
        model.pop("reading", None)
        model.pop("reading_reason", None)
    (manifest.parent / "earlier.json").write_text(json.dumps(earlier))
    assert {c.model.reading for m in load_manifests(tmp_path / "results") for c in m.cells} == {1, 2}
    assert set(load_results(tmp_path / "results")["key"]) == set(results["key"])
    table = here("mode=table")
    assert table.returncode == 0, table.stderr
    assert "4 cells of mixtral left out: its experts (3-D parameters) were left in 16 bits" in table.stdout


def test_outliers_that_no_model_can_have_are_refused_before_anything_runs(
    paths: dict[str, Path], here: Launch, tmp_path: Path
) -> None:
    for mode in ("plan", "run"):
        refused = here(f"path={paths['phi3']}", f"mode={mode}", *SETTINGS)
        assert refused.returncode == 2
        assert "outlier_fraction=0.05 is not valid: 0, since phi3 has fused projections" in refused.stderr
    assert not list((tmp_path / "results").glob("**/*.rows"))
