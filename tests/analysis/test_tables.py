"""Tables and metrics: the right rows, the right numbers, nothing invented where a cell is missing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from analysis.cells import measured, one_exponent, plain, points
from analysis.metrics import ZERO_SHOT_TASKS, headline_metrics, metric_columns, parse_metric, primary_loss, stderr
from analysis.mixtures import mixture_warnings
from analysis.report.writing import write_tables
from analysis.tables import (
    TABLE_SUFFIXES,
    bits_by_dtype,
    block_sizes_held,
    other_cells,
    others_markdown,
    others_text,
    render,
    render_others,
    to_markdown,
    write_table,
)
from kbit.errors import SpecError
from kbit.spec import QuantSpec
from tests.analysis.studies import MODELS, Study, demo_specs, diverge, make_study

LOSS = parse_metric("jargon_loss")


def unpadded(markdown: str) -> str:
    """Return a Markdown table without the blanks that put its columns under each other."""
    return re.sub(r" {2,}", " ", markdown)


def one(df: pd.DataFrame, **where: object) -> pd.Series:
    keep = pd.Series(True, index=df.index)
    for column, value in where.items():
        keep &= (df[column] == value).fillna(False)
    assert keep.sum() == 1
    return df[keep].iloc[0]


def test_the_study_has_the_demos_129_cells_of_three_evals(study: Study) -> None:
    assert len(study.wide) == 129
    assert study.wide["key"].is_unique
    assert len(study.long) == 3 * 129


def test_metrics_are_found_named_and_split_at_the_metric(study: Study) -> None:
    found = {m.column: m for m in metric_columns(study.wide)}
    assert set(found) == {
        *("jargon_loss", "jargon_perplexity", "jargon_bits_per_byte", "jargon_lastword_acc"),
        *("jargon_lastword_perplexity", "jargon_choice_acc", "jargon_choice_acc_norm", "zero_shot_mean"),
    }
    assert (found["jargon_choice_acc_norm"].eval, found["jargon_choice_acc_norm"].metric) == (
        "jargon_choice",
        "acc_norm",
    )
    assert found["jargon_loss"].label == "Loss on jargon (nats/token)"
    assert not found["jargon_loss"].higher_is_better
    assert found["jargon_choice_acc"].higher_is_better
    assert primary_loss(study.wide) == LOSS


@pytest.mark.parametrize("column", ["loss", "_loss", "jargon_loss_stderr", "jargon_status"])
def test_what_is_no_metric_is_refused(column: str) -> None:
    with pytest.raises(ValueError, match="EVAL_METRIC"):
        parse_metric(column)


def test_headline_is_the_loss_then_the_zero_shot_mean_where_a_cell_has_one(study: Study) -> None:
    assert [m.column for m in headline_metrics(study.wide)] == ["jargon_loss"]
    with_mean = study.wide.assign(zero_shot_mean=0.5)
    assert [m.column for m in headline_metrics(with_mean)] == ["jargon_loss", "zero_shot_mean"]
    tasks_only = study.wide.drop(columns=[c for c in study.wide if c.startswith("jargon_") and "choice" not in c])
    assert [m.column for m in headline_metrics(tasks_only)] == ["jargon_choice_acc"]
    assert headline_metrics(pd.DataFrame()) == []


def test_zero_shot_error_is_that_of_a_mean_of_four_tasks() -> None:
    errors = {"lambada_openai": 0.01, "winogrande": 0.02, "hellaswag": 0.03, "piqa": 0.04}
    df = pd.DataFrame(
        {f"{task}_acc_stderr": [e, np.nan] for task, e in errors.items()} | {"zero_shot_mean": [0.5, 0.4]}
    )
    found = stderr(df, parse_metric("zero_shot_mean"))
    assert found[0] == pytest.approx(np.sqrt(0.0001 + 0.0004 + 0.0009 + 0.0016) / 4)
    assert np.isnan(found[1])


def test_bits_by_dtype_holds_block_64_without_outliers_and_the_baseline_first(study: Study) -> None:
    table = bits_by_dtype(study.wide, metric="jargon_loss")
    assert list(table.index) == [(m, b) for m in MODELS for b in (16, 8, 7, 6, 5, 4, 3)]
    assert list(table.columns.get_level_values("dtype").unique()) == ["int", "float", "dynamic", "quantile"]
    cell = one(study.wide, model="neox-s", dtype="float", bits=4, blocksize=64, outlier_fraction=0.0)
    assert table.loc[("neox-s", 4), ("float", "value")] == cell["jargon_loss"]
    assert table.loc[("neox-s", 4), ("float", "stderr")] == cell["jargon_loss_stderr"]
    base = one(study.wide, model="neox-s", bits=16)["jargon_loss"]
    assert (table.loc[("neox-s", 16)].xs("value", level="field") == base).all()


def test_bits_by_dtype_of_another_block_size_has_its_cells_only(study: Study) -> None:
    table = bits_by_dtype(study.wide, metric=LOSS, blocksize=256)
    assert list(table.columns.get_level_values("dtype").unique()) == ["int", "quantile"]
    assert list(table.loc["neox-m"].index) == [16, 4, 3]
    whole = make_study(specs=[QuantSpec(bits=4, dtype="int", blocksize=None), QuantSpec(bits=4, dtype="int")])
    found = bits_by_dtype(whole.wide, metric=LOSS, blocksize=None)
    assert found.loc[("neox-s", 4), ("int", "value")] == one(whole.wide, key="neox-s int4 tensor")["jargon_loss"]


def test_cells_without_a_place_in_the_table_are_counted_and_listed_by_label(study: Study) -> None:
    wide = study.wide.copy()
    ggml = wide["key"] == "neox-s int4 b64"
    about = {"method": "ggml", "label": "ggml q4_K", "ggml_type": "q4_K", "bits_per_param": 4.5}
    wide.loc[ggml, ["dtype", "scheme", "absmax_dtype"]] = None
    for name, value in about.items():
        wide.loc[ggml, name] = value
    others = other_cells(wide, metric=LOSS)
    table = bits_by_dtype(wide, metric=LOSS)
    held = int(table.xs("value", axis=1, level="field").drop(16, level="bits").notna().to_numpy().sum())
    assert held + len(others) == int((wide["bits"] < 16).sum())
    assert others_text(others) == (
        "55 cells are not in this table of plain block-wise cells at block size 64: 54 of blockwise, 1 of ggml."
    )
    value = wide.loc[ggml, "jargon_loss"].item()
    markdown = unpadded(others_markdown(others, metric=LOSS))
    assert f"| neox-s | ggml q4_K | 4.500 | {value:.3f} ± 0." in markdown
    out = StringIO()
    render_others(others[others["method"] == "ggml"], Console(file=out, width=60), metric=LOSS)
    assert f"{value:.3f} ± 0." in out.getvalue()
    assert others_text(other_cells(pd.DataFrame(), metric=LOSS)) == ""


@pytest.mark.parametrize("status", ["failed", "running", "queued", "missing"])
def test_an_unfinished_cell_counts_with_what_was_measured_of_it(study: Study, status: str) -> None:
    wide = study.wide.copy()
    row = wide["key"] == "neox-s int4 b64"
    before = bits_by_dtype(wide, metric=LOSS).loc[("neox-s", 4), ("int", "value")]
    wide.loc[row, "status"] = status
    wide.loc[row, "jargon_choice_acc"] = np.nan
    assert bits_by_dtype(wide, metric=LOSS).loc[("neox-s", 4), ("int", "value")] == before
    accuracy = bits_by_dtype(wide, metric="jargon_choice_acc")
    assert np.isnan(accuracy.loc[("neox-s", 4), ("int", "value")])
    assert "| - |" in unpadded(to_markdown(accuracy, metric="jargon_choice_acc"))


def test_divergence_is_shown_and_never_the_best(study: Study) -> None:
    gone = diverge(study, study.wide["key"] == "neox-s int3 b64")
    wide = gone.wide
    high = wide["key"] == "neox-s quantile4 b64"
    wide.loc[high, ["status", "jargon_loss"]] = ["diverged", 0.5]
    table = bits_by_dtype(wide, metric=LOSS)
    assert np.isinf(table.loc[("neox-s", 3), ("int", "value")])
    text = unpadded(to_markdown(table, metric=LOSS))
    assert "| neox-s | 3 | diverged |" in text
    four = next(line for line in text.splitlines() if line.startswith("| neox-s | 4 |"))
    assert "0.500 ± 0." in four
    assert "† |" in four
    assert "**0.500" not in four


def test_float_cells_of_several_exponents_give_the_heuristics(study: Study) -> None:
    specs = [QuantSpec(bits=4, dtype="float", exponent_bits=e) for e in (3, 2, 1)]

    def taken(chosen: list[QuantSpec]) -> set[float]:
        cells = points(plain(measured(make_study(specs=chosen).wide)), LOSS)
        return set(one_exponent(cells, ["dtype", "bits"])["exponent_bits"])

    assert taken(specs) == {2}
    assert taken([specs[0], specs[2]]) == {3}
    assert taken([specs[2]]) == {1}


def test_a_table_holds_one_number_of_exponent_bits(study: Study) -> None:
    specs = [QuantSpec(bits=4, dtype="float", exponent_bits=e) for e in (3, 2)]
    wide = make_study(specs=specs).wide
    wide = wide[wide["key"] != "neox-m float4 e2 b64"]
    table = bits_by_dtype(wide, metric=LOSS)
    threes = [one(wide, model=m, exponent_bits=3)["jargon_loss"] for m in MODELS]
    assert table[("float", "value")].tolist() == threes


def test_only_the_metrics_own_eval_makes_its_value_diverged(study: Study) -> None:
    wide = study.wide.assign(status="diverged", jargon_status="done", jargon_choice_status="done")
    row = wide["key"] == "neox-s int4 b64"
    wide.loc[row, "jargon_status"] = "diverged"
    wide.loc[row, ["jargon_loss", "jargon_choice_acc"]] = np.nan
    wide.loc[row, "jargon_choice_status"] = None  # not planned there
    assert [m.eval for m in metric_columns(wide)] == [m.eval for m in metric_columns(study.wide)]
    loss = points(plain(measured(wide)), LOSS)
    assert one(loss, key="neox-s int4 b64")["value"] == np.inf
    assert loss["diverged"].sum() == 1
    accuracy = points(plain(measured(wide)), parse_metric("jargon_choice_acc"))
    assert "neox-s int4 b64" not in set(accuracy["key"])
    assert not accuracy["diverged"].any()
    by_cell = points(plain(measured(wide)), parse_metric("jargon_lastword_acc"))
    assert by_cell["diverged"].all()  # no column for that eval: the cell's status


def test_a_zero_shot_mean_that_was_not_measured_did_not_diverge(study: Study) -> None:
    mean = parse_metric("zero_shot_mean")
    wide = study.wide[study.wide["key"] == "neox-s int4 b64"].assign(status="diverged")
    assert points(plain(measured(wide)), mean)["value"].tolist() == [-np.inf]
    statuses = {f"{task}_status": "done" for task in ZERO_SHOT_TASKS}
    assert points(plain(measured(wide.assign(**statuses))), mean)["value"].tolist() == [-np.inf]
    assert points(plain(measured(wide.assign(**(statuses | {"piqa_status": None})))), mean).empty


@pytest.mark.parametrize(
    "odd",
    [
        {"outlier_fraction": 0.02},
        {"center": True},
        {"scheme": "group"},
        {"absmax_dtype": "nested"},
        {"subnormals": "bnb"},
    ],
)
def test_plain_cells_leave_out_what_the_main_results_hold_fixed(odd: dict[str, object]) -> None:
    plain_spec = QuantSpec(bits=4, dtype="float", exponent_bits=2)
    both = make_study(specs=[replace(plain_spec, **odd), plain_spec])
    found = plain(measured(both.wide))
    assert list(found["label"]) == [plain_spec.label] * 3


def test_a_cell_listed_by_two_sweeps_counts_once(study: Study) -> None:
    twice = pd.concat([study.wide, study.wide.assign(sweep="other")], ignore_index=True)
    assert len(points(plain(measured(twice)), LOSS)) == len(points(plain(measured(study.wide)), LOSS))


def test_two_checkpoints_of_one_name_are_told_apart(study: Study) -> None:
    other = study.wide.assign(key=study.wide["key"] + "!", revision="0123456789abcdef")
    both = pd.concat([study.wide, other], ignore_index=True)
    models = set(bits_by_dtype(both, metric=LOSS).index.get_level_values("model"))
    assert {"neox-s@neox-s", "neox-s@0123456"} <= models


def test_tables_of_nothing_and_of_baselines_only(study: Study) -> None:
    assert len(bits_by_dtype(study.wide.iloc[:0], metric=LOSS)) == 0
    assert len(bits_by_dtype(pd.DataFrame(), metric=LOSS)) == 0
    table = bits_by_dtype(study.wide[study.wide["bits"] == 16], metric=LOSS)
    assert list(table.columns.get_level_values("dtype").unique()) == ["16-bit"]
    no_base = bits_by_dtype(study.wide[study.wide["bits"] < 16], metric=LOSS)
    assert set(no_base.index.get_level_values("bits")) == set(range(3, 9))


@pytest.mark.parametrize("width", [60, 120])
def test_a_narrow_terminal_cuts_no_number(study: Study, width: int) -> None:
    out = StringIO()
    table = bits_by_dtype(study.wide, metric=LOSS)
    render(table, Console(file=out, width=width), metric=LOSS)
    value = table.loc[("neox-m", 3), ("quantile", "value")]
    assert f"{value:.3f} ± 0." in out.getvalue()
    assert "…" not in out.getvalue()
    assert "Loss on jargon (nats/token)" in out.getvalue()


def test_the_best_of_a_row_is_bold_in_markdown_with_the_metrics_direction(study: Study) -> None:
    for column, best in (("jargon_loss", np.argmin), ("jargon_lastword_acc", np.argmax)):
        table = bits_by_dtype(study.wide, metric=column)
        row = next(
            r for r in unpadded(to_markdown(table, metric=column)).splitlines() if r.startswith("| neox-m | 3 |")
        )
        values = table.loc[("neox-m", 3)].xs("value", level="field").to_numpy()
        assert row.split("|")[3 + int(best(values))].strip().startswith("**")


def test_written_tables_read_back(study: Study, tmp_path: Path) -> None:
    csv = pd.read_csv(write_table(study.wide, tmp_path / "new" / "t.csv"))
    np.testing.assert_allclose(csv["jargon_loss"], study.wide["jargon_loss"])
    parquet = pd.read_parquet(write_table(study.wide, tmp_path / "t.parquet"))
    pd.testing.assert_series_equal(parquet["blocksize"], study.wide["blocksize"])
    lines = unpadded(write_table(study.wide, tmp_path / "t.md").read_text(encoding="utf-8")).splitlines()
    assert len(lines) == 2 + len(study.wide)
    assert lines[0].startswith("| key | sweep |")
    assert {line.count("|") for line in lines} == {len(study.wide.columns) + 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "t.md", "t.parquet"]


def test_a_block_of_a_whole_row_is_row_in_markdown_and_a_number_in_csv(tmp_path: Path) -> None:
    df = pd.DataFrame({"label": ["a", "b", "c"], "blocksize": [-1, 64, None]}).astype({"blocksize": "Int64"})
    markdown = unpadded(write_table(df, tmp_path / "t.md").read_text(encoding="utf-8"))
    assert markdown.splitlines()[2:] == ["| a | row |", "| b | 64 |", "| c | |"]
    assert pd.read_csv(write_table(df, tmp_path / "t.csv"))["blocksize"].tolist()[:2] == [-1, 64]


AWKWARD = pd.DataFrame({"a_b": ["x|y", "50% & {3}", None], "n": [1.23456789, float("nan"), 2e-9]})


def test_what_markdown_and_latex_would_read_as_their_own_is_escaped(tmp_path: Path) -> None:
    markdown = unpadded(write_table(AWKWARD, tmp_path / "t.md").read_text(encoding="utf-8"))
    assert markdown.splitlines()[2:] == ["| x\\|y | 1.23457 |", "| 50% & {3} | |", "| | 2e-09 |"]
    latex = write_table(AWKWARD, tmp_path / "t.tex").read_text(encoding="utf-8").splitlines()
    assert latex[0] == r"% \usepackage{booktabs}"
    assert r"a\_b & n \\" in latex
    assert latex[latex.index(r"\midrule") + 1 : -2] == [r"x|y & 1.23457 \\", r"50\% \& \{3\} &  \\", r" & 2e-09 \\"]


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
def test_a_table_without_rows_has_its_heading(suffix: str, tmp_path: Path) -> None:
    written = write_table(AWKWARD.head(0), tmp_path / f"t{suffix}")
    assert b"n" in written.read_bytes()


def test_metrics_of_the_long_table_are_json_in_csv(study: Study, tmp_path: Path) -> None:
    csv = pd.read_csv(write_table(study.long, tmp_path / "long.csv"))
    assert json.loads(csv["metrics"][0]) == pytest.approx(study.long["metrics"][0])


@pytest.mark.parametrize("name", ["t.xlsx", "t"])
def test_an_unknown_table_format_is_refused_before_anything_is_written(
    study: Study,
    tmp_path: Path,
    name: str,
) -> None:
    with pytest.raises(SpecError, match=r"\.csv, \.parquet, \.md, \.tex"):
        write_table(study.wide, tmp_path / "new" / name)
    assert list(tmp_path.iterdir()) == []


def test_one_study_gives_no_mixture_warning(study: Study) -> None:
    assert mixture_warnings(study.long) == []
    assert mixture_warnings(pd.DataFrame()) == []


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("dataset", "sha256:other", "eval jargon mixes datasets"),
        ("limit", None, "eval jargon mixes limits: 12000 (128 measurements), none (1 measurement)"),
        ("compute_dtype", "float16", "eval jargon mixes compute dtypes"),
        ("revision", "abc", "model neox-xs mixes revisions: none"),
        ("weights_hash", "sha256:other", "model neox-xs mixes weights"),
    ],
)
def test_a_single_odd_measurement_is_flagged(study: Study, column: str, value: object, said: str) -> None:
    long = study.long.astype({"revision": "str"}).copy()
    long.loc[long.index[0], column] = value
    warnings = mixture_warnings(long)
    assert len(warnings) == 1
    assert warnings[0].startswith(said)
    long.loc[long.index[0], "status"] = "failed"
    assert mixture_warnings(long) == []


def test_different_limits_of_different_evals_are_no_mixture(study: Study) -> None:
    assert study.long["limit"].nunique() > 1
    assert not any("limit" in w for w in mixture_warnings(study.long))


def test_demo_specs_are_distinct() -> None:
    assert len(set(demo_specs())) == 43


def test_block_sizes_held_are_those_of_the_most_cells_first(study: Study) -> None:
    assert block_sizes_held(study.wide, metric=LOSS) == [64, 16, 256, 1024, 4096]
    whole = make_study(specs=[QuantSpec(bits=b, dtype="int", blocksize=None) for b in (3, 4)]).wide
    assert block_sizes_held(whole, metric=LOSS) == [None]
    assert block_sizes_held(study.wide.iloc[:0], metric=LOSS) == [64]


def test_a_table_of_whole_rows_has_the_groups_of_a_row(study: Study) -> None:
    wide = make_study(specs=[QuantSpec(bits=4, dtype="int"), QuantSpec(bits=4, dtype="int", blocksize=256)]).wide
    of_rows = wide["blocksize"] == 256
    wide["blocksize"] = wide["blocksize"].mask(of_rows, -1)
    wide["scheme"] = wide["scheme"].mask(of_rows, "group")
    table = bits_by_dtype(wide, metric=LOSS, blocksize=-1)
    assert table["int", "value"].tolist() == wide.loc[of_rows, "jargon_loss"].tolist()
    assert block_sizes_held(wide, metric=LOSS) == [64, -1]
    assert "Block size row. Loss on jargon" in to_markdown(table, metric=LOSS, blocksize=-1)
    assert set(other_cells(wide, metric=LOSS, blocksize=-1)["label"]) == {"int4 b64"}


def test_float_carries_its_exponent_bits(study: Study) -> None:
    text = unpadded(to_markdown(bits_by_dtype(study.wide, metric=LOSS), metric=LOSS))
    assert "| model | bits | int | float | dynamic | quantile |" in text
    row = {bits: next(x for x in text.splitlines() if x.startswith(f"| neox-s | {bits} |")) for bits in (16, 7, 4)}
    assert row[4].split("|")[4].strip(" *").endswith(" e2")
    assert row[7].split("|")[4].strip(" *").endswith(" e4")
    assert " e" not in row[16]
    alike = make_study(specs=[QuantSpec(bits=16), QuantSpec(bits=4, dtype="float", exponent_bits=3)]).wide
    assert "| float e3 |" in unpadded(to_markdown(bits_by_dtype(alike, metric=LOSS), metric=LOSS))


def test_files_of_a_study_have_each_text_and_task_at_each_block_size_and_its_warnings(
    study: Study, tmp_path: Path
) -> None:
    *_, text = write_tables(study.wide, tmp_path, name="demo", warnings=["it mixes limits"])
    captions = [line for line in text.read_text().splitlines() if line.startswith("Block size")]
    assert [c.partition(".")[0] for c in captions[:5]] == [f"Block size {b}" for b in (64, 16, 256, 1024, 4096)]
    for name in ("Loss on jargon", "Accuracy on jargon_lastword", "Accuracy on jargon_choice"):
        assert sum(name in c for c in captions) == 5
    assert text.read_text().endswith("- it mixes limits\n")
    kernels = study.wide.assign(kernel=["triton", *["torch"] * (len(study.wide) - 1)])
    parquet, csv, _ = write_tables(kernels, tmp_path, name="mixed")
    assert pd.read_csv(csv)["mixed"].dropna().tolist() == ["kernel=triton"]
    assert pd.read_parquet(parquet)["mixed"][0] == "kernel=triton"
