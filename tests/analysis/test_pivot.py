"""Pivots: any axes and metrics, nothing averaged in silence, what is missing or mixed marked, bad names refused."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from analysis.mixtures import mixed, mixture_warnings, with_mixed
from analysis.tables import pivot, pivot_markdown, plot, select, show, write_pivot
from analysis.tables.choosing import of_measurements
from kbit.errors import SpecError
from kbit.spec import QuantSpec
from tests.analysis.studies import MODELS, Study, diverge, make_study

PLAIN = {"blocksize": [64, None], "outlier_fraction": 0.0}


@pytest.fixture
def long(study: Study) -> pd.DataFrame:
    return study.long.copy()


def shown(table: pd.DataFrame) -> str:
    out = StringIO()
    show(table, Console(file=out, width=80))
    return out.getvalue()


def marked(long: pd.DataFrame, column: str, value: object, rows: list[int]) -> pd.DataFrame:
    found = long.assign(**{column: long.get(column)})
    found[column] = found[column].astype("object").mask(found.index.isin(rows), value)
    return found


@pytest.mark.parametrize("form", ["wide", "long"])
def test_each_value_of_a_pivot_is_that_of_its_cell(study: Study, form: str) -> None:
    table = pivot(select(getattr(study, form), PLAIN), metrics=["jargon_loss", "jargon_choice_acc"])
    assert table.index.names == ["model", "bits"]
    assert [*table.index] == [(m, b) for m in MODELS for b in (16, 8, 7, 6, 5, 4, 3)]
    cells = study.wide.set_index("key")
    for dtype, key in (("int", "neox-s int4 b64"), ("float e2", "neox-s float4 e2 b64")):
        found = table.loc[("neox-s", 4), "jargon_loss"][dtype]
        assert found["value"] == pytest.approx(cells.loc[key, "jargon_loss"])
        assert found["stderr"] == pytest.approx(cells.loc[key, "jargon_loss_stderr"])
        assert (found["status"], found["mixed"]) == ("done", "")
    base = table.loc[("neox-s", 16), "jargon_choice_acc"].xs("value", level="field")
    assert set(base) == {cells.loc["neox-s 16-bit", "jargon_choice_acc"]}
    assert {"float e2", "float e3", "float e4"} < set(table.columns.get_level_values("dtype"))


def test_cells_of_one_place_are_told_apart_by_what_differs_and_never_averaged(study: Study) -> None:
    table = pivot(study.wide, metrics=["jargon_loss"])
    assert table.index.names == ["model", "bits", "blocksize", "outlier_fraction"]
    values = table.xs("value", axis=1, level="field").drop(index=16, level="bits").to_numpy()
    quantized = study.wide[study.wide["bits"] < 16]
    assert sorted(values[~np.isnan(values)]) == sorted(quantized["jargon_loss"])
    assert "differ in blocksize, outlier_fraction: these axes were added to by=" in shown(table)
    by_label = pivot(study.wide, by=["model", "label"], columns=[], metrics=["jargon_loss"])
    assert len(by_label) == len(study.wide)
    assert by_label.attrs["notes"] == []


def test_any_axes_make_rows_and_columns(study: Study) -> None:
    chosen = select(study.long, {"bits": [3, 4], "outlier_fraction": 0.0, "dtype": ["int", "quantile"]})
    table = pivot(chosen, by=["dtype"], columns=["bits", "blocksize", "model"], metrics=["jargon_loss"])
    assert [*table.index.get_level_values(0)] == ["int", "quantile"]
    assert table.columns.get_level_values("blocksize").unique().tolist() == [16, 64, 256, 1024, 4096]
    tasks = pivot(select(study.long, PLAIN | {"bits": [16, 4]}), by=["eval", "model"], metrics=["acc"])
    assert tasks.columns.get_level_values("metric").unique().tolist() == ["acc"]
    assert set(tasks.index.get_level_values("eval")) == {"jargon_lastword", "jargon_choice"}
    assert "Accuracy, higher is better" in shown(tasks)
    specs = [QuantSpec(bits=4, dtype="int", blocksize=b) for b in (None, 16, 64)]
    both = make_study(specs=specs).wide
    both["blocksize"] = both["blocksize"].mask((both["blocksize"] == 16).fillna(False), -1)
    blocks = pivot(both, by=["blocksize"], columns=["model"], metrics=["jargon_loss"])
    assert blocks.index.tolist() == [64, "row", "whole tensor"]


def test_metrics_are_asked_by_column_name_evaluation_or_size(study: Study) -> None:
    def asked(*names: str) -> list[str]:
        table = pivot(study.long, by=["model", "label"], columns=[], metrics=names)
        return list(dict.fromkeys(table.columns.get_level_values("metric")))

    assert asked("acc") == ["jargon_lastword_acc", "jargon_choice_acc"]
    assert asked("jargon_choice", "total_bits") == ["jargon_choice_acc", "jargon_choice_acc_norm", "total_bits"]
    assert asked() == ["jargon_loss", "jargon_lastword_acc", "jargon_choice_acc"]


def test_the_zero_shot_mean_of_a_long_table_is_that_of_the_four_tasks(study: Study) -> None:
    tasks = {"lambada_openai": 0.5, "winogrande": 0.6, "hellaswag": 0.7, "piqa": 0.8}
    one = study.long.iloc[[0]]
    rows = [one.assign(eval=t, metrics=[{"acc": a}], stderr=[{"acc": 0.02}]) for t, a in tasks.items()]
    found = pivot(pd.concat(rows, ignore_index=True))["zero_shot_mean"].iloc[0]
    assert found["16-bit"]["value"] == pytest.approx(0.65)
    assert found["16-bit"]["stderr"] == pytest.approx(0.01)
    with pytest.raises(SpecError, match="zero_shot_mean"):
        pivot(pd.concat(rows[:3]), metrics=["zero_shot_mean"])


def test_what_diverged_or_is_not_there_is_marked(study: Study) -> None:
    wide = diverge(study, study.wide["key"] == "neox-s int3 b64").wide
    wide["status"] = wide["status"].mask(wide["key"] == "neox-s int4 b64", "failed")
    wide["jargon_loss"] = wide["jargon_loss"].mask(wide["key"] == "neox-s int4 b64")
    wide = wide[wide["key"] != "neox-s int5 b64"]
    chosen = select(wide, PLAIN | {"model": "neox-s"})
    table = pivot(chosen, metrics=["jargon_loss"])
    values = {b: table.loc[("neox-s", b), ("jargon_loss", "int")] for b in (3, 4, 5)}
    assert np.isposinf(values[3]["value"])
    assert [values[b]["status"] for b in (3, 4, 5)] == ["diverged", "failed", ""]
    text = re.sub(" {2,}", " ", pivot_markdown(table))
    for bits, said in ((3, "diverged"), (4, "failed"), (5, "-")):
        line = next(x for x in text.splitlines() if x.startswith(f"| neox-s | {bits} "))
        assert line.split("|")[3].strip() == said
    best = next(x for x in text.splitlines() if x.startswith("| neox-s | 3 "))
    assert best.count("**") == 2
    assert min(table.loc[("neox-s", 3)].xs("value", level="field")) == pytest.approx(
        float(best.split("**")[1].split(" ")[0]), abs=5e-4
    )


def test_replicates_are_their_mean_and_deviation(study: Study) -> None:
    cells = study.wide[study.wide["key"] == "neox-s int4 b64"]
    seeds = pd.concat(
        [cells.assign(key=str(s), calibration=json.dumps({"seed": s}), calibration_seed=s) for s in range(4)]
    ).reset_index(drop=True)
    seeds["jargon_loss"] = [4.0, 4.2, 4.4, np.nan]
    seeds["status"] = ["done", "done", "done", "missing"]
    table = pivot(seeds, metrics=["jargon_loss"])
    found = table.loc[("neox-s", 4), ("jargon_loss", "int")]
    assert found["value"] == pytest.approx(4.2)
    assert found["stderr"] == pytest.approx(0.2)
    assert "1 of the values are means of replicates" in shown(table)
    apart = pivot(seeds, by=["calibration_seed"], metrics=["jargon_loss"])
    assert len(apart) == 4


def test_rows_are_sorted_best_first_and_cut_at_top(study: Study) -> None:
    asked = {"by": ["model", "label"], "columns": []}
    losses = pivot(study.wide, **asked, metrics=["jargon_loss"], top=5)
    assert losses.iloc[:, 0].tolist() == sorted(study.wide["jargon_loss"])[:5]
    worst = pivot(study.wide, **asked, metrics=["jargon_loss"], sort=["-jargon_loss"], top=2)
    assert worst.iloc[:, 0].tolist() == sorted(study.wide["jargon_loss"], reverse=True)[:2]
    scores = pivot(study.wide, **asked, metrics=["jargon_choice_acc"], sort=["jargon_choice_acc"])
    assert scores.iloc[0, 0] == study.wide["jargon_choice_acc"].max()
    gone = study.wide.assign(jargon_loss=study.wide["jargon_loss"].mask(study.wide["bits"] == 16))
    for sort in ("jargon_loss", "-jargon_loss"):
        last = pivot(gone, **asked, metrics=["jargon_loss"], sort=[sort]).index[-3:]
        assert {label for _, label in last} == {"16-bit"}
    by_bits = pivot(study.wide, by=["bits", "model"], metrics=["jargon_loss"], sort=["-bits", "model"])
    assert by_bits.index.get_level_values("bits")[0] == 3
    assert "The first 5 of 129 rows." in shown(losses)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"by": ["modle"]}, "by='modle' is not valid: 'modle' is not an axis of this table. Did you mean model"),
        ({"columns": ["dtyp"]}, "columns='dtyp' is not valid"),
        ({"by": []}, "one axis at least"),
        ({"by": ["bits"], "columns": ["bits"]}, "named twice in by= and columns="),
        ({"metrics": ["jargon_los"]}, "metrics='jargon_los' is not valid.*Did you mean jargon_loss"),
        ({"sort": ["seconds"]}, "sort='seconds' is not valid.*an axis of the rows or a metric shown"),
        ({"top": 0}, "top=0 is not valid: a whole number of rows from 1"),
        ({"top": True}, "top=True is not valid"),
    ],
)
def test_what_a_table_does_not_have_is_refused_with_what_it_has(
    study: Study, asked: dict[str, object], said: str
) -> None:
    with pytest.raises(SpecError, match=said):
        pivot(study.wide, **asked)


def test_rows_are_chosen_by_axes_and_by_how_they_were_measured(study: Study) -> None:
    assert set(select(study.long, {"limit": 100})["eval"]) == {"jargon_lastword", "jargon_choice"}
    assert set(select(study.wide, {"blocksize": None})["key"].str.split().str[-1]) == {"16-bit"}
    assert set(select(study.wide, {"bits": ["3"]})["bits"]) == {3}
    for where, said in (
        ({"limt": 3}, "'limt' is not a column to choose by. Did you mean limit"),
        ({"bits": 33}, "bits is one of 16, 3, 4, 5, 6, 7, 8 there"),
        ({"mixed": True}, "nothing in this table differs"),
        ({"mixed": "kernel"}, "true .* or false"),
        ({"bits": 16, "dtype": "int"}, "none matches all of them"),
    ):
        with pytest.raises(SpecError, match=said):
            select(study.long, where)
    with pytest.raises(SpecError, match="'limit' is not a column to choose by"):
        select(study.wide, {"limit": 3})


@pytest.mark.parametrize(
    ("column", "most", "other", "said"),
    [
        ("kernel", "torch", "triton", "the table mixes kernels: torch (382 measurements), triton (2 measurements)"),
        ("versions", '{"a": "1", "torch": "2.13"}', '{"a": "1", "torch": "2.12"}', "package versions: torch 2.13 (385"),
        ("weights_hash", "sha256:" + "1" * 64, "sha256:" + "2" * 64, "mixes weights: sha256:111111111111 ("),
    ],
)
def test_mixed_provenance_is_warned_of_marked_in_the_table_and_left_out_if_asked(
    long: pd.DataFrame, column: str, most: str, other: str, said: str
) -> None:
    long[column] = most
    odd = marked(long, column, other, [0, 3])
    if column == "kernel":
        odd[column] = odd[column].mask(odd.index == 6)  # not recorded, as of a baseline
        odd[column] = odd[column].mask(odd.index.isin([7, 8]))
    [warning] = mixture_warnings(odd)
    assert said in warning
    assert (mixed(odd) != "").sum() == 2
    chosen = select(odd, {"model": "neox-xs"}) if column != "weights_hash" else odd
    text = shown(pivot(chosen, metrics=["jargon_loss"]))
    assert "[a]" in text
    assert f"[a] {column}=" in text
    kept = select(odd, {"mixed": False})
    assert len(kept) == len(odd) - 2
    assert mixture_warnings(kept) == []
    assert set(select(odd, {"mixed": True}).index) == {0, 3}
    if column == "versions":
        assert set(select(odd, {"versions": {"torch": "2.12"}}).index) == {0, 3}


def test_written_rows_say_what_is_mixed_and_lack_what_was_not_chosen(study: Study, long: pd.DataFrame) -> None:
    odd = marked(long, "limit", 50, [1])
    assert with_mixed(odd)["mixed"].tolist()[:3] == ["", "limit=50", ""]
    rows = of_measurements(study.wide, odd).set_index("key")
    key, name = odd.loc[1, ["key", "eval"]]
    assert rows.loc[key, "mixed"] == f"{name}: limit=50"
    assert (rows["mixed"] != "").sum() == 1
    left = of_measurements(study.wide, select(odd, {"mixed": False})).set_index("key")
    assert np.isnan(left.loc[key, f"{name}_acc"])
    assert left.loc[key, "jargon_loss"] == rows.loc[key, "jargon_loss"]
    assert "mixed" not in with_mixed(long)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "md", "tex", "html"])
def test_a_pivot_is_written_in_every_format(study: Study, tmp_path: Path, suffix: str) -> None:
    table = pivot(select(study.wide, PLAIN | {"bits": [16, 4]}), metrics=["jargon_loss"])
    path = write_pivot(table, tmp_path / "new" / f"t.{suffix}")
    value = table.loc[("neox-m", 4), ("jargon_loss", "int", "value")]
    if suffix in ("csv", "parquet"):
        read = pd.read_csv(path) if suffix == "csv" else pd.read_parquet(path)
        row = read[(read["model"] == "neox-m") & (read["bits"] == 4)].iloc[0]
        assert row["jargon_loss int"] == pytest.approx(value)
        assert row["jargon_loss int status"] == "done"
    else:
        text = path.read_text(encoding="utf-8")
        assert f"{value:.3f}" in text
        assert {"md": "| neox-m", "tex": r"\midrule", "html": "<!doctype html>"}[suffix] in text
        assert {"md": "±", "tex": r"$\pm$", "html": "±"}[suffix] in text
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_pivots_of_nothing_and_of_what_is_only_planned(study: Study, tmp_path: Path) -> None:
    assert "Nothing to show" in shown(pivot(study.wide.iloc[:0]))
    planned = study.long.assign(status="missing", metrics=[{}] * len(study.long), stderr=[{}] * len(study.long))
    assert "Nothing to show" in shown(pivot(planned))
    write_pivot(pivot(study.wide.iloc[:0]), tmp_path / "t.md")
    sizes = pivot(planned, by=["model", "label"], columns=[], metrics=["params"])
    assert sizes.xs("value", axis=1, level="field").iloc[0, 0] == MODELS["neox-xs"][0]


def test_a_plot_has_a_line_per_column_and_the_values_of_the_table(study: Study) -> None:
    table = pivot(select(study.wide, PLAIN | {"model": "neox-s"}), by=["bits"], metrics=["jargon_loss"])
    ax = plot(table)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == list(table.columns.get_level_values("dtype").unique())
    line = ax.containers[0].lines[0]
    values = table["jargon_loss"]["int"]["value"].dropna()
    assert dict(zip(*line.get_data(), strict=True)) == pytest.approx(values.to_dict())
    assert ax.get_ylabel() == "Loss on jargon (nats/token)"
    assert plot(table, ax=ax) is ax
    by_block = pivot(select(study.wide, {"model": "neox-s", "dtype": "int"}), by=["blocksize"], metrics=["jargon_loss"])
    assert plot(by_block).get_xlabel() == "blocksize"
    assert plot(by_block, x="bits").get_xlabel() == "bits"
    with pytest.raises(SpecError, match="x='dtype' is not valid"):
        plot(by_block, x="dtype")
    with pytest.raises(SpecError, match="metric='x' is not valid"):
        plot(table, metric="x")


@pytest.mark.slow
def test_350_000_measurements_are_laid_out_in_seconds(study: Study) -> None:
    import time

    models = pd.concat([study.long] * 910, ignore_index=True)
    copy = pd.Series(np.arange(len(models)) // len(study.long)).astype(str)
    models = models.assign(key=models["key"] + copy, model=models["model"] + copy, model_id=models["model_id"] + copy)
    start = time.perf_counter()
    table = pivot(models)
    assert table.xs("value", axis=1, level="field").notna().to_numpy().sum() > 350_000
    assert time.perf_counter() - start < 8
