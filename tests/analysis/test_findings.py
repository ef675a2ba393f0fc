"""Findings: sentences say what the data hold, compare like with like, and are left out where the data hold nothing."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.findings import findings, wanted_samples
from analysis.metrics import parse_metric
from analysis.scaling import scaling_points
from kbit.spec import QuantSpec
from tests.analysis.studies import MODELS, Study, diverge, make_study

LOSS = parse_metric("jargon_loss")


def test_findings_say_what_the_formula_put_in(study: Study) -> None:
    said = findings(study.wide, study.samples)
    text = "\n".join(said)
    assert said[0].startswith(
        "Best precision for a fixed number of model bits, neox, 11.7 Mbit to 32.4 Mbit: 5-bit throughout"
    )
    types = next(s for s in said if s.startswith("Data types at 4 bits"))
    assert [types.index(d) for d in ("quantile +", "float e2 +", "int +", "dynamic +")] == sorted(
        types.index(d) for d in ("quantile +", "float e2 +", "int +", "dynamic +")
    )
    assert "quantile against float e2: -0.00" in types
    assert "mean of 3 models" in types
    blocks = next(s for s in said if s.startswith("Block sizes at 4 bits, int"))
    assert [blocks.index(f" {b} +") for b in (16, 64, 256, 1024, 4096)] == sorted(
        blocks.index(f" {b} +") for b in (16, 64, 256, 1024, 4096)
    )
    assert "16 against 4096: -0.2" in blocks
    assert "6 to 8 bits, block size 64: perplexity within 1.0" in text
    assert "2 % outlier dimensions in 16 bits, float e2 at 3 bits" in text
    assert "exponent bits: 2 at 3, 4 bits; 3 at 5, 6 bits; 4 at 7, 8 bits" in said[0]
    assert "diverged" not in text


def test_findings_without_samples_have_no_intervals(study: Study) -> None:
    assert "95 % CI" in "\n".join(findings(study.wide, study.samples))
    assert "95 % CI" not in "\n".join(findings(study.wide))


def test_findings_follow_the_data(study: Study) -> None:
    wide = study.wide.copy()
    wide.loc[wide["dtype"] == "int", "jargon_loss"] -= 0.2
    types = next(s for s in findings(wide) if s.startswith("Data types at 4 bits"))
    assert types.index("int ") < types.index("quantile ")
    assert findings(wide)[0] != findings(wide.assign(jargon_loss=3.0 + wide["bits"].astype(float)))[0]


def test_data_that_support_no_sentence_give_none(study: Study) -> None:
    assert findings(pd.DataFrame()) == []
    assert findings(study.wide.iloc[:0]) == []
    assert findings(study.wide[study.wide["bits"] == 16]) == []
    no_base = findings(study.wide[study.wide["bits"] < 16])
    assert not any("from 16-bit" in s or "6 to 8" in s for s in no_base)
    one_model = findings(study.wide[study.wide["model"] == "neox-s"])
    assert not any(s.startswith("Best precision") for s in one_model)
    assert any("neox-s: quantile" in s for s in one_model)
    assert not any("6 to 8" in s for s in findings(study.wide[study.wide["bits"] != 7]))


def test_a_mean_leaves_out_a_model_that_lacks_a_data_type(study: Study) -> None:
    wide = study.wide[study.wide["key"] != "neox-m int4 b64"]
    types = next(s for s in findings(wide) if s.startswith("Data types at 4 bits"))
    assert "mean of 2 models" in types


def test_divergence_is_counted_and_spoils_no_other_sentence(study: Study) -> None:
    gone = diverge(study, (study.wide["bits"] == 3) & (study.wide["model"] != "neox-xs"))
    said = findings(gone.wide, gone.samples)
    assert said[-1] == "26 of 129 measured cells diverged: 26 at 3 bits."
    assert "nan" not in "\n".join(said)
    assert "inf" not in "\n".join(said)


def test_wanted_samples_are_the_primary_evals_at_3_4_and_16_bits(study: Study) -> None:
    wanted = wanted_samples(study.wide, study.long)
    assert len(wanted) == 3 * int(study.wide["bits"].isin([3, 4, 16]).sum() / 3)
    assert wanted["neox-s 16-bit|jargon"] == ("neox-s 16-bit", "jargon")
    assert set(wanted.values()) <= set(study.samples)


def test_two_models_are_compared_without_a_baseline_out_of_reach() -> None:
    models = {"a": (1_000_000, 900_000, 3.5), "b": (3_000_000, 2_700_000, 3.2)}
    two = make_study(models, [QuantSpec(bits=16), *(QuantSpec(bits=b, dtype="int") for b in (3, 4, 5))], family="x")
    said = findings(two.wide)
    assert said[0].startswith("Best precision for a fixed number of model bits, x, ")


def data_type_sentence(said: list[str]) -> str:
    return next(s for s in said if s.startswith("Data types at 4 bits"))


def test_cells_of_other_windows_have_no_interval_and_stop_nothing(study: Study) -> None:
    short = {name: x[:7] for name, x in study.samples["neox-s quantile4 b64", "jargon"].items()}
    for odd in (short, {}):
        samples = study.samples | {("neox-s quantile4 b64", "jargon"): odd}
        said, full = findings(study.wide, samples), findings(study.wide, study.samples)
        assert data_type_sentence(said) == data_type_sentence(full).split(" quantile against")[0]
        assert [s for s in said if s not in full] == [data_type_sentence(said)]  # all else is as it was


def test_a_data_type_that_diverged_on_a_model_is_named_last_and_the_others_keep_every_model(study: Study) -> None:
    before = data_type_sentence(findings(study.wide))
    gone = diverge(study, study.wide["key"].isin(["neox-s quantile4 b64"]))
    said = data_type_sentence(findings(gone.wide, gone.samples))
    float_mean = before.split("float e2 ")[1].split(",")[0]
    assert f"mean of 3 models: float e2 {float_mean}, int +" in said
    assert ", quantile diverged on 1 of 3 models. float e2 against int: -0." in said
    alone = data_type_sentence(findings(gone.wide[gone.wide["model"] == "neox-s"]))
    assert "neox-s: float e2 +" in alone
    assert alone.endswith("quantile diverged.")
    every = diverge(study, study.wide["bits"] == 4)
    assert "int diverged on 3 of 3 models" in data_type_sentence(findings(every.wide, every.samples))


def test_a_block_size_that_diverged_is_said_in_its_place(study: Study) -> None:
    gone = diverge(study, study.wide["key"] == "neox-m int4 b4096")
    said = next(s for s in findings(gone.wide, gone.samples) if s.startswith("Block sizes at 4 bits, int"))
    assert ", 4096 diverged on 1 of 3 models. 16 against 1024: -0." in said


def test_the_whole_tensor_is_compared_by_its_name() -> None:
    own = make_study(specs=[QuantSpec(bits=16), *(QuantSpec(bits=4, dtype="int", blocksize=b) for b in (64, None))])
    said = next(s for s in findings(own.wide, own.samples) if s.startswith("Block sizes at 4 bits, int"))
    assert ". 64 against whole tensor: -" in said


def test_outliers_on_a_model_that_diverged_without_them_are_said_so(study: Study) -> None:
    gone = diverge(study, study.wide["key"] == "neox-m float3 e2 b64")
    said = next(s for s in findings(gone.wide) if s.startswith("2 % outlier") and "at 3 bits" in s)
    assert "diverged on 0 of 3 models with them, on 1 without; over the others, change of loss" in said
    assert "mean of 2 models" in said
    every = diverge(study, study.wide["bits"] == 3)
    said = next(s for s in findings(every.wide) if s.startswith("2 % outlier") and "at 3 bits" in s)
    assert said.endswith("diverged on 3 of 3 models with them, on 3 without.")


def floats(*cells: tuple[int, int, float]) -> pd.DataFrame:
    """4-bit floats of (exponent bits, block size, outlier fraction), with the baseline."""
    specs = [QuantSpec(bits=4, dtype="float", exponent_bits=e, blocksize=b, outlier_fraction=f) for e, b, f in cells]
    return make_study(specs=[QuantSpec(bits=16), *specs]).wide


def test_block_sizes_are_compared_at_one_number_of_exponent_bits() -> None:
    said = findings(floats((2, 64, 0.0), (3, 64, 0.0), (3, 256, 0.0)))
    assert any(s.startswith("Block sizes at 4 bits, float e3,") for s in said)
    said = findings(floats((2, 64, 0.0), (2, 256, 0.0), (3, 64, 0.0), (3, 256, 0.0)))
    assert any(s.startswith("Block sizes at 4 bits, float e2,") for s in said)
    assert not any(s.startswith("Block sizes") for s in findings(floats((2, 64, 0.0), (3, 256, 0.0))))


def test_outliers_are_compared_with_cells_of_the_same_exponent_bits() -> None:
    said = findings(floats((2, 64, 0.0), (3, 64, 0.0), (3, 64, 0.02)))
    assert sum(s.startswith("2 % outlier dimensions in 16 bits, float e3 at 4 bits") for s in said) == 1
    assert not any("outlier" in s for s in findings(floats((2, 64, 0.0), (3, 64, 0.02))))
    both = findings(floats((2, 64, 0.0), (3, 64, 0.0), (2, 64, 0.02), (3, 64, 0.02)))
    assert [s.split(" at ")[0][-8:] for s in both if "outlier" in s] == ["float e2"]


def test_another_exponent_measured_on_one_model_takes_no_model_from_a_curve() -> None:
    wide = floats((2, 64, 0.0), (3, 64, 0.0))
    wide = wide[(wide["model"] == "neox-s") | (wide["exponent_bits"] != 2).fillna(True)]
    curves, _ = scaling_points(wide, LOSS)
    quantized = curves[curves["bits"] == 4]
    assert quantized["model"].tolist() == list(MODELS)
    assert set(quantized["exponent_bits"]) == {3}


def test_a_baseline_that_diverged_is_no_baseline(study: Study) -> None:
    gone = diverge(study, study.wide["key"] == "neox-s 16-bit")
    said = data_type_sentence(findings(gone.wide, gone.samples))
    assert "mean of 2 models" in said
    none = diverge(study, study.wide["bits"] == 16)
    assert not any("from 16-bit" in s for s in findings(none.wide, none.samples))


def test_divergence_on_a_cell_whose_other_eval_failed_is_counted(study: Study) -> None:
    gone = diverge(study, study.wide["key"] == "neox-s int3 b64").wide
    row = gone["key"] == "neox-s int3 b64"
    gone.loc[row, [c for c in gone if c.startswith("jargon")]] = np.nan
    gone["jargon_status"] = np.where(row, "diverged", "done")
    gone.loc[row, "status"] = "failed"
    assert findings(gone)[-1] == "1 of 129 measured cells diverged: 1 at 3 bits."
