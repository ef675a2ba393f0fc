"""Every family on the real evaluation sets: the paper's study on local model directories with local data."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweeps import load_results
from tests.conftest import Launch

pytestmark = pytest.mark.assets

FAMILIES = ("neox-xs", "opt-xs", "gpt2-s", "bloom-xs")


def test_the_papers_study_runs_on_local_models_with_local_data(assets: Path, launch: Launch, tmp_path: Path) -> None:
    paths = ",".join(str(assets / "models" / name) for name in FAMILIES)
    result = launch(
        "sweep=fig2_bit_scaling",
        f"path=[{paths}]",
        f"eval.data_dir={assets / 'eval'}",
        "eval.perplexity=[commoncrawl_sample,wikitext2]",
        "eval.tokens=4096",
        "eval.limit=8",
        "sweep.quant.1.bits=[3,8]",
        "executor.workers=1",
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    results = load_results(tmp_path / "results")
    assert set(results["status"]) == {"done"}
    assert sorted(set(results["model"])) == sorted(FAMILIES)
    assert sorted(set(results["family"])) == ["bloom", "gpt2", "neox", "opt"]
    assert len(results) == len(FAMILIES) * 3
    for _, group in results.groupby("model"):
        by_bits = group.set_index("bits")
        for text in ("commoncrawl_sample", "wikitext2"):
            loss = by_bits[f"{text}_loss"]
            assert loss[16] < loss[3]
            assert loss[8] == pytest.approx(loss[16], rel=0.02)
        tasks = ("lambada_openai", "winogrande", "hellaswag", "piqa")
        mean = by_bits[[f"{task}_acc" for task in tasks]].mean(axis=1)
        assert by_bits["zero_shot_mean"].to_dict() == pytest.approx(mean.to_dict())
    long = load_results(tmp_path / "results", long=True)
    assert long["dataset"].str.fullmatch("sha256:[0-9a-f]{64}").all()
    assert (tmp_path / "results" / "figures" / "fig2_bit_scaling" / "bit_scaling_zero_shot.png").exists()
