"""The notebook of the documents runs from its first cell to its last, on stored results, and keeps no outputs."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests import ROOT

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def run_cells(notebook: dict[str, Any]) -> dict[str, Any]:
    """Run code cells as a notebook does: one after another in one namespace, each showing its last expression."""
    names: dict[str, Any] = {"__name__": "notebook", "shown": []}
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, cell["id"], "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)
            names["shown"].append(value)
            assert repr(value)
    return names


def test_the_notebook_runs_on_stored_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "tests" / "data" / "earlier_results", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    names = run_cells(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    value = names["table"].loc[("neox-s", 4), ("jargon_loss", "int")].iloc[0]["value"]
    cells = names["cells"]
    is_cell = (cells["model"] == "neox-s") & (cells["bits"] == 4) & (cells["dtype"] == "int")
    assert value == cells.loc[is_cell, "jargon_loss"].item()
    assert "Loss on jargon (nats/token), lower is better" in capsys.readouterr().out
    assert len(names["ax"].get_legend().get_texts()) >= 2
    assert any(isinstance(shown, pd.Series) and len(shown) for shown in names["shown"])
    assert len(names["comparable"]) <= len(names["measurements"])


def test_the_notebook_is_of_the_format_that_others_read_and_has_no_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"]) > 10
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    assert NOTEBOOK.stat().st_size < 10_000
