"""Figures: what is drawn is the data, capped where it says so; what can't be drawn is logged."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from analysis.figures import Entry, Results, bit_scaling, block_sizes, data_types, registry, style, write_figures
from analysis.figures.drawing import LOSS_CAP
from analysis.findings import findings
from analysis.metrics import parse_metric
from kbit.spec import QuantSpec
from tests import ROOT
from tests.analysis.studies import MODELS, Study, diverge, make_study

LOSS = parse_metric("jargon_loss")
NAMES = ["bit_scaling.png", "data_types_4bit.png", "block_sizes_4bit.png"]
MORE = ["data_types_by_bits.png", "block_sizes_by_bits.png", "outlier_dimensions.png", "perplexity_and_accuracy.png"]


def curves(ax: Axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        str(x.get_label()): (x.get_xdata(), x.get_ydata()) for x in ax.lines if not str(x.get_label()).startswith("_")
    }


def open_markers(ax: Axes) -> list[tuple[float, float]]:
    found = [x for x in ax.lines if x.get_markerfacecolor() == "white"]
    return [(float(a), float(b)) for x in found for a, b in zip(x.get_xdata(), x.get_ydata(), strict=True)]


def written(fig: Figure) -> str:
    return " ".join(t.get_text() for t in fig.texts).replace("\n", " ")


def legend_labels(fig: Figure) -> list[str]:
    return [t.get_text() for t in fig.legends[0].get_texts()]


def test_the_demo_gives_its_pngs_with_svgs_the_same_each_time(study: Study, tmp_path: Path) -> None:
    settings = dict(mpl.rcParams)
    first, second = (
        write_figures(study.wide, tmp_path / name, sweep="demo", samples=study.samples) for name in ("a", "b")
    )
    assert [p.name for p in first] == [*NAMES, *MORE]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in a.with_suffix(".svg").read_bytes()[:2000]
        assert a.with_suffix(".svg").read_bytes() == b.with_suffix(".svg").read_bytes()
    assert dict(mpl.rcParams) == settings  # the caller's matplotlib is left alone


def test_bit_scaling_draws_every_precisions_points(study: Study) -> None:
    fig = bit_scaling(study.wide, LOSS, sweep="demo")
    assert fig is not None
    lines = curves(fig.axes[0])
    assert legend_labels(fig) == ["16-bit", *(f"{b}-bit" for b in range(8, 2, -1))]
    four = study.wide[study.wide["label"] == "float4 e2 b64"]
    np.testing.assert_array_equal(lines["4-bit"][0], four["total_bits_nominal"])
    np.testing.assert_array_equal(lines["4-bit"][1], four["jargon_loss"])
    assert fig.axes[0].get_xscale() == "log"
    assert "float, block size 64" in written(fig)
    assert "neox-xs, neox-s, neox-m" in written(fig)
    assert "± 1 standard error" in written(fig)
    assert "cut" not in written(fig)


def test_diverged_cells_stand_open_at_the_cap_and_the_figure_says_so(study: Study) -> None:
    gone = diverge(study, study.wide["key"] == "neox-m float3 e2 b64").wide
    before = gone.copy()
    fig = bit_scaling(gone, LOSS)
    assert fig is not None
    assert [y for _, y in open_markers(fig.axes[0])] == [LOSS_CAP]
    assert curves(fig.axes[0])["3-bit"][1].max() == LOSS_CAP
    assert "diverged or cut" in written(fig)
    assert "perplexity 100" in written(fig)
    pd.testing.assert_frame_equal(gone, before)


def test_a_finite_diverged_cell_below_the_cap_is_open_at_its_value(study: Study) -> None:
    wide = study.wide.copy()
    wide.loc[wide["key"] == "neox-m float3 e2 b64", "status"] = "diverged"
    fig = bit_scaling(wide, LOSS)
    assert fig is not None
    value = wide.loc[wide["key"] == "neox-m float3 e2 b64", "jargon_loss"].iloc[0]
    assert [y for _, y in open_markers(fig.axes[0])] == [value]
    assert "perplexity 100" not in written(fig)


def test_models_worse_than_the_cap_at_16_bits_are_not_cut(study: Study) -> None:
    wide = study.wide.assign(jargon_loss=study.wide["jargon_loss"] + 3)
    fig = bit_scaling(wide, LOSS)
    assert fig is not None
    assert open_markers(fig.axes[0]) == []
    assert curves(fig.axes[0])["16-bit"][1].min() > LOSS_CAP


def test_changes_from_16_bit_are_drawn_below_with_paired_intervals(study: Study) -> None:
    fig = data_types(study.wide, LOSS, samples=study.samples)
    assert fig is not None
    assert legend_labels(fig) == ["int", "float", "dynamic", "quantile"]
    assert "95 % confidence interval" in written(fig)
    upper, lower = fig.axes
    base = study.wide[study.wide["bits"] == 16]["jargon_loss"].to_numpy()
    drawn = [
        x.get_ydata() for x in lower.lines if x.get_color() == style.DTYPE_STYLE["int"][0] and len(x.get_xdata()) == 3
    ]
    np.testing.assert_allclose(drawn[0], curves(upper)["int"][1] - base)
    without = data_types(study.wide, LOSS)
    assert without is not None
    assert "95 %" not in written(without)


def test_a_diverged_cells_change_is_apart_from_its_curve(study: Study) -> None:
    fig = data_types(diverge(study, study.wide["key"] == "neox-m dynamic4 b64").wide, LOSS)
    assert fig is not None
    upper, lower = fig.axes
    assert [y for _, y in open_markers(upper)] == [LOSS_CAP]
    assert max(y for _, y in open_markers(lower) if np.isfinite(y)) < 0.5
    assert "off the scale" in written(fig)


def test_block_sizes_have_a_panel_a_data_type_in_order(study: Study) -> None:
    fig = block_sizes(study.wide, LOSS)
    assert fig is not None
    assert legend_labels(fig) == ["16", "64", "256", "1024", "4096"]
    assert [ax.get_title(loc="left") for ax in fig.axes[:2]] == ["NeoX, int", "NeoX, quantile"]


def test_without_a_baseline_there_is_no_panel_of_changes(study: Study) -> None:
    fig = data_types(study.wide[study.wide["bits"] < 16], LOSS)
    assert fig is not None
    assert len(fig.axes) == 1


def test_one_models_cells_stand_side_by_side_with_their_names(study: Study) -> None:
    fig = data_types(study.wide[study.wide["model"] == "neox-s"], LOSS)
    assert fig is not None
    names = [t.get_text() for t in fig.axes[-1].get_xticklabels()]
    assert names == ["int", "float", "dynamic", "quantile"]
    assert [int(x[0]) for x, _ in curves(fig.axes[0]).values()] == [0, 1, 2, 3]
    assert fig.axes[-1].get_xlabel() == "Data type (neox-s)"


def test_missing_cells_leave_gaps_not_errors(study: Study) -> None:
    wide = study.wide[(study.wide["bits"] != 4) | (study.wide["model"] != "neox-s")]
    fig = bit_scaling(wide.sample(frac=0.7, random_state=0), LOSS)
    assert fig is not None
    assert len(curves(fig.axes[0])["4-bit"][0]) <= 2
    assert data_types(wide, LOSS) is not None
    assert block_sizes(wide, LOSS) is not None


def unmeasured(wide: pd.DataFrame) -> pd.DataFrame:
    return wide.assign(**{c: np.nan for c in wide.columns if c.startswith("jargon")})


@pytest.mark.parametrize("rows", ["none", "no columns", "baselines", "failed"])
def test_what_cant_be_drawn_is_logged_with_the_reason(
    study: Study,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    rows: str,
) -> None:
    tables = {
        "none": study.wide.iloc[:0],
        "no columns": pd.DataFrame(),
        "baselines": study.wide[study.wide["bits"] == 16],
        "failed": unmeasured(study.wide).assign(status="failed"),
    }
    assert write_figures(tables[rows], tmp_path) == []
    assert "no figure" in caplog.text


def test_five_families_have_a_panel_each() -> None:
    families = ["bloom", "bloomz", "gpt2", "opt", "pythia"]
    models = [{f"{f}-{m}": v for m, v in MODELS.items()} for f in families]
    wide = pd.concat([make_study(m, family=f).wide for f, m in zip(families, models, strict=True)], ignore_index=True)
    for draw, tail in ((bit_scaling, ""), (data_types, ""), (block_sizes, ", int")):
        fig = draw(wide, LOSS)
        assert fig is not None
        names = [name + tail for name in ("BLOOM", "BLOOMZ", "GPT-2", "OPT", "Pythia")]
        assert [ax.get_title(loc="left") for ax in fig.axes[:5]] == names


def test_the_zero_shot_mean_has_its_own_figure_beside_a_loss(study: Study, tmp_path: Path) -> None:
    wide = study.wide.assign(zero_shot_mean=0.9 - study.wide["jargon_loss"] / 10)
    scaling_only = wide[(wide["bits"] != 4) & (wide["dtype"].isna() | (wide["dtype"] == "float"))]
    names = [p.name for p in write_figures(scaling_only, tmp_path)]
    assert names == [NAMES[0], "bit_scaling_zero_shot.png", *MORE[2:]]


def test_a_new_figure_is_a_function_and_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @style.styled
    def losses(results: Results) -> Figure | None:
        fig = Figure(layout="constrained")
        fig.add_subplot().bar(results.df["label"], results.df[results.metrics[0].column])
        return fig

    entry = Entry(title="Losses", chart=losses, own=True)
    nothing = {name: replace(e, chart=lambda _: None) for name, e in registry.FIGURES.items()}
    monkeypatch.setattr(registry, "FIGURES", {**nothing, "losses": entry})
    small = make_study({"neox-xs": MODELS["neox-xs"]}, [QuantSpec(bits=16), QuantSpec(bits=4, dtype="int")]).wide
    assert [p.name for p in write_figures(small, tmp_path)] == ["losses.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["losses.png", "losses.svg"]


@pytest.mark.parametrize("shape", ["demo", "diverged", "one model"])
def test_no_text_is_clipped_and_no_legend_covers_a_panel(study: Study, shape: str) -> None:
    wide = {
        "demo": study.wide,
        "diverged": diverge(study, (study.wide["bits"] < 5) & (study.wide["model"] == "neox-m")).wide,
        "one model": study.wide[study.wide["model"] == "neox-xs"],
    }[shape]
    for draw in (bit_scaling, data_types, block_sizes):
        fig = draw(wide, LOSS, sweep="a study of a rather long name, with several words")
        assert fig is not None
        renderer = FigureCanvasAgg(fig).get_renderer()
        fig.draw_without_rendering()
        frame = fig.bbox
        legend = fig.legends[0].get_window_extent(renderer)
        panels = [ax.get_tightbbox(renderer) for ax in fig.axes]
        texts = [t.get_window_extent(renderer) for t in fig.texts]
        for box in [legend, *panels, *texts]:
            assert box.x0 >= frame.x0 - 1
            assert box.x1 <= frame.x1 + 1
            assert box.y0 >= frame.y0 - 1
            assert box.y1 <= frame.y1 + 1
        assert not any(legend.overlaps(p) for p in panels)
        assert not any(t.overlaps(p) for t in texts for p in panels)
        assert not any(a.overlaps(b) for i, a in enumerate(panels) for b in panels[:i])


def test_cells_of_other_windows_have_no_interval_and_the_figure_is_drawn(study: Study) -> None:
    short = {key: {name: x[:7] for name, x in s.items()} for key, s in study.samples.items() if "16-bit" in key[0]}
    for odd in (short, {key: {} for key in short}):
        fig = data_types(study.wide, LOSS, samples=study.samples | odd)
        assert fig is not None
        assert "95 %" not in written(fig)
        assert len(fig.axes) == 2


def test_a_figure_compares_block_sizes_of_one_number_of_exponent_bits_and_names_it() -> None:
    pairs = ((2, 64), (3, 64), (3, 256))
    wide = make_study(specs=[QuantSpec(bits=4, dtype="float", exponent_bits=e, blocksize=b) for e, b in pairs]).wide
    fig = block_sizes(wide, LOSS)
    assert fig is not None
    three = wide[(wide["exponent_bits"] == 3) & (wide["blocksize"] == 64)]
    np.testing.assert_array_equal(curves(fig.axes[0])["64"][1], three["jargon_loss"])
    assert "Exponent bits of float: 3 at 4 bits." in written(fig)


@pytest.mark.parametrize("shape", ["all", "quantized", "baselines", "one window", "no sizes"])
def test_any_measured_study_is_drawn_and_described(study: Study, tmp_path: Path, shape: str) -> None:
    samples = study.samples
    if shape in ("all", "quantized", "baselines"):
        bits = study.wide["bits"]
        wide = diverge(study, {"all": bits > 0, "quantized": bits < 16, "baselines": bits == 16}[shape]).wide
        if shape == "all":
            wide.loc[wide.index[0], "jargon_loss"] = 3.0  # or there is no metric
    elif shape == "one window":
        wide = study.wide.assign(jargon_loss_stderr=np.nan)
        samples = {key: {name: x[:1] for name, x in s.items()} for key, s in samples.items()}
    else:
        wide = study.wide.assign(total_bits=np.nan, total_bits_nominal=np.nan)
    written_files = write_figures(
        wide, tmp_path, samples=samples, formats=("svg",)
    )  # one kind of file: the other costs as much
    figures = [p.with_suffix(".png").name for p in written_files]
    scattered = MORE if shape not in ("all", "quantized") else MORE[:3]  # which takes three losses, one quantized
    # Figures by bits take a finite change from 16 bits.
    by_bits = scattered if shape not in ("all", "quantized", "baselines") else scattered[2:]
    assert figures == [*(NAMES if shape != "no sizes" else NAMES[1:]), *by_bits]
    said = "\n".join(findings(wide, samples))
    assert "nan" not in said
    assert "inf" not in said


def test_with_everything_diverged_cells_stand_at_the_cap(study: Study) -> None:
    fig = data_types(diverge(study, study.wide["bits"] > 0).wide, LOSS)
    assert fig is not None
    assert {y for _, y in open_markers(fig.axes[0])} == {LOSS_CAP}
    assert legend_labels(fig) == ["int", "float", "dynamic", "quantile"]


def test_analysis_imports_no_torch_and_draws_late() -> None:
    files = [p.relative_to(ROOT).with_suffix("") for p in (ROOT / "analysis").rglob("*.py") if p.stem != "__init__"]
    modules = sorted(".".join(p.parts) for p in files)
    code = f"""
import sys
from importlib import import_module
for name in {modules!r}:
    import_module(name)
print([m for m in ("torch", "matplotlib", "scipy", "rich") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
