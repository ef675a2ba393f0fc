"""The paper's figures and tables by its numbers: what is drawn, at which width, and what is said of the others."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from analysis.cells import measured
from analysis.chance import chance_level
from analysis.families import told_apart
from analysis.figures import (
    FIGURES,
    NoFigureError,
    Results,
    bit_scaling,
    command,
    figure_metrics,
    missing_figures,
    save_figures,
)
from analysis.figures.correlation import correlation
from analysis.figures.drawing import LOSS_CAP
from analysis.figures.over_bits import data_types_by_bits, formats
from analysis.figures.paper import PAPER
from analysis.figures.questions import exponents_chart, option_chart, outliers_chart
from analysis.figures.results import held
from analysis.inputs import Inputs
from analysis.metrics import parse_metric
from analysis.outliers import Outliers
from analysis.tables.paper import TABLES, correlations_by_layer, methods_by_block, write_paper_tables
from kbit.errors import SpecError
from kbit.spec import QuantSpec
from tests import ROOT
from tests.analysis.studies import MODELS, Study, make_study
from tests.analysis.test_figures import curves, open_markers, written

LOSS = parse_metric("jargon_loss")


def results(wide: pd.DataFrame, columns: int | None = None) -> Results:
    return Results(df=wide, metrics=[LOSS], sweep=None, samples=None, columns=columns)


def test_figures_have_the_papers_numbers_and_studies_that_exist() -> None:
    assert {e.paper for e in PAPER.values()} == {*range(1, 6), *range(7, 17)}
    assert {t.paper for t in TABLES.values()} == {1, 2}
    for name, entry in PAPER.items():
        assert name.startswith(f"fig{entry.paper:02d}_")
        assert (ROOT / "conf" / "sweep" / f"{entry.sweep.split()[0]}.yaml").is_file(), name


def test_what_is_missing_has_a_reason_and_a_command(study: Study) -> None:
    missing = {m.name: m for m in missing_figures(study.wide)}
    assert not {"fig13_bit_scaling", "fig14_data_types", "fig04_outlier_dimensions", "fig10_data_types"} & set(missing)
    assert {"fig05_gptq", "fig12_exponent_bits", "fig16_latency"} <= set(missing)
    twelve = missing["fig12_exponent_bits"]
    assert twelve.paper == 12
    assert "no float has" in twelve.reason
    assert twelve.command == "python launch.py sweep=fig12_exponent_bits 'path=[DIR,DIR]'"
    of_opt = study.wide.assign(family="opt")
    assert missing_figures(of_opt)[0].command.endswith("'model=[opt]'")


@pytest.mark.parametrize("shape", ["none", "no columns", "one model", "baselines"])
def test_each_figure_has_a_reason_where_it_cant_be_drawn_and_never_a_traceback(study: Study, shape: str) -> None:
    wide = {
        "none": study.wide.iloc[:0],
        "no columns": pd.DataFrame(),
        "one model": study.wide[study.wide["model"] == "neox-s"],
        "baselines": study.wide[study.wide["bits"] == 16],
    }[shape]
    of = results(wide if "jargon_loss" in wide else wide.reindex(columns=["jargon_loss", "status", "key"]))
    reasons = {name: entry.reason(of) for name, entry in FIGURES.items()}
    assert all(reason == "" or "no " in reason for reason in reasons.values())
    assert (shape == "one model") == (reasons["fig13_bit_scaling"] == "")
    missing_figures(wide)


def test_beyond_the_cut_the_axis_is_compressed_and_order_is_kept(study: Study) -> None:
    wide = study.wide.copy()
    worst = {"neox-xs": 6.0, "neox-s": 9.0, "neox-m": np.nan}
    for model, loss in worst.items():
        wide.loc[wide["key"] == f"{model} float3 e2 b64", ["jargon_loss", "status"]] = [loss, "diverged"]
    fig = bit_scaling(wide, LOSS)
    assert fig is not None
    ax = fig.axes[0]
    heights = sorted(y for _, y in open_markers(ax))
    assert heights[:2] == [6.0, 9.0]  # the data are drawn as they are
    on_paper = [ax.transData.transform((1e8, y))[1] for y in (3.2, LOSS_CAP, *heights)]
    assert on_paper == sorted(on_paper)
    assert len(set(on_paper)) == 5
    assert (on_paper[-1] - on_paper[1]) < 0.3 * (on_paper[1] - on_paper[0])
    assert "beyond it the axis is compressed, and order is kept" in written(fig)
    uncut = FIGURES["bit_scaling"].draw(replace(results(wide), cut=None))
    assert uncut is not None
    assert "compressed" not in written(uncut)


def test_chance_is_drawn_for_tasks() -> None:
    assert chance_level(parse_metric("zero_shot_mean")) == pytest.approx((0 + 0.5 + 0.25 + 0.5) / 4)
    assert chance_level(parse_metric("piqa_acc")) == 0.5
    assert chance_level(parse_metric("piqa_exact_match")) is None
    assert chance_level(parse_metric("mine_acc")) is None
    assert chance_level(LOSS) is None


def test_the_correlation_is_pearsons_with_perplexity_cut() -> None:
    rng = np.random.default_rng(0)
    loss = pd.Series([*rng.uniform(2, 4, 30), 9.0, np.inf, np.nan])
    accuracy = pd.Series(0.9 - 0.1 * loss.replace(np.inf, 9.0)) + rng.normal(0, 0.01, 33)
    found = correlation(loss, accuracy)
    shown = np.minimum(np.exp(loss[:32]), 100)
    assert found.r == pytest.approx(np.corrcoef(shown, accuracy[:32])[0, 1])
    assert found.r_loss == pytest.approx(np.corrcoef(loss[:31], accuracy[:31])[0, 1])
    assert (found.n, found.cut) == (32, 2)
    assert np.isnan(correlation(loss[:2], accuracy[:2]).r)


def test_architectures_of_one_family_are_told_apart_by_their_names() -> None:
    names = pd.Series(["opt-xs", "opt-s", "bloom-xs", "odd", "pythia-70m", "pythia-1b@step1000"])
    family = pd.Series(["tiny"] * 4 + ["pythia"] * 2)
    apart = ["tiny: opt", "tiny: opt", "tiny: bloom", "tiny", "pythia", "pythia"]
    assert told_apart(family, names).tolist() == apart
    mixed = make_study({"opt-xs": MODELS["neox-xs"], "bloom-s": MODELS["neox-s"]}, family="tiny").wide
    assert set(measured(mixed)["family"]) == {"tiny: opt", "tiny: bloom"}


def test_what_is_held_fixed_is_what_most_cells_have() -> None:
    cells = pd.DataFrame(
        {
            "family": "f",
            "model": ["a", "a", "b", "b", "a", "a"],
            "bits": [5, 5, 5, 5, 4, 4],
            "blocksize": [128] * 4 + [64] * 2,
            "dtype": ["int", "float"] * 3,
        }
    )
    chosen = held(cells, ["bits", "blocksize"], over="dtype")
    assert set(zip(chosen["bits"], chosen["blocksize"], strict=True)) == {(5, 128)}
    tied = held(cells[cells["model"] == "a"], ["bits", "blocksize"], over="dtype")
    assert set(tied["bits"]) == {4}  # the paper's


def test_questions_of_single_studies_have_their_own_charts() -> None:
    def floats(**more: object) -> list[QuantSpec]:
        return [QuantSpec(bits=b, dtype="float", exponent_bits=e, **more) for b, e in ((3, 1), (3, 2), (4, 2), (4, 3))]  # type: ignore[arg-type]

    specs = [QuantSpec(bits=16), *floats(), *floats(center=True)]
    specs += [QuantSpec(bits=b, dtype="float", exponent_bits=2, outlier_fraction=0.02) for b in (3, 4)]
    of = results(make_study(specs=specs).wide)
    exponents = exponents_chart(of)
    assert list(dict.fromkeys(exponents.cells["panel"])) == ["3 bits", "4 bits"]
    assert list(exponents.looks) == ["1", "2", "3"]
    outliers = outliers_chart(of)
    assert list(dict.fromkeys(outliers.cells["panel"])) == ["NeoX, 3 bits", "NeoX, 4 bits"]
    assert list(outliers.looks) == ["none", "2 %", "4-bit, none"]
    centering = option_chart(of, "center")
    on = centering.cells[centering.cells["curve"] == "float, centered"]
    assert len(on) == 6  # one number of exponent bits for each precision, three models
    rows = of.df.set_index("key")
    for cell in on.itertuples():
        partner, own = rows.loc[cell.baseline_key], rows.loc[cell.key]
        assert (partner["bits"], partner["exponent_bits"]) == (own["bits"], own["exponent_bits"])
        assert not partner["center"]
        assert cell.change == pytest.approx(own["jargon_loss"] - partner["jargon_loss"])
    with pytest.raises(NoFigureError, match="no two cells"):
        option_chart(of, "clip")


def test_formats_without_a_data_type_are_drawn_by_their_bits(study: Study) -> None:
    four = study.wide[study.wide["label"] == "int4 b64"]
    other = four.assign(
        method="ggml", dtype=None, blocksize=None, scheme=None, label="ggml Q4_K", bits_per_param_nominal=np.nan
    ).assign(bits_per_param=4.5, key=four["key"] + " ggml")
    chart = formats(results(pd.concat([study.wide, other], ignore_index=True)))
    drawn = chart.cells[chart.cells["curve"] == "ggml"]
    assert len(drawn) == 3
    assert (drawn["bits_per_param"] == 4.5).all()
    assert list(chart.looks) == ["blockwise", "ggml"]


@pytest.mark.parametrize(("columns", "inches"), [(1, 3.25), (2, 6.75)])
def test_files_for_a_page_are_as_wide_as_its_columns(study: Study, tmp_path: Path, columns: int, inches: float) -> None:
    from PIL import Image

    of = replace(results(study.wide, columns), bits=3)
    kinds = ("png", "pdf", "svg")
    (path,) = save_figures(of, tmp_path, names=["fig14_data_types"], metrics=[LOSS], formats=kinds)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"fig14_data_types-jargon_loss-3bit.{k}" for k in sorted(kinds)
    ]
    with Image.open(path) as image:
        assert image.width == round(300 * inches)
        assert "exponent bits" in image.info["Description"].lower()
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    fig = FIGURES["fig14_data_types"].draw(of)
    assert fig is not None
    assert fig.texts == []  # title and notes are the caption's
    fig.draw_without_rendering()
    renderer = FigureCanvasAgg(fig).get_renderer()
    for box in [fig.legends[0].get_window_extent(renderer), *(ax.get_tightbbox(renderer) for ax in fig.axes)]:
        assert box.x0 >= fig.bbox.x0 - 1
        assert box.x1 <= fig.bbox.x1 + 1
        assert box.y0 >= fig.bbox.y0 - 1
        assert box.y1 <= fig.bbox.y1 + 1
    assert len(curves(fig.axes[0])) == 4
    with pytest.raises(SpecError, match="formats"):
        save_figures(of, tmp_path, names=["fig14_data_types"], metrics=[LOSS], formats=("gif",))


def test_metrics_of_figures_are_each_text_and_each_task(study: Study) -> None:
    columns = [m.column for m in figure_metrics(study.wide)]
    assert columns == ["jargon_loss", "jargon_lastword_acc", "jargon_choice_acc"]


def test_table_1_has_methods_by_block_size(study: Study, tmp_path: Path) -> None:
    table = methods_by_block(study.wide)
    assert list(table.columns) == ["family", "model", "block size", "int3", "quantile3"]
    assert table["block size"].tolist()[:5] == ["4096", "1024", "256", "64", "16"]
    cell = study.wide[study.wide["key"] == "neox-xs int3 b256"]
    at = table[(table["model"] == "neox-xs") & (table["block size"] == "256")]
    assert at["int3"].iloc[0] == pytest.approx(cell["jargon_perplexity"].iloc[0])
    assert list(methods_by_block(study.wide, metric="jargon_loss", bits=[4]).columns[3:]) == ["int4", "quantile4"]
    assert methods_by_block(study.wide.iloc[:0]).empty
    names = [p.name for p in write_paper_tables(study.wide, tmp_path)]
    assert names == [f"table1_methods_by_block.{kind}" for kind in ("csv", "md", "tex")]


def test_table_2_has_layers_down_and_models_across() -> None:
    found = pd.DataFrame(
        {
            "family": "opt",
            "model": ["opt-1b", "opt-1b", "opt-125m"],
            "params": [10, 10, 1],
            "eval": "wikitext2_outliers",
            "layers": ["a", "b", "a"],
            "correlation": [0.6, 0.1, 0.5],
        }
    )
    table = correlations_by_layer(pd.DataFrame(), found)
    assert list(table.columns) == ["family", "text", "layers", "opt-125m", "opt-1b"]
    assert table["opt-1b"].tolist() == [0.6, 0.1]
    assert correlations_by_layer(pd.DataFrame(), None).empty


def test_the_command_writes_figures_and_says_what_is_missing(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = ["--to", str(tmp_path), "--names", "fig13_bit_scaling", "--formats", "svg", "--blocksize", "64"]
    inputs = Inputs(name="s", title="s", df=study.wide, long=study.long, read_samples=lambda _: {})
    assert command.run(parser.parse_args(given), inputs) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == str(tmp_path / "fig13_bit_scaling-jargon_loss-b64.svg")
    assert "missing: fig16_latency: " in printed
    assert "python launch.py sweep=survey" in printed


def test_the_command_writes_paired_intervals_and_table_2_as_a_report_does(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [{"family": "opt", "model": "opt-1b", "params": 1, "eval": "a", "layers": "b", "correlation": 0.6}]
    monkeypatch.setattr(
        "analysis.paper.outliers_of", lambda _: Outliers(correlations=pd.DataFrame(found), emergence=pd.DataFrame())
    )
    monkeypatch.setattr("analysis.paper.PAPER", ["fig14_data_types"])  # the others take seconds each
    keys = {f"{key}|{name}": (key, name) for key, name in study.samples}
    kept = study.wide["bits"].isin([4, 16]) & study.wide["blocksize"].fillna(64).eq(64)
    inputs = Inputs(
        name="s",
        title="s",
        df=study.wide[kept],
        long=pd.concat([study.long, study.long.tail(1).assign(eval_kind="outliers")]),
        read_samples=lambda wanted: {m: study.samples[keys[m]] for m in wanted if m in keys},
    )
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(["--to", str(tmp_path), "--formats", "svg"]), inputs) == 0
    assert {"table2_correlations.csv", "table2_correlations.tex"} <= {p.name for p in tmp_path.iterdir()}
    assert "95 % confidence interval, paired" in (tmp_path / "fig14_data_types-jargon_loss.svg").read_text()
    assert str(tmp_path / "table2_correlations.md") in capsys.readouterr().out


def test_panels_that_share_an_axis_show_the_highest_of_each_family(study: Study) -> None:
    high = study.wide.assign(family="a", key="a " + study.wide["key"], model="a" + study.wide["model"])
    base = high.groupby("model")["jargon_loss"].transform("min")
    high = high.assign(jargon_loss=base + 20 * (high["jargon_loss"] - base))
    chart = data_types_by_bits(replace(results(pd.concat([high, study.wide], ignore_index=True)), cut=None))
    axes = chart.draw().axes
    assert axes[0].get_yscale() == "symlog"
    highest = max(float(np.nanmax(y)) for ax in axes for _, y in curves(ax).values())
    assert highest == max(float(np.nanmax(y)) for _, y in curves(axes[0]).values())
    assert all(ax.get_ylim()[1] > highest for ax in axes)


def test_figure_2_has_four_families_the_papers_first(study: Study) -> None:
    names = ("neox", "llama", "opt", "bloom", "tiny")
    sizes = {"tiny": 1}
    wide = pd.concat(
        [
            study.wide[study.wide["model"].isin(list(MODELS)[: sizes.get(name, 3)])].assign(
                family=name, key=study.wide["key"] + name
            )
            for name in names
        ],
        ignore_index=True,
    )
    fig = FIGURES["fig02_bit_scaling"].draw(Results(df=wide, metrics=[LOSS], sweep=None, samples=None))
    assert fig is not None
    assert {ax.get_title(loc="left") for ax in fig.axes} - {""} == {"OPT", "BLOOM", "NeoX", "llama"}
