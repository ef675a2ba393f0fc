"""Agreement with the 16-bit model in a study: added to a finished one, stored, known to the analysis, then done."""

from __future__ import annotations

from pathlib import Path

from analysis.metrics import metric_columns, parse_metric
from analysis.significance import compare
from sweeps import load_results, load_samples
from tests.conftest import Launch


def test_a_study_has_the_columns_and_a_finished_one_measures_agreement_alone(tmp_path: Path, here: Launch) -> None:
    small = ["sweep.sizes=[neox-xs]", "eval.tasks=[]", "eval.tokens=2048", "out=r"]
    small += ["sweep.quant=[{bits: 16}, {bits: [3, 4], dtype: [int, float], exponent_bits: 2}]"]
    kinds = "eval.kinds={agreement: [jargon]}"
    before = here(*small, "report=false")
    assert before.returncode == 0, before.stderr
    done = here(*small, kinds, "report=false")
    assert done.returncode == 0, done.stdout + done.stderr
    long = load_results(tmp_path / "r", long=True)
    assert len(long) == 10
    assert set(long["status"]) == {"done"}
    # Perplexity kept its key: what was measured stayed.
    assert (long.groupby("eval")["launch"].nunique() == 1).all()
    assert long["launch"].nunique() == 2
    wide = load_results(tmp_path / "r").set_index("label")
    names = ["kl", "kl_median", "kl_p99", "top_token", "p_change", "p_change_rms"]
    metrics = [m for m in metric_columns(wide) if m.eval == "jargon_agreement"]
    assert sorted(m.metric for m in metrics) == sorted(names)
    baseline = wide.loc["16-bit", [f"jargon_agreement_{n}" for n in names]]
    assert baseline.tolist() == [0, 0, 0, 1, 0, 0]
    assert (wide.drop("16-bit")["jargon_agreement_kl"] > 0).all()
    assert wide["jargon_agreement_kl_stderr"].notna().all()
    assert "jargon_agreement_kl_median_stderr" not in wide or wide["jargon_agreement_kl_median_stderr"].isna().all()
    kl = parse_metric("jargon_agreement_kl", wide)
    assert (kl.label, kl.higher_is_better) == ("Divergence from 16-bit (KL) on jargon_agreement (nats/token)", False)
    assert parse_metric("jargon_agreement_kl_p99", wide).eval == "jargon_agreement"
    cells = long[(long["eval"] == "jargon_agreement") & (long["bits"] == 4)].set_index("dtype")
    samples = load_samples(tmp_path / "r", cells["measurement"])
    found = compare(*(samples[cells.loc[dtype, "measurement"]] for dtype in ("int", "float")), "kl")
    by_dtype = wide[wide["bits"] == 4].set_index("dtype")["jargon_agreement_kl"]
    assert abs(found.difference - (by_dtype["int"] - by_dtype["float"])) < 1e-6
    again = here(*small, kinds, "mode=plan")
    assert "to do  0" in " ".join(again.stdout.split("\n")), again.stdout
