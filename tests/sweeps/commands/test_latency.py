"""Latency in a study: planned with the device in its identity, refused where it can't be, run by one worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweeps import load_results
from sweeps.study.devices import cpu_name
from tests.conftest import Launch

KINDS = "eval.kinds={latency: [jargon]}"
ALONE = ("eval.perplexity=[]", "eval.tasks=[]", "executor.device=cpu", KINDS)
GRID = "sweep.quant=[{bits: 16}, {bits: 4, dtype: int}, {method: block_float, format: mxfp4}]"


@pytest.mark.slow
def test_a_study_has_the_columns_of_packed_cells_and_of_the_baseline(tmp_path: Path, launch: Launch) -> None:
    done = launch("sweep.sizes=[neox-xs]", GRID, "out=r", *ALONE, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 1 cpu worker(s)" in done.stdout
    long = load_results(tmp_path / "r", long=True)
    assert set(long["eval_device"]) == {cpu_name()}
    assert set(long["eval_attention"]) == {"sdpa"}
    assert set(long["eval_execution"]) == {"eager"}
    wide = load_results(tmp_path / "r").set_index("label")
    size = wide["jargon_latency_size_on_disk"]
    assert size["mxfp4"] == pytest.approx(size["int4 b64"], rel=0.01)
    assert size["int4 b64"] < 0.75 * size["16-bit"]
    assert (wide["jargon_latency_tokens_per_second_16"] > wide["jargon_latency_tokens_per_second_1"]).all()


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("eval.attention=flash", "eval.attention='flash' is not valid: one of sdpa, eager"),
        ("eval.execution=graph", "eval.execution='graph' is not valid: one of eager, compile"),
        ("eval.kinds={latency: [jargonn]}", "eval.kinds.latency='jargonn' is neither a known text set"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_anything_runs(argument: str, said: str, here: Launch) -> None:
    refused = here("mode=plan", "sweep.sizes=[neox-xs]", GRID, *ALONE, argument)
    assert refused.returncode == 2
    assert said in refused.stderr
