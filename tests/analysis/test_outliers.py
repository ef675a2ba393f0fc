"""Tables and figures of outliers: the numbers of the stored measurements, and what is said of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm, t

from analysis.__main__ import main
from analysis.figures.outliers import draw_correlations, draw_emergence, layer_order
from analysis.inputs import Inputs
from analysis.metrics import direction_warnings, headline_metrics
from analysis.outliers import (
    Outliers,
    correlations_markdown,
    emergence_markdown,
    outlier_figures,
    outlier_section,
    outliers_of,
)
from analysis.significance import Samples
from kbit.errors import SpecError
from sweeps.results.table import load_tables
from sweeps.study.manifest import Manifest
from tests.sweeps.worker.test_worker import BASELINE, INT4, NEOX_XS, Bench, evaluation, pack_of

MODELS = {  # family, parameters, loss, correlations of FFN 1 and of V by block, least activation, features
    "opt-a": ("opt", 1_000_000, 3.5, [0.1, -0.1, 0.3], [0.5, 0.7, 0.9], 0.0, []),
    "opt-b": ("opt", 8_000_000, 3.0, [0.0, 0.1, -0.1], [0.6, 0.8, 1.0], 0.0, [(3, 1.0, 0.75, -40.0, 1.0)]),
    "neox-a": ("neox", 2_000_000, 3.3, [0.4, 0.2, 0.3], [0.2, math.nan, 0.4], -0.17, []),
}
CHANCE = 0.05


def samples_of(name: str) -> Samples:
    _, _, _, ffn, value, least, features = MODELS[name]
    samples: dict[str, Any] = {"block_positions": np.zeros(3)}
    for pair, of_blocks, low in (("ffn1_ffn2", ffn, least), ("value_output", value, -2.0)):
        there = ~np.isnan(of_blocks)
        samples[pair] = np.array(of_blocks)
        samples[f"{pair}_largest"] = np.array(of_blocks) / 2
        samples[f"{pair}_least"] = np.where(there, low, math.nan)
        samples[f"{pair}_units"] = np.where(there, 64, 0).astype(np.int32)
        samples[f"{pair}_pooled"], samples[f"{pair}_chance"] = np.array([0.11]), np.array([CHANCE])
    # Besides the features one that is large at too few positions, of both signs.
    listed = [*features, (7, 1.0, 0.0599, -9.0, 9.0)]
    names = ("feature_dimension", "feature_layers", "feature_positions", "feature_low", "feature_high")
    samples |= {
        n: np.array(column, dtype=np.float32) for n, column in zip(names, zip(*listed, strict=True), strict=True)
    }
    return samples


def inputs_of(*models: str, status: str = "done") -> Inputs:
    wide, long = [], []
    for name in models:
        family, params, loss, ffn, _, _, features = MODELS[name]
        cell = {"key": f"key {name}", "family": family, "model": name, "params": params, "bits": 16, "status": status}
        metrics = {"outlier_features": float(len(features)), "largest_input": 40.0, "spearman_ffn1_ffn2": np.mean(ffn)}
        layers, positions = (1.0, 0.75) if features else (0.0, 0.0)
        metrics |= {"outlier_layers": layers, "outlier_positions": positions}
        metrics |= {"widest_layers": layers or 0.5, "widest_positions": positions or 0.0599}
        stderr = {"outlier_layers": 0.0, "outlier_positions": 0.02}
        flat = {f"text_outliers_{m}": value for m, value in metrics.items()}
        wide.append(cell | flat | {"text_loss": loss, "text_status": "done", "text_outliers_status": status})
        about = {"eval": "text_outliers", "eval_kind": "outliers", "measurement": f"measurement {name}"}
        long.append(cell | about | {"metrics": metrics, "stderr": stderr})
        long.append(cell | {"eval": "text", "eval_kind": "perplexity", "metrics": {"loss": loss}, "stderr": {}})
    found = {f"measurement {name}": samples_of(name) for name in models}
    return Inputs(
        name="s",
        title="s",
        df=pd.DataFrame(wide).astype({"params": "Int64", "bits": "Int64"}),
        long=pd.DataFrame(long).astype({"params": "Int64", "bits": "Int64"}),
        read_samples=lambda wanted: {m: found[m] for m in wanted},
    )


@pytest.fixture(scope="module")
def found() -> Outliers:
    return outliers_of(inputs_of("opt-b", "opt-a", "neox-a"))


def test_correlations_are_means_over_blocks_with_interval_and_chance(found: Outliers) -> None:
    table = found.correlations.set_index(["model", "reads"])
    assert list(dict.fromkeys(found.correlations["model"])) == ["neox-a", "opt-a", "opt-b"]  # by family, then size
    row = table.loc[("opt-a", "attention output")]
    z = np.arctanh([0.5, 0.7, 0.9])
    low, high = np.tanh(t.interval(0.95, 2, z.mean(), z.std(ddof=1) / math.sqrt(3)))
    assert (row["correlation"], row["low"], row["high"]) == pytest.approx((0.7, low, high))
    assert (row["by_largest"], row["pooled"]) == pytest.approx((0.35, 0.11))
    assert (row["loss"], row["params"], row["blocks"], row["units"]) == (3.5, 1e6, 3, 64)
    assert row["of_blocks"] == [0.5, 0.7, 0.9]
    weak = table.loc[("opt-a", "FFN 2")]
    assert weak["p"] == pytest.approx(2 * norm.sf(0.1 / CHANCE))
    # A block without a correlation doesn't count.
    row = table.loc[("neox-a", "attention output")]
    assert (row["correlation"], row["blocks"]) == pytest.approx((0.3, 2))


def test_only_a_relu_is_the_control(found: Outliers) -> None:
    controls = found.correlations.set_index(["model", "layers"])["is_control"]
    assert controls.to_dict() == {
        ("neox-a", "FFN 1 / activation"): False,
        ("neox-a", "V / attention output"): False,
        ("opt-a", "FFN 1 / ReLU (control)"): True,
        ("opt-a", "V / attention output"): False,
        ("opt-b", "FFN 1 / ReLU (control)"): True,
        ("opt-b", "V / attention output"): False,
    }
    assert layer_order(found.correlations) == [
        *("FFN 1 / ReLU (control)", "FFN 1 / activation", "V / attention output")
    ]


def test_table_2_has_layers_down_and_models_across(found: Outliers) -> None:
    text = correlations_markdown(found.correlations)
    neox, opt = (part.splitlines() for part in text.split("\n\n")[1:4:2])
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in opt]
    assert cells[0] == ["Layer / feature", "opt-a", "opt-b"]
    assert cells[2][0] == "FFN 1 / ReLU (control)"
    assert cells[2][2].startswith("0.00 [")
    assert not cells[2][2].endswith("*")
    assert cells[2][1] == "0.10 [-0.39, 0.55]*"
    assert cells[3] == ["V / attention output", "0.70 [-0.20, 0.97]*", "0.80 [-1.00, 1.00]*"]
    assert cells[5] == ["V / attention output, pooled", "0.11", "0.11"]
    assert "FFN 1 / activation" in neox[2]
    assert "two-sided, over permutations of the dimensions" in text


def test_emergence_counts_features_and_those_of_one_sign(found: Outliers) -> None:
    table = found.emergence.set_index("model")
    assert table["features"].to_dict() == {"neox-a": 0, "opt-a": 0, "opt-b": 1}
    assert table["one_sided"].to_dict() == {"neox-a": 0, "opt-a": 0, "opt-b": 1}
    assert table.loc["opt-b", ["layers", "positions", "positions_stderr"]].tolist() == [1.0, 0.75, 0.02]
    assert table.loc["opt-a", ["layers", "widest_layers", "widest_positions"]].tolist() == [0.0, 0.5, 0.0599]
    text = emergence_markdown(found.emergence)
    (line,) = [line for line in text.splitlines() if "opt-b" in line]
    cells = [c.strip() for c in line.strip("|").split("|")]
    assert cells == [
        "opt-b",
        "8,000,000",
        "3.000",
        "1",
        "1",
        "100.0 ± 0.0 %",
        "75.0 ± 2.0 %",
        "100.0 %",
        "75.0 %",
        "40.0",
    ]
    assert "at least 6 in at least 25 % of the layers and at 6 % of the positions" in text


def test_figures_show_every_model_where_it_is(found: Outliers) -> None:
    figure = draw_correlations(found.correlations, study="s")
    assert figure is not None
    assert [ax.get_title(loc="left") for ax in figure.axes] == layer_order(found.correlations)
    control = figure.axes[0]
    lines = {line.get_label(): line for line in control.get_lines()}
    assert list(lines["OPT"].get_xdata()) == [1e6, 8e6]
    assert list(lines["OPT"].get_ydata()) == pytest.approx([0.1, 0.0])
    assert "NeoX" not in lines
    figure = draw_emergence(found.emergence, study="s")
    assert figure is not None
    assert [ax.get_xlabel() for ax in figure.axes[2:]] == ["Parameters", "Loss of the 16-bit model (nats/token)"]
    by_loss = {line.get_label(): line for line in figure.axes[3].get_lines()}["OPT"]
    assert sorted(zip(by_loss.get_xdata(), by_loss.get_ydata(), strict=True)) == [(3.0, 75.0), (3.5, 0.0)]
    assert draw_correlations(found.correlations[:0]) is None
    assert draw_emergence(found.emergence[:0]) is None
    without = found.emergence.assign(loss=math.nan)
    only_size = draw_emergence(without)
    assert only_size is not None
    assert len(only_size.axes) == 2
    assert draw_emergence(without.assign(params=math.nan)) is None


def test_several_text_sets_have_figures_of_their_own(found: Outliers) -> None:
    def twice(table: pd.DataFrame) -> pd.DataFrame:
        return pd.concat([table, table.assign(eval="other_outliers")[:1]], ignore_index=True)

    both = Outliers(correlations=twice(found.correlations), emergence=twice(found.emergence))
    assert set(outlier_figures(found)) == {"outlier_correlations", "outlier_emergence"}
    figures = outlier_figures(both)
    assert set(figures) == {
        f"outlier_{of}_{e}_outliers" for of in ("correlations", "emergence") for e in ("text", "other")
    }
    assert len(figures["outlier_correlations_text_outliers"].axes) == 3
    assert len(figures["outlier_correlations_other_outliers"].axes) == 1


def test_what_is_neither_good_nor_bad_is_ranked_by_nothing_and_no_cause_for_a_warning() -> None:
    wide = inputs_of("opt-a").df
    assert direction_warnings(wide) == []
    assert [m.column for m in headline_metrics(wide)] == ["text_loss"]
    (alone,) = headline_metrics(wide.drop(columns="text_loss"))
    assert (alone.eval, alone.higher_is_better) == ("text_outliers", None)


def test_without_a_measurement_it_says_what_to_run() -> None:
    with pytest.raises(SpecError, match=r"results with measurements of kind outliers: run 'eval\.kinds="):
        outliers_of(inputs_of("opt-a", status="failed"))
    nothing = inputs_of("opt-a", status="failed")
    assert outlier_section(nothing.df, nothing.long) is None


def test_a_study_that_a_worker_ran_becomes_tables_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evals = (evaluation(), evaluation("jargon_outliers", kind="outliers"))
    cells = [item[0] for item in pack_of(BASELINE, INT4).items]
    manifest = Manifest(sweep="s", cells=tuple(cells), evals=evals, excluded=(), config={})
    assert len(list(manifest.measurements())) == 3
    manifest.save(tmp_path)
    Bench(tmp_path).worker.run_pack(pack_of(BASELINE, evals=evals))
    assert main(["outliers", str(tmp_path), "--study", "s"]) == 0
    said = capsys.readouterr().out
    directory = tmp_path / "reports" / "s"
    assert str(directory / "outlier_emergence.png") in said
    assert f"| {NEOX_XS.name} " in said
    assert {path.name for path in directory.iterdir()} == {
        f"outlier_{of}.{kind}" for of in ("correlations", "emergence") for kind in ("csv", "tex", "md", "png", "svg")
    }
    table = pd.read_csv(directory / "outlier_correlations.csv")
    assert len(json.loads(table["of_blocks"][0])) == table["blocks"][0]
    # NeoX has parallel branches, and a GELU.
    assert table["layers"].tolist() == [
        *("FFN 1 / activation", "V / attention output", "previous FFN 2 / FFN 1", "previous FFN 2 / QKV")
    ]
    assert table["correlation"].between(-1, 1).all()
    assert table["p"].between(0, 1).all()
    assert main(["outliers", str(tmp_path / "none")]) == 2
    # A report of results has them too, without the samples.
    section = outlier_section(*load_tables([tmp_path]))
    assert section is not None
    (part,) = section.tables
    row = part.frame.iloc[0]
    assert row["V / attention output"] == pytest.approx(table["correlation"][1], abs=5e-4)
    assert row["model"] == NEOX_XS.name
    assert "attention output / FFN 1" not in part.frame
