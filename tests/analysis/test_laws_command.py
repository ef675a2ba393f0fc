"""python -m analysis laws and its figure: what they show, and what is said where nothing can be fitted."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from analysis.figures.laws import scaling_laws
from analysis.figures.results import NoFigureError, Results
from analysis.figures.sheet import caption
from analysis.inputs import Inputs
from analysis.metrics import parse_metric
from analysis.scaling.command import add_arguments, run
from tests.analysis.studies import Study, diverge


def inputs(study: Study, df: pd.DataFrame | None = None) -> Inputs:
    keys = {f"{key}|{name}": (key, name) for key, name in study.samples}

    def read(measurements: Sequence[str]) -> dict[str, Any]:
        return {m: study.samples[keys[m]] for m in measurements if m in keys}

    wide = study.wide if df is None else df
    return Inputs(name="demo", title="demo", df=wide, long=study.long, read_samples=read)


def results(df: pd.DataFrame, columns: int | None = None) -> Results:
    return Results(df=df, metrics=[parse_metric("jargon_loss")], sweep=None, samples=None, columns=columns)


def ask(given: Inputs, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(["--draws", "5", *arguments]), given)


def test_laws_are_printed_and_all_tables_written(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(inputs(study), "--to", str(tmp_path / "new")) == 0
    said = capsys.readouterr().out
    assert said.startswith("Loss on jargon; float, block size 64.")
    for law in ("parallel curves", "bivariate power law", "effective parameters", "Ouyang et al.", "Kumar et al."):
        assert f"\nneox, {law}" in said
    assert "cells of neox-m, left out of the fit" in said
    assert "parallel: F test p =" in said
    written = {path.stem: pd.read_csv(path) for path in (tmp_path / "new").glob("*.csv")}
    assert set(written) == {"laws", "law_parameters", "effective_parameters", "best_by_budget", "pareto"}
    assert len(written["laws"]) == 5
    assert [path.name for path in (tmp_path / "new").glob("*.png")] == ["scaling_laws.png"]
    # Samples were found, so that the best precision has its confidence over texts.
    assert written["best_by_budget"]["confidence"].notna().any()
    assert set(written["best_by_budget"]["windows"]) == {24}


def test_a_metric_data_type_and_block_size_can_be_asked_for(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(inputs(study), "--metric", "jargon_choice_acc", "--dtype", "int", "--blocksize", "16") == 0
    said = capsys.readouterr().out
    assert said.startswith("Accuracy on jargon_choice; int, block size 16.")
    assert "a law of losses; jargon_choice_acc is none" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--metric", "jargon_los"], "under --metric jargon_los; there are jargon_loss,"),
        (["--blocksize", "7"], "no law: no block-wise cell of one data type and block size has jargon_loss"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(
    study: Study, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(inputs(study), *arguments) == 0
    assert said in capsys.readouterr().out


def test_a_directory_without_results_has_no_law(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(inputs(study, study.wide.iloc[:0])) == 0
    assert capsys.readouterr().out.startswith("no law: ")


def test_the_figure_has_a_row_per_family_and_says_what_is_not_drawn(study: Study) -> None:
    three = study.wide["key"][(study.wide["bits"] == 3) & (study.wide["model"] == "neox-xs")]
    found = scaling_laws(results(diverge(study, study.wide["key"].isin(three)).wide)).draw()
    left, right = found.axes
    assert left.get_title(loc="left") == "NeoX"
    assert [t.get_text() for t in right.get_legend().get_texts()] == ["neox-xs", "neox-s", "neox-m"]
    # A line for each of 3 to 8 and 16 bits, and as many series of markers.
    assert len(left.lines) == 14
    notes = " ".join(text.get_text() for text in found.texts)
    assert "1 diverged cells are not drawn" in " ".join(notes.split())
    with pytest.raises(NoFigureError, match="two precisions with two models each"):
        scaling_laws(results(study.wide[study.wide["bits"] == 16]))


@pytest.mark.parametrize(("columns", "inches"), [(1, 3.25), (2, 6.75)])
def test_the_figure_is_as_wide_as_columns_of_a_page_with_a_caption(study: Study, columns: int, inches: float) -> None:
    found = scaling_laws(results(study.wide, columns=columns)).draw()
    assert found.get_size_inches()[0] == inches
    assert found.texts == []
    title, notes = caption(found)
    assert title == "Scaling laws of loss on jargon (float, block size 64)"
    assert notes.startswith("Lines, above: ")
    found.draw_without_rendering()
    renderer = FigureCanvasAgg(found).get_renderer()
    for box in [found.legends[0].get_window_extent(renderer), *(ax.get_tightbbox(renderer) for ax in found.axes)]:
        assert box.x0 >= found.bbox.x0 - 1
        assert box.x1 <= found.bbox.x1 + 1
        assert box.y0 >= found.bbox.y0 - 1
        assert box.y1 <= found.bbox.y1 + 1


def test_the_figure_is_of_the_data_type_and_blocks_that_were_asked_for(study: Study, tmp_path: Path) -> None:
    from PIL import Image

    assert ask(inputs(study), "--dtype", "int", "--blocksize", "16", "--to", str(tmp_path)) == 0
    with Image.open(tmp_path / "scaling_laws.png") as image:
        assert image.info["Title"] == "Scaling laws of loss on jargon (int, block size 16)"
