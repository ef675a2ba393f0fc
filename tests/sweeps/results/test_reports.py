"""Reports of results directories: by study, of all, of several, damaged; and who makes the one of a study of jobs."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from analysis.__main__ import main
from analysis.report import Places
from sweeps import load_results
from sweeps.provenance import ROOT
from sweeps.results import finishing
from sweeps.results.finishing import finish_study
from sweeps.results.inputs import read_inputs
from sweeps.results.report import has_report, make_report
from sweeps.store.parts import Store
from sweeps.study.manifest import load_manifest

STORED = ROOT / "tests" / "data" / "earlier_results"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Five studies of an earlier version: one finished, others cut, failed or cancelled."""
    return Path(shutil.copytree(STORED, tmp_path / "results"))


def studies(out: Path, *, done: bool) -> list[Path]:
    """Manifests of studies of which nothing is missing, or something."""
    found = []
    for path in sorted((out / "manifests").glob("*.json")):
        states = set(load_results(out, sweep=load_manifest(path).sweep)["status"])
        if done is (states == {"done"}) and (done or "missing" in states):
            found.append(path)
    return found


def test_several_directories_are_one_and_a_measured_cell_counts_once(out: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(out, tmp_path / "half"))
    for part in [*half.glob("packs/*.parquet"), *half.glob("parts/*/*.parquet")][::2]:
        part.unlink()
    alone, joined = read_inputs([out]), read_inputs([half, out])
    assert (read_inputs([half]).df["status"] == "done").sum() < (alone.df["status"] == "done").sum()
    assert joined.df["key"].is_unique
    columns = ["key", "status"]
    ours, theirs = (df[columns].sort_values("key", ignore_index=True) for df in (joined.df, alone.df))
    done = theirs["status"].isin(["done", "diverged"])
    assert done.any()
    assert (ours.loc[done, "status"] == theirs.loc[done, "status"]).all()
    measurement = alone.long.loc[alone.long["status"] == "done", "measurement"].iloc[0]
    assert joined.read_samples([measurement]).keys() == {measurement}


def test_a_study_or_all_of_a_directory(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = load_manifest(studies(out, done=True)[0])
    assert main(["report", str(out), "--study", study.sweep]) == 0
    page = (out / "reports" / f"{study.sweep}.html").read_text()
    assert f"<title>{study.sweep}</title>" in page
    cells = len(load_results(out, sweep=study.sweep))
    assert f"{cells} of {cells} cells measured" in page
    assert str(out / "reports" / f"{study.sweep}.html") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("nothing", "is no directory: name one that a study wrote"),
        ("empty", "holds no study"),
        ("damaged manifest", "is damaged"),
        ("other study", "holds no study named 'other'; it holds "),
    ],
)
def test_what_holds_no_results_is_one_message(
    out: Path, capsys: pytest.CaptureFixture[str], made: str, said: str
) -> None:
    if made in ("nothing", "empty"):
        shutil.rmtree(out)
    if made == "empty":
        out.mkdir()
    if made == "damaged manifest":
        next((out / "manifests").glob("*.json")).write_text("{")
    assert main(["report", str(out), *(["--study", "other"] if made == "other study" else [])]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.startswith("error: ")
    assert not captured.out


def test_damaged_parts_are_missing_and_the_rest_is_reported(out: Path, tmp_path: Path) -> None:
    before = (load_results(out, long=True)["status"] == "done").sum()
    first = sorted([*out.glob("packs/*.parquet"), *out.glob("parts/*/*.parquet")])[0]
    first.write_bytes(first.read_bytes()[:100])
    assert main(["report", str(out), "--to", str(tmp_path / "report"), "--page-only"]) == 0
    assert 0 < (load_results(out, long=True)["status"] == "done").sum() < before
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Not measured" in page
    assert f"{first} is damaged and left out" in page


def test_all_files_of_a_report_are_the_groups_in_a_directory_that_a_group_shares(out: Path) -> None:
    out.chmod(0o2770)
    inputs = read_inputs([out], sweep=load_manifest(studies(out, done=True)[0]).sweep)
    before = os.umask(0o077)
    try:
        make_report(inputs, Places.of_study(out, inputs.name), paper=True)
    finally:
        os.umask(before)
    made = [p for name in ("reports", "figures", "tables") for p in (out / name).rglob("*")]
    assert {p.suffix for p in made} >= {".html", ".png", ".svg", ".pdf", ".csv"}
    private = [p for p in made if p.stat().st_mode >> 3 & 0o6 != 0o6]
    assert not private


def test_a_report_is_of_the_rows_that_it_was_made_of_whatever_the_clocks_say(out: Path) -> None:
    manifest, store = load_manifest(studies(out, done=True)[0]), Store(out=out)
    places = Places.of_study(out, manifest.sweep)
    assert not has_report(store, manifest)
    make_report(read_inputs([out], manifest=manifest), places)
    os.utime(places.page, (0, 0))
    assert has_report(store, manifest)
    dropped = store.read(["row_id"], measurements={m.key for m in manifest.measurements()}).column("row_id")[0].as_py()
    store.drop([dropped], "wrong")
    assert not has_report(store, manifest)
    store.undo_drop()
    assert has_report(store, manifest)
    places.page.unlink()
    assert not has_report(store, manifest)


def test_of_all_jobs_that_see_a_study_whole_one_makes_its_report(out: Path) -> None:
    path, store = studies(out, done=True)[0], Store(out=out)
    late = finish_study(store, path.stem, code=str(ROOT), until=time.time() + 20)
    assert late is not None
    assert late.endswith(" s of the walltime are left: too few for a report; mode=report writes it")
    until = time.time() + 1000
    first, second = (finish_study(store, path.stem, code=str(ROOT), until=until) for _ in range(2))
    page = out / "reports" / f"{load_manifest(path).sweep}.html"
    assert first is not None
    assert first.endswith(f"report: {page}")
    assert second is None
    assert page.exists()


def test_a_study_that_is_not_whole_has_no_report_yet(out: Path) -> None:
    cut = studies(out, done=False)[0]
    assert finish_study(Store(out=out), cut.stem, code=str(ROOT), until=time.time()) is None
    assert not (out / "reports").exists()


def test_a_report_that_takes_too_long_or_fails_is_a_warning(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, store, until = studies(out, done=True)[0].stem, Store(out=out), time.time() + 1000
    with monkeypatch.context() as short:
        short.setattr(finishing, "REPORT_SECONDS", 0.01)
        said = finish_study(store, name, code=str(ROOT), until=until)
    assert said == "warning: no report within 0 s; mode=report writes it"
    shutil.rmtree(out / "reports")
    monkeypatch.setattr(finishing, "_env", lambda code: {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(out)})
    (out / "figures").write_text("a file where a directory has to be")
    said = finish_study(store, name, code=str(ROOT), until=until)
    assert said is not None
    assert said.startswith("warning: no report (")
    assert finish_study(store, "no-such-manifest", code="", until=until) is not None
