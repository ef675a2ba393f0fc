"""Cells of every method in one study: planned, quantized by a worker in one pack, stored, drawn, resumed."""

from __future__ import annotations

from pathlib import Path

from kbit.specs.base import ROW
from sweeps import load_results
from tests.conftest import Launch

BLOCKS = (
    "{bits: 16}",
    "{method: block_float, format: [mxfp4, nvfp4]}",
    "{bits: 3, dtype: int, blocksize: 32, clip: [false, true], rotation: [null, 1]}",
    "{method: ggml, recipe: [Q4_0, Q4_K_M]}",
    "{method: ggml, ggml_type: q5_1}",
    "{method: hqq, bits: 3, blocksize: 32}",
    "{method: gptq, bits: 3, dtype: int, blocksize: [row, 32], zero_point: true}",
    "{method: awq, bits: 3, dtype: int, blocksize: 32}",
    "{bits: 3, dtype: lloyd, blocksize: 32, weighting: activation}",
    "{bits: 3, dtype: int, blocksize: 32, outlier_fraction: 0.02, outlier_criterion: [std, activation]}",
    "{method: llm_int8, threshold: [6.0, 2.0]}",
    "{method: mixed, budget: [3.75, 4.0], dtype: int, blocksize: 32, candidates: 2-6}",
    "{method: block_float, format: mxfp6_e3m2, scale_rounding: ceil}",
)
CALIBRATION = (
    *("calibration.set=jargon", "calibration.samples=8", "calibration.length=128"),
    "calibration.compute_dtype=float32",  # on a CPU several times as fast as float16
)
GPTQ = {  # rows of 96 values, but of 384 in one of the four matrices of a block
    "gptq int3 row asymmetric, jargon 8x128 seed 0 float32": 3 + 19 * (3 + 1 + 4 + 1) / (96 * 12),
    "gptq int3 g32 asymmetric, jargon 8x128 seed 0 float32": 3 + 19 / 32,
}
AWQ = "awq int3 g32 clipped, jargon 8x128 seed 0 float32"
LEARNED = "lloyd3 b32 activation-weighted, jargon 8x128 seed 0 float32"
KEPT = ("int3 b32 outliers 0.02", "int3 b32 outliers 0.02 by activation, jargon 8x128 seed 0 float32")
MIXED = {f"mixed int {budget} b32 candidates=2-6, jargon 8x128 seed 0 float32": budget for budget in (3.75, 4)}
BITS = {
    LEARNED: 3.505,
    **dict.fromkeys(KEPT, 3.772),
    AWQ: 3.5 + 16 * (3 * 96 + 384) / (96 * 96 * 12),  # and a scale for each input
    "mxfp4": 4.25,
    "nvfp4": 4.5,
    "hqq3 g32": 4.0,
    **dict.fromkeys(("int3 b32", "int3 b32 clipped", "int3 b32 rotation=1", "int3 b32 clipped rotation=1"), 3.5),
    "ggml Q4_0": 5.585,
    "ggml Q4_K_M": 6.58,
    "ggml q5_1": 6.0,
    **GPTQ,
    **dict.fromkeys(("llm_int8", "llm_int8 threshold 2"), 8 + 16 * (3 + 1 + 4 + 1) / (96 * 12)),
    **MIXED,
    "mxfp6_e3m2 scale-ceil": 6.25,
}
"""Bits a weight of each cell, in layers of neox-xs: rows of 96 or 384 values, whole blocks. A recipe has
the embedding at q4_0 or q5_0 and the head at q8_0 among them."""
STUDY = (
    *("sweep.name=methods", "sweep.sizes=[neox-xs]", "eval.tokens=1024", "eval.tasks=[]", "executor.device=cpu"),
    *("executor.workers=1", "out=r", "report=false", *CALIBRATION),
)


def test_a_study_of_methods_runs_in_one_pack_and_is_done(tmp_path: Path, here: Launch) -> None:
    first = here(*STUDY, f"sweep.quant=[{', '.join(BLOCKS[:-1])}]")
    assert first.returncode == 0, first.stdout + first.stderr
    whole = f"sweep.quant=[{', '.join(BLOCKS)}]"
    done = here(*STUDY, whole)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = load_results(tmp_path / "r").set_index("label")
    assert set(rows["status"]) == {"done"}
    assert set(rows.index) == {"16-bit", *BITS}
    assert rows["jargon_loss"].nunique() == len(rows)
    for label, bits in BITS.items():
        assert abs(rows.loc[label, "bits_per_param"] - bits) < 0.01, label
        assert rows.loc[label, "jargon_loss"] > rows.loc["16-bit", "jargon_loss"] - 0.02
    assert rows.loc["nvfp4", "format"] == "nvfp4"
    assert rows["codes_hash"].notna().sum() == rows["codes_hash"].nunique() == len(GPTQ) + len(MIXED) + 3
    shares = load_results(tmp_path / "r", long=True).set_index("label")["outlier_share"].dropna()
    assert 0 <= shares["llm_int8"] < shares["llm_int8 threshold 2"] < 0.5
    assert len(shares) == 2
    assert set(rows.index[rows["allocation_hash"].notna()]) == set(MIXED)
    predicted = rows["predicted_loss_change"].dropna()
    assert predicted.index.size == 2
    assert predicted.nlargest(1).index[0].startswith("mixed int 3.75")
    assert set(rows.index[rows["blocksize"] == ROW]) == {label for label in GPTQ if " row " in label}
    table = "jargon_8x128_seed0_float32_sensitivity"
    assert rows[f"{table}_status"].value_counts().to_dict() == {"done": 1}
    assert rows.loc["16-bit", f"{table}_noise_rise"] > 0
    # What the first launch measured is not measured again.
    assert sorted(rows["launch"].value_counts()) == [1, len(rows) - 1]
