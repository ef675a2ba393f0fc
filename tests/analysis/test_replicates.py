"""Replicates: cells that differ in the seed of their calibration data are one point with their spread."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from analysis.figures import methods, write_figures
from analysis.metrics import parse_metric
from analysis.replicates import pool, replicate_groups
from kbit.spec import QuantSpec
from tests.analysis.studies import MODELS, make_study
from tests.analysis.test_figures import curves, written

LOSS = parse_metric("jargon_loss")
INT4 = [QuantSpec(bits=16), QuantSpec(bits=4, dtype="int"), QuantSpec(bits=4, dtype="int", scheme="group")]


def study(seeds: dict[int, float], models: tuple[str, ...] = tuple(MODELS)) -> pd.DataFrame:
    """A study of blockwise and, once for each seed, of a method that calibrates and loses so many nats."""
    wide = make_study(models={m: MODELS[m] for m in models}, specs=INT4[:2]).wide
    wide["calibration"] = wide["calibration_seed"] = None
    plain = wide[wide["bits"] == 4]
    made = [wide]
    for seed, loss in seeds.items():
        about = json.dumps({"dataset": "d", "samples": 4, "seed": seed})
        named = plain.assign(method="gptq", calibration=about, calibration_seed=seed, jargon_loss=loss)
        made.append(named.assign(key=plain["key"] + f" gptq {seed}", label=f"gptq int4 b64, seed {seed}"))
    return pd.concat(made, ignore_index=True)


def points_of(values: list[float], **columns: object) -> pd.DataFrame:
    count = len(values)
    about = {"key": [f"k{i}" for i in range(count)], "value": values, "stderr": [0.5] * count, "diverged": False}
    return pd.DataFrame({**about, **columns})


def test_replicates_are_their_mean_with_their_standard_deviation() -> None:
    cells = points_of([3.0, 3.3, 3.6, 9.0])
    pooled = pool(cells, pd.Series(["a", "a", "a", "b"], index=cells["key"]))
    assert pooled["key"].tolist() == ["k0", "k3"]
    assert pooled["value"].tolist() == pytest.approx([3.3, 9.0])
    assert pooled["stderr"].tolist() == pytest.approx([0.3, 0.5])  # of one cell its evaluation's stays
    assert pooled["replicates"].tolist() == [3, 1]


def test_a_replicate_that_diverged_is_not_averaged_away() -> None:
    cells = points_of([3.0, np.inf], diverged=[False, True])
    (pooled,) = pool(cells, pd.Series(["a", "a"], index=cells["key"])).to_dict("records")
    assert pooled["value"] == np.inf
    assert pooled["diverged"] is True
    assert np.isnan(pooled["stderr"])


def test_only_the_seed_makes_a_replicate() -> None:
    wide = study({0: 3.0, 1: 3.1}, models=("neox-s",))
    groups = replicate_groups(wide)
    assert groups[wide["method"] == "gptq"].nunique() == 1
    assert groups.nunique() == 3
    others = wide[wide["method"] == "gptq"]
    more = others.assign(calibration=[json.dumps({"dataset": "d", "samples": n, "seed": 0}) for n in (4, 8)])
    assert replicate_groups(more).nunique() == 2
    for axis, value in (("outlier_fraction", 0.02), ("model", "neox-m"), ("dtype", "float"), ("method", "awq")):
        column = [others[axis].iloc[0], value]
        assert replicate_groups(others.assign(**{axis: column})).nunique() == 2, axis


def bars(ax: Axes) -> list[float]:
    """Half the heights of a panel's error bars."""
    segments = [s for c in ax.collections for s in c.get_segments()]
    return sorted({round(abs(float(s[1][1] - s[0][1])) / 2, 6) for s in segments})


def test_the_figure_of_methods_has_one_point_with_a_bar_for_all_seeds() -> None:
    wide = study({0: 3.5, 1: 3.6, 2: 3.7})
    fig = methods(wide, LOSS)
    assert fig is not None
    drawn = curves(fig.axes[0])
    assert list(drawn) == ["blockwise", "gptq"]
    assert drawn["gptq"][1] == pytest.approx([3.6] * 3)
    assert len(drawn["blockwise"][1]) == 3
    assert 0.1 in bars(fig.axes[0])
    assert 0.1 in bars(fig.axes[1])  # of the change from 16-bit too
    assert "Replicates: mean ± 1 standard deviation over 3 seeds of the calibration data." in written(fig)
    single = methods(study({0: 3.5}), LOSS)
    assert single is not None
    assert "Replicates" not in written(single)


def test_methods_without_a_data_type_are_named_below_the_figure_or_with_why_there_is_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def with_formats(wide: pd.DataFrame) -> pd.DataFrame:
        four = wide[(wide["bits"] == 4) & (wide["method"] == "blockwise")]
        others = [
            four.assign(method=m, dtype=None, blocksize=b, scheme=None, key=four["key"] + m)
            for m, b in (("hqq", 64), ("ggml", None), ("block_float", None))
        ]
        return pd.concat([wide, *others], ignore_index=True).astype({"blocksize": "Int64"})

    fig = methods(with_formats(study({0: 3.5})), LOSS)
    assert fig is not None
    assert list(curves(fig.axes[0])) == ["blockwise", "gptq"]
    assert "Not drawn, without such a cell: block_float, ggml, hqq." in written(fig)
    assert methods(with_formats(study({})), LOSS) is None
    assert "blockwise has jargon_loss. Not drawn, without such a cell: block_float, ggml, hqq." in caplog.text
    alone = methods(study({0: 3.5}), LOSS)
    assert alone is not None
    assert "Not drawn" not in written(alone)


def test_a_method_is_drawn_as_it_is_by_default() -> None:
    wide = study({0: 3.5}).assign(clip=False)
    gptq = wide[wide["method"] == "gptq"].assign(method="awq", scheme="group")
    awq = [
        gptq.assign(clip=clip, jargon_loss=loss, key=gptq["key"] + f" {clip}") for clip, loss in ((False, 5), (True, 4))
    ]
    fig = methods(pd.concat([wide, *awq], ignore_index=True), LOSS)
    assert fig is not None
    drawn = curves(fig.axes[0])
    assert list(drawn) == ["blockwise", "awq", "gptq"]
    assert drawn["awq"][1] == pytest.approx([4] * 3)
    clipped = wide.assign(clip=wide["method"] == "blockwise")
    assert methods(clipped, LOSS) is None  # of blockwise it is an option, and gptq is left alone


def test_it_is_drawn_where_a_study_has_two_methods_and_only_there(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    names = [p.name for p in write_figures(study({0: 3.5, 1: 3.6}), tmp_path_factory.mktemp("a"))]
    assert "methods_4bit.png" in names
    names = [p.name for p in write_figures(study({}), tmp_path_factory.mktemp("b"))]
    assert "methods_4bit.png" not in names
    assert "no figure of methods: at 4 bits and block size 64, blockwise has jargon_loss" in caplog.text


def test_other_figures_are_as_if_the_other_method_were_not_there() -> None:
    from analysis.tables import bits_by_dtype

    alone, both = study({}), study({0: 1.0})
    pd.testing.assert_frame_equal(bits_by_dtype(alone, metric=LOSS), bits_by_dtype(both, metric=LOSS))
