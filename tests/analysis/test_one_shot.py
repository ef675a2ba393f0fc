"""The figure of one-shot methods: a curve for each quantization, with replicates as one point."""

from __future__ import annotations

import logging

import pandas as pd
import pytest

from analysis.figures import FIGURES, Results
from analysis.figures.one_shot import one_shot_scaling
from tests.analysis.test_figures import curves, written
from tests.analysis.test_replicates import LOSS, study


def by_row(wide: pd.DataFrame) -> pd.DataFrame:
    """The cells that calibrate once more, with a scale per row and half a nat more."""
    gptq = wide[wide["method"] == "gptq"]
    rows = gptq.assign(key=gptq["key"] + " row", blocksize=-1, scheme="group")
    rows = rows.assign(jargon_loss=gptq["jargon_loss"] + 0.5, label="gptq int4 row, seed 0")
    return pd.concat([wide, rows], ignore_index=True)


def test_each_quantization_is_a_curve_whatever_its_method_and_blocks() -> None:
    wide = by_row(study({0: 3.5, 1: 3.7}))
    fig = one_shot_scaling(wide, LOSS)
    assert fig is not None
    drawn = curves(fig.axes[0])
    assert list(drawn) == ["16-bit", "int4 b64", "gptq int4 b64", "gptq int4 row"]
    assert drawn["gptq int4 b64"][1] == pytest.approx([3.6] * 3)
    assert drawn["gptq int4 row"][1] == pytest.approx([4.1] * 3)
    assert "over 2 seeds of the calibration data" in written(fig)


def test_figure_5_leaves_out_blocks_where_there_are_more_curves_than_can_be_told_apart() -> None:
    wide = by_row(study({0: 3.5}))
    wide = wide.assign(dtype=wide["dtype"].mask(wide["method"] == "blockwise", "float"))
    gptq = wide[(wide["method"] == "gptq") & (wide["blocksize"] == 64)]
    more = [
        gptq.assign(key=gptq["key"] + f" {n}", blocksize=n, label=f"gptq int4 b{n}, seed 0")
        for n in (16, *range(128, 1024, 128))
    ]
    fig = FIGURES["fig05_gptq"].draw(
        Results(df=pd.concat([wide, *more], ignore_index=True), metrics=[LOSS], sweep=None, samples=None)
    )
    assert fig is not None
    assert set(curves(fig.axes[0])) == {"16-bit", "int4 b64", "gptq int4 b64", "gptq int4 row"}


def test_it_is_drawn_where_something_calibrates_and_curves_can_be_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    def draw(wide: pd.DataFrame) -> object:
        return FIGURES["one_shot"].draw(Results(df=wide, metrics=[LOSS], sweep=None, samples=None))

    with caplog.at_level(logging.INFO):
        assert draw(study({})) is None
    assert "none of the cells calibrates" in caplog.text
    wide = study({0: 3.5})
    assert draw(wide) is not None
    with caplog.at_level(logging.INFO):
        assert draw(wide.assign(jargon_loss=wide["jargon_loss"].mask(wide["method"] == "gptq"))) is None
    assert "no cell that calibrates has jargon_loss" in caplog.text
    plain = wide[wide["method"] == "blockwise"]
    many = [plain.assign(key=plain["key"] + f" {n}", label=f"int4 b{n}", blocksize=n) for n in range(8)]
    assert draw(pd.concat([wide, *many], ignore_index=True)) is None
    assert "no figure of one-shot methods: 10 quantizations have jargon_loss" in caplog.text
