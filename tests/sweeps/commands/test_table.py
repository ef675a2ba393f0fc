"""mode=table: what it shows and writes is what is stored, by the axes, metrics and rows that were asked for."""

from __future__ import annotations

import shutil
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from analysis.tables import pivot
from analysis.tables.showing import flat
from sweeps import load_results
from sweeps.commands.table import table
from sweeps.config import register
from sweeps.errors import UserError
from sweeps.options import Options
from tests import ROOT


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "tests" / "data" / "earlier_results", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ask(*overrides: str) -> str:
    """The mode's text for a command line."""
    register()
    given = ["mode=table", *overrides]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        options = Options.from_config(compose("config", given), given)
    console = Console(width=200, record=True, file=StringIO())
    assert table(options, console) == 0
    return console.export_text()


def test_results_are_shown_by_what_is_asked(home: Path) -> None:
    results = load_results("results")
    done = results[results["status"] == "done"].iloc[0]
    loss = next(c for c in results if c.endswith("_loss"))
    text = ask("by=[model,label]", "columns=[]", f"metrics=[{loss}]", "status=done")
    assert f"{done[loss]:.3f} ± {done[loss + '_stderr']:.3f}" in text
    assert not Path("results/table.csv").exists()
    best = results[results["status"] == "done"].sort_values(loss).iloc[0]
    first = ask("by=[label]", "columns=[model]", f"metrics=[{loss}]", "status=done", "top=1")
    assert f"{best[loss]:.3f}" in first
    assert str(done["host"]) in ask("by=[model,host]")
    assert f"{done['seconds']:.1f}" in ask("by=[model,label]", "metrics=[seconds]")
    assert "The first 1 of" in first


def test_without_keys_a_table_is_shown_and_all_rows_are_written(home: Path) -> None:
    text = ask()
    assert "lower is better" in text
    assert "results/table.csv" in text
    assert set(pd.read_csv("results/table.csv")["key"]) == set(load_results("results")["key"])
    assert "table.csv" not in ask("to=-")


def test_what_is_shown_can_be_written(home: Path) -> None:
    for name in ("new/t.csv", "t.parquet", "t.md", "t.tex", "t.html"):
        assert name in ask("by=[model,label]", "columns=[]", "metrics=[loss]", f"to={name}")
    read = pd.read_csv("new/t.csv")
    whole = pivot(load_results("results", long=True), by=["model", "label"], columns=[], metrics=["loss"])
    pd.testing.assert_frame_equal(pd.read_parquet("t.parquet"), flat(whole), check_dtype=False)
    assert len(read) == len(pd.read_parquet("t.parquet")) == len(load_results("results"))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["by=[modle]"], "by='modle' is not valid.*Did you mean model.*There are: .*, host,"),
        (["by=[bits]", "columns=[status]"], "columns='status' is not valid.*There are: .*, host,"),
        (["columns=[dtyp]"], "columns='dtyp' is not valid"),
        (["metrics=[los]"], "metrics='los' is not valid.*Did you mean loss.*There are: .*, seconds"),
        (["sort=x"], "sort='x' is not valid"),
        (["top=0"], "top=0 is not valid"),
        (["where={limt: 3}"], "'limt' is not an axis; Did you mean limit"),
        (["where={kernel: none_such}"], "kernel is one of"),
        (["top=1", "to=t.xlsx"], "t.xlsx.*\\.html"),
        (["long=true", "top=1"], "long=true writes a row per measurement"),
    ],
)
def test_what_can_not_be_shown_is_refused_by_name(home: Path, asked: list[str], said: str) -> None:
    with pytest.raises((UserError, ValueError), match=said):
        ask(*asked)
    assert sorted(p.name for p in home.iterdir()) == ["results"]
