"""What figures hold where it is asked for, what their files are named after, and which metrics they are of."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from analysis.figures import FIGURES, NoFigureError, missing_figures
from analysis.figures.one_shot import one_shot_chart
from analysis.figures.paper import PAPER
from analysis.figures.registry import file_stem
from analysis.metrics import parse_metric
from kbit.spec import QuantSpec
from tests.analysis.studies import MODELS, Study, make_study
from tests.analysis.test_paper import results


def several() -> pd.DataFrame:
    """Cells of two precisions, data types and block sizes, with and without outlier dimensions, two exponents, GPTQ."""
    plain = [
        QuantSpec(bits=bits, dtype=dtype, blocksize=block, exponent_bits=exponent, outlier_fraction=fraction)
        for bits in (3, 4, 6)
        for dtype, exponents in (("int", [None]), ("float", [1, 2]))
        for exponent in exponents
        for block in (64, 256, None)
        for fraction in (0.0, 0.02)
    ]
    two = {name: MODELS[name] for name in ("neox-xs", "neox-s")}
    wide = make_study(two, [QuantSpec(bits=16), *plain]).wide
    gptq = wide[(wide["dtype"] == "int") & wide["blocksize"].eq(64) & wide["outlier_fraction"].eq(0)]
    gptq = gptq.assign(key=gptq["key"] + " gptq", method="gptq", label="gptq " + gptq["label"], calibration="{}")
    wide = pd.concat([wide.assign(calibration=None), gptq], ignore_index=True)
    return wide.assign(zero_shot_mean=0.9 - wide["jargon_loss"] / 10, jargon_tokens_per_second_1=100 / wide["bits"])


ASKED = {"bits": 3, "blocksize": 256, "dtype": "int"}


@pytest.mark.parametrize("option", ASKED)
def test_a_figure_holds_what_its_file_is_named_after_and_passes_over_the_rest(option: str) -> None:
    wide = several()
    asked = replace(results(wide), **{option: ASKED[option]})  # type: ignore[arg-type]
    named = {"bits": "3bit", "blocksize": "b256", "dtype": "int"}[option]
    charts = 0
    for name, entry in PAPER.items():
        chart = entry.chart(asked.obeying(entry.obeys))
        cells = pd.concat(chart.panels.values()) if hasattr(chart, "panels") else chart.cells  # type: ignore[union-attr]
        cells = cells[cells["bits"] < 16]
        stem = file_stem(name, entry, asked)
        if option not in entry.obeys:
            assert named not in stem.split("-"), name
            continue
        assert named in stem.split("-"), name
        if name == "fig04_outlier_dimensions":
            cells = cells[~cells["panel"].str.contains(", none")]
            assert set(cells["panel"]) == {"NeoX, 3 bits"} if option == "bits" else len(set(cells["panel"])) > 1
            cells = cells[cells["outlier_fraction"] > 0]
        if name == "fig05_gptq" and option != "bits":
            cells = cells[cells["method"] == "blockwise"]  # GPTQ's have its own
        own = cells[option].astype(object) if option != "blocksize" else cells[option].astype(int)
        assert set(own) == {ASKED[option]}, name
        charts += 1
    assert charts >= 5


def test_figure_5_has_whole_tensors_where_they_are_asked_for_and_names_the_bits_without() -> None:
    of = replace(results(several()), blocksize=0)
    chart = one_shot_chart(of, gptq=True)
    beside = chart.cells[chart.cells["method"] == "blockwise"]
    assert len(beside) > 0
    assert beside["blocksize"].isna().all()
    with pytest.raises(NoFigureError, match=r"no cell of GPTQ at 5 bits$"):
        one_shot_chart(replace(of, bits=5), gptq=True)


@pytest.mark.parametrize(
    ("entry", "kept"), [("fig13_bit_scaling", "jargon_perplexity"), ("fig07_bit_scaling", "a_acc_norm")]
)
def test_what_is_drawn_of_a_metric_is_not_missing(study: Study, entry: str, kept: str) -> None:
    values = [c for c in study.wide.columns if c.startswith("jargon_")]
    wide = study.wide.drop(columns=values).assign(**{kept: study.wide["jargon_perplexity"]})
    metric = parse_metric(kept)
    assert FIGURES[entry].takes(metric)
    assert FIGURES[entry].reason(results(wide).with_metric(metric)) == ""
    assert entry not in {m.name for m in missing_figures(wide)}
