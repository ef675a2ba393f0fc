"""A report of any results: whatever is there is shown, whatever is wrong is said, and nothing ends in a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.inputs import Inputs
from analysis.references import references
from analysis.report import Places, build_report, report_of, write_report
from analysis.report.encoding import key_column, log_column, name_column, number_column
from analysis.report.page import page
from kbit.spec import QuantSpec
from tests.analysis.studies import Study, make_study


@pytest.fixture(scope="module")
def study() -> Study:
    """A third of the demo's cells: what each part of a report needs, and no more to draw and to judge."""
    block = [QuantSpec(bits=bits, dtype=dtype) for bits in (3, 4, 5, 8) for dtype in ("int", "quantile")]
    sizes = [QuantSpec(bits=4, dtype=dtype, blocksize=size) for dtype in ("int", "quantile") for size in (16, 1024)]
    return make_study(specs=[QuantSpec(bits=16), *block, *sizes])


def head_of(text: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(text.split('id="report-head">')[1].split("</script>")[0])
    return found


def some(study: Study, keep: pd.Series) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells of a study that a mask keeps."""
    wide = study.wide[keep.to_numpy()]
    return wide, study.long[study.long["key"].isin(wide["key"])]


def test_nothing_measured_says_what_to_run(study: Study) -> None:
    planned = study.wide.assign(status="missing")
    values = [c for c in planned.columns if c.startswith("jargon")]
    planned[values] = np.nan
    report = build_report(planned, study.long.assign(status="missing"), title="demo")
    assert report.summary.startswith(f"Nothing is measured yet: {len(planned)} cells are planned. mode=run")
    assert head_of(page(report))["count"] == 0


def test_an_empty_table_is_a_report(study: Study) -> None:
    report = build_report(study.wide.iloc[:0], study.long.iloc[:0], title="demo")
    assert "no cell is planned" in report.summary
    assert "could not be made" not in page(report)


def test_a_part_of_a_study_says_what_is_missing(study: Study) -> None:
    wide = study.wide.copy()
    left = (wide["model"] == "neox-m") & (wide["bits"] != 4)
    wide.loc[left, "status"] = "missing"
    wide.loc[left, [c for c in wide.columns if c.startswith("jargon") and not c.endswith("_status")]] = np.nan
    report = build_report(wide, study.long, title="demo")
    assert f"{(~left).sum()} of {len(wide)} cells measured" in report.summary
    missing = next(s for s in report.sections if s.anchor == "missing")
    assert missing.tables[0].frame.values.tolist() == [["neox-m", "missing", int(left.sum())]]
    assert "neox-m" in missing.intro


@pytest.mark.parametrize("which", ["one model", "no baseline", "one cell", "all diverged", "no metric but accuracy"])
def test_unusual_results_have_a_page_without_failed_parts(study: Study, which: str, tmp_path: Path) -> None:
    wide, long = study.wide.copy(), study.long
    if which == "one model":
        wide, long = some(study, wide["model"] == "neox-s")
    elif which == "no baseline":
        wide, long = some(study, wide["bits"] != 16)
    elif which == "one cell":
        wide, long = some(study, wide["key"] == "neox-s int4 b64")
    elif which == "all diverged":
        wide["status"] = "diverged"
        wide[[c for c in wide.columns if c.startswith("jargon_loss") or c == "jargon_perplexity"]] = np.nan
    else:
        wide = wide.drop(columns=[c for c in wide.columns if c.startswith("jargon_") and "choice" not in c])
    report = build_report(wide, long, title="demo")
    files, problems = write_report(report, tmp_path)
    assert not problems
    assert not [w for w in report.warnings if "could not be made" in w]
    assert files[0] == tmp_path / "index.html"
    assert head_of(files[0].read_text())["count"] == len(wide)


def test_published_scores_stand_beside_those_that_were_measured(study: Study) -> None:
    known = references()[lambda d: (d["metric"] == "perplexity") & d["cell"].map(lambda c: c is not None)].iloc[0]
    long = study.long[study.long["key"] == "neox-s 16-bit"].head(1)
    assert known["cell"]["bits"] == 16
    about = {"eval": known["eval"], "model_id": known["model"], "params": known["params"], "method": "baseline"}
    long = long.assign(**about, metrics=[{"perplexity": 2 * known["reference"]}])
    report = build_report(study.wide, long, title="demo")
    assert not [w for w in report.warnings if "could not be made" in w]
    (table,) = next(s for s in report.sections if s.anchor == "references").tables
    assert set(table.frame["verdict"]) <= {"off", "unknown"}
    assert known["reference"] in set(table.frame["reference"])
    assert str(known["paper"]) in page(report)


def test_mixed_results_are_warned_of_first(study: Study) -> None:
    long = study.long.assign(limit=pd.array([100, 200] * (len(study.long) // 2) + [100] * (len(study.long) % 2)))
    text = page(build_report(study.wide, long, title="demo"))
    assert text.index("mixes limits") < text.index('id="findings"')


def test_a_part_that_fails_costs_a_warning_and_not_the_others(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("analysis.findings.findings", broken)
    monkeypatch.setattr("analysis.figures.save_figures", broken)
    report = build_report(study.wide, study.long, title="demo")
    files, problems = write_report(report, tmp_path)
    assert problems == ["figures: could not be made (ZeroDivisionError: planted)"]
    text = files[0].read_text()
    assert "findings: could not be made (ZeroDivisionError: planted)" in text
    assert head_of(text)["count"] == len(study.wide)
    assert {p.name for p in files} == {"index.html", "demo.parquet", "demo.csv", "demo.md"}


def test_a_report_lies_in_its_study_and_links_what_lies_beside_it(study: Study, tmp_path: Path) -> None:
    inputs = Inputs(
        name="demo", title="demo", df=study.wide, long=study.long, read_samples=lambda _: {}, notes=["a note"]
    )
    files, problems = write_report(report_of(inputs), Places.of_study(tmp_path, "demo"))
    assert not problems
    assert files[0] == tmp_path / "reports" / "demo.html"
    text = files[0].read_text()
    assert "a note" in text
    assert 'href="../figures/demo/bit_scaling.png"' in text
    assert 'href="../tables/demo.csv"' in text
    assert all((files[0].parent / p).exists() for p in ("../figures/demo/bit_scaling.png", "../tables/demo.csv"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_papers_figures_and_tables_are_written_when_asked_for(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.paper.PAPER", ["fig03_data_types"])  # the others take seconds each
    wide = study.wide[study.wide["bits"].isin([4, 16]) & (study.wide["blocksize"].fillna(64) == 64)]
    inputs = Inputs(name="demo", title="demo", df=wide, long=study.long, read_samples=lambda _: {})
    files, problems = write_report(report_of(inputs), Places.of_study(tmp_path, "demo"), paper=inputs)
    assert not problems
    paper = tmp_path / "figures" / "demo" / "paper"
    for width in ("one_column", "two_columns"):
        made = {p.name for p in (paper / width).iterdir()}
        assert {f"fig03_data_types-jargon_loss.{kind}" for kind in ("pdf", "svg", "png")} <= made
        assert f'href="../figures/demo/paper/{width}/fig03_data_types-jargon_loss.pdf"' in files[0].read_text()


def test_columns_take_the_width_that_they_need() -> None:
    constant = number_column("x", [1.5] * 100, 0.1)
    assert constant.head["width"] == 1
    assert constant.compressed < 20
    assert number_column("x", [0.0, 1e12], 1e-9).head["width"] <= 5  # coarser steps, where the range needs them
    assert log_column("x", [0.0, -1.0, np.nan, 1.0]).planes[:3] == b"\0\0\0"
    names = name_column("x", pd.Series(["b", None, "a", "b"]), ["a"])
    assert names.head["values"] == ["a", "b"]
    assert key_column("k", pd.Series(["0a1b", "ff00"]), 4).planes == bytes([0x0A, 0xFF, 0x1B, 0x00])


def test_a_numeric_column_reads_back_within_half_a_step() -> None:
    rng = np.random.default_rng(0)
    values = np.where(rng.random(500) < 0.1, np.nan, rng.normal(3, 1, 500))
    column = number_column("x", values, 1e-3)
    planes = np.frombuffer(column.planes, np.uint8).reshape(column.head["width"], 500).astype(np.int64)
    whole = sum(plane << (8 * i) for i, plane in enumerate(planes))
    if column.head["delta"]:
        whole = np.cumsum(np.where(whole % 2, -(whole + 1) // 2, whole // 2))
    found = np.where(whole > 0, (whole - 1 + column.head["least"]) * column.head["step"], np.nan)
    np.testing.assert_allclose(found, values, atol=0.5001e-3)
