"""Scaling laws: planted ones are recovered within their intervals, and the parts agree with other programs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from analysis.cells import WHOLE_TENSOR
from analysis.metrics import parse_metric
from analysis.scaling import (
    LAWS,
    effective_parameters,
    fit_laws,
    flat_laws,
    law_parameters,
    law_points,
    parallel_curves,
)
from analysis.scaling.effective import Effective, invert, monotone_curve
from analysis.scaling.law import bootstrap, held_out, residuals
from analysis.scaling.laws import LAW_COLUMNS
from analysis.scaling.offsets import ParallelCurves, hats
from analysis.scaling.points import last_curves
from analysis.scaling.power_laws import Bivariate, PostTraining
from analysis.scaling.robust import HUBER, regress
from tests.analysis.planted import QUANTIZED, SIZES, ouyang, planted, sixteen
from tests.analysis.studies import MODELS, Study, diverge

LOSS = parse_metric("jargon_loss")
ACC = parse_metric("jargon_choice_acc")


def line(n: int, *, seed: int = 0, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = np.column_stack([np.ones(n), rng.normal(size=(n, 2))])
    return x, x @ np.array([1.0, 2.0, -1.0]) + rng.normal(0, noise, n)


def test_without_a_threshold_the_regression_is_least_squares() -> None:
    x, y = line(40)
    found = regress(x, y, huber=1e6)
    expected, left, _, _ = np.linalg.lstsq(x, y, rcond=None)
    np.testing.assert_allclose(found.coefficients, expected, atol=1e-8)
    assert found.scale == pytest.approx(np.sqrt(left[0] / 37))


def test_hubers_regression_minimises_hubers_loss_at_its_scale_and_solves_proposal_2() -> None:
    x, y = line(60, seed=1)
    y[:6] += 9.0
    found = regress(x, y)
    other = optimize.least_squares(
        lambda b: x @ b - y, np.zeros(3), loss="huber", f_scale=HUBER * found.scale, xtol=1e-14
    )
    np.testing.assert_allclose(found.coefficients, other.x, atol=1e-5)
    psi = np.clip((y - x @ found.coefficients) / found.scale, -HUBER, HUBER)
    expected = stats.norm.expect(lambda z: np.clip(z, -HUBER, HUBER) ** 2)
    assert (psi**2).sum() / 57 == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(found.coefficients, [1, 2, -1], atol=0.25)


def test_bounds_give_the_tobit_estimate() -> None:
    x, y = line(2000, seed=2, noise=1.0)
    low, high = y < -1.0, y > 3.0
    side = np.where(high, 1, np.where(low, -1, 0))
    seen = np.clip(y, -1.0, 3.0)

    def minus_log_likelihood(theta: np.ndarray) -> float:
        mu, s = x @ theta[:3], np.exp(theta[3])
        parts = [
            stats.norm.logpdf(seen[side == 0], mu[side == 0], s),
            stats.norm.logcdf((-1.0 - mu[low]) / s),
            stats.norm.logsf((3.0 - mu[high]) / s),
        ]
        return -float(sum(p.sum() for p in parts))

    best = optimize.minimize(minus_log_likelihood, np.array([1, 2, -1, 0.0]), method="BFGS")
    found = regress(x, seen, side, huber=1e6)
    # The scale is corrected for degrees of freedom, so it is a little larger than the likelihood's.
    np.testing.assert_allclose(found.coefficients, best.x[:3], atol=2e-3)
    assert found.scale == pytest.approx(np.exp(best.x[3]), rel=2e-3)
    ignored = np.linalg.lstsq(x[side == 0], y[side == 0], rcond=None)[0]
    assert np.abs(found.coefficients - [1, 2, -1]).max() < np.abs(ignored - [1, 2, -1]).max()


def test_a_regression_that_can_tell_nothing_apart_is_refused() -> None:
    x = np.ones((5, 2))
    with pytest.raises(ValueError, match="can't tell 2 parameters apart"):
        regress(x, np.arange(5.0))


def test_hats_interpolate_and_go_on_straight() -> None:
    knots = np.array([0.0, 1.0, 3.0])
    values = np.array([5.0, 4.0, 2.5])
    at = np.linspace(0, 3, 31)
    np.testing.assert_allclose(hats(at, knots) @ values, np.interp(at, knots, values))
    np.testing.assert_allclose(hats(np.array([-1.0, 4.0]), knots) @ values, [6.0, 1.75])


def offset_loss(size: float, _: float, p: float, drift: float = 0.0) -> float:
    """A base function of total bits, an offset for each precision, and 3 bits that drift away."""
    total = size * (QUANTIZED * p + (1 - QUANTIZED) * 16)
    offset = {3.25: 0.1, 4.25: -0.05, 5.25: -0.03, 6.25: -0.01, 8.25: 0.0, 16.0: 0.0}[p]
    return 6.0 - 0.11 * np.log2(total) + offset + (drift * np.log2(size / 1e9) if p == 3.25 else 0.0)


def test_parallel_curves_without_noise_are_recovered_to_the_digit() -> None:
    found = parallel_curves(planted(offset_loss))
    assert found.reference == 16
    np.testing.assert_allclose(found.offsets["offset"], [0.1, -0.05, -0.03, -0.01, 0.0, 0.0], atol=1e-9)
    np.testing.assert_allclose(found.offsets["drift"], 0, atol=1e-8)
    left_out = held_out(ParallelCurves(), planted(offset_loss))
    assert left_out.model == "m7"
    assert (left_out.n, left_out.error) == (5, pytest.approx(0, abs=1e-9))


def test_the_parallelism_test_is_the_f_test_of_a_full_regression() -> None:
    rng = np.random.default_rng(3)
    cells = planted(offset_loss, bits=(3, 4), noise=lambda: rng.normal(0, 0.01))
    found = parallel_curves(cells, knots=2)
    # With two knots the base is a straight line; a regression of its own by dummies.
    x, y, b = np.log2(cells["total_bits"]).to_numpy(), cells["value"].to_numpy(), cells["bits"].to_numpy()
    dummies = [(b == k).astype(float) for k in (3, 4)]
    small = np.column_stack([np.ones_like(x), x, *dummies])
    full = np.column_stack([small, *(x * d for d in dummies)])
    left = [float(np.linalg.lstsq(m, y, rcond=None)[1][0]) for m in (small, full)]
    free = len(y) - full.shape[1]
    f = (left[0] - left[1]) / 2 / (left[1] / free)
    assert (found.df1, found.df2) == (2, free)
    assert found.f == pytest.approx(f)
    assert found.p == pytest.approx(stats.f.sf(f, 2, free))


def coverage(trials: int) -> tuple[float, float, float]:
    """Shares of studies whose offset and drift intervals hold the truth, and in which parallel curves are rejected."""
    rng = np.random.default_rng(4)
    offsets, drifts, rejected = 0, 0, 0
    for _ in range(trials):
        cells = planted(offset_loss, bits=(3, 4, 5, 8))
        found = parallel_curves(cells.assign(value=cells["value"] + rng.normal(0, 0.02, len(cells))))
        row = found.offsets.loc[4]
        offsets += row["low"] <= -0.05 <= row["high"]
        drifts += row["drift_low"] <= 0 <= row["drift_high"]
        rejected += found.p < 0.05
    return offsets / trials, drifts / trials, rejected / trials


def test_offsets_are_held_as_often_as_their_intervals_say() -> None:
    offsets, drifts, rejected = coverage(60)
    assert offsets > 0.87
    assert drifts > 0.87
    assert rejected < 0.15


@pytest.mark.slow
def test_offsets_are_held_as_often_as_their_intervals_say_in_many_studies() -> None:
    trials = 1500
    error = np.sqrt(0.05 * 0.95 / trials)
    offsets, drifts, rejected = coverage(trials)
    assert offsets > 0.95 - 2.6 * error
    assert drifts > 0.95 - 2.6 * error
    assert rejected < 0.05 + 2.6 * error


def test_a_drifting_precision_is_found_and_named() -> None:
    rng = np.random.default_rng(5)
    cells = planted(lambda n, d, p: offset_loss(n, d, p, drift=-0.05), noise=lambda: rng.normal(0, 0.01))
    found = parallel_curves(cells)
    assert found.p < 0.001
    assert found.largest_drift.name == 3
    # Over the sizes, from the smallest to the largest.
    expected = -0.05 * np.log2(SIZES[-1] / SIZES[0])
    assert found.largest_drift["drift_low"] < expected < found.largest_drift["drift_high"]


def test_diverged_cells_have_no_place_on_parallel_curves_and_are_counted() -> None:
    cells = planted(offset_loss)
    cells.loc[cells["bits"] == 3, ["value", "diverged"]] = [np.inf, True]
    found = parallel_curves(cells)
    assert found.censored == 8
    assert 3 not in found.offsets.index
    np.testing.assert_allclose(found.offsets.loc[4, "offset"], -0.05, atol=1e-9)
    with pytest.raises(ValueError, match="two precisions"):
        parallel_curves(cells[cells["bits"] == 3])


def test_ouyangs_law_without_noise_is_recovered_to_the_digit() -> None:
    cells = planted(ouyang, tokens=(2e9, 2e10, 3e11))
    fitted = PostTraining(bits="power", least=1e-12).fit(cells)
    # N in parameters and D in tokens: the planted constant is in billions.
    constant = np.log(50) + 0.226 * np.log(1e9) - 0.525 * np.log(1e9)
    expected = {"ln k": constant, "alpha": 0.226, "gamma": 5.497, "beta": 0.525}
    assert dict(fitted.parameters) == pytest.approx(expected, abs=1e-6)
    assert held_out(PostTraining(bits="power", least=1e-12), cells).error == pytest.approx(0, abs=1e-6)


def test_kumars_law_without_noise_is_recovered_to_the_digit() -> None:
    def kumar(n: float, d: float, p: float) -> float:
        added = 0.0598 * 1e3 * d**0.507 / (QUANTIZED * n) ** 0.744 * np.exp(-p / 0.591)
        return sixteen(n, d) + (0.0 if p == 16 else added)

    fitted = PostTraining(bits="exponential", least=1e-15).fit(planted(kumar, tokens=(2e9, 3e11)))
    expected = {"ln C": np.log(59.8), "gamma_N": 0.744, "1/gamma": 1 / 0.591, "gamma_D": 0.507}
    assert dict(fitted.parameters) == pytest.approx(expected, abs=1e-5)


def test_without_tokens_their_exponent_is_left_out_and_said_so() -> None:
    fitted = PostTraining(bits="power").fit(planted(ouyang))
    assert set(fitted.parameters) == {"ln k", "alpha", "gamma"}
    assert "tokens are not known" in fitted.note
    # One number of tokens for all: nothing tells their exponent.
    assert "don't differ" in PostTraining(bits="power").fit(planted(ouyang, tokens=(3e11,))).note


def post_training_coverage(trials: int, draws: int) -> dict[str, float]:
    rng = np.random.default_rng(6)
    truth = {"alpha": 0.226, "gamma": 5.497, "beta": 0.525}
    hit = dict.fromkeys(truth, 0)
    for _ in range(trials):
        cells = planted(ouyang, tokens=(2e9, 2e10, 3e11), bits=(3, 4, 5))
        # Errors are of the change's size; a part of them is the model's own, in all of its cells.
        own = cells["model"].map(dict(zip(cells["model"].unique(), rng.normal(0, 0.2, 8), strict=True)))
        change = cells["change"] * np.exp(own + rng.normal(0, 0.15, len(cells)))
        cells = cells.assign(change=change, value=cells["baseline"] + change)
        law = PostTraining(bits="power")
        intervals = bootstrap(law, cells, law.fit(cells), draws=draws)
        for name, value in truth.items():
            hit[name] += intervals[name][0] <= value <= intervals[name][1]
    return {name: n / trials for name, n in hit.items()}


def test_exponents_are_held_by_intervals_over_models() -> None:
    assert min(post_training_coverage(8, 30).values()) > 0.6


@pytest.mark.slow
def test_exponents_are_held_as_often_as_intervals_over_models_say() -> None:
    trials = 300
    found = post_training_coverage(trials, 200)
    # Eight models: a bootstrap over so few is a little narrow for what differs within models.
    assert min(found.values()) > 0.95 - 0.03 - 2.6 * np.sqrt(0.05 * 0.95 / trials)


def test_a_diverged_cell_pulls_a_law_only_as_far_as_its_bound() -> None:
    cells = planted(ouyang, bits=(3, 4, 5))
    truth = PostTraining(bits="power").fit(cells).parameters
    worst = (cells["bits"] == 3) & (cells["model"] == "m0")
    cells.loc[worst, ["value", "change", "diverged"]] = [np.inf, np.inf, True]
    fitted = PostTraining(bits="power").fit(cells)
    assert "1 diverged cells count as at least" in fitted.note
    assert fitted.parameters["gamma"] == pytest.approx(truth["gamma"], rel=0.05)
    assert np.isfinite(residuals(fitted, cells)[0])


def test_changes_below_what_can_be_told_are_bounds_not_gaps() -> None:
    rng = np.random.default_rng(7)
    cells = planted(ouyang, noise=lambda: rng.normal(0, 3e-4))
    assert (cells["change"] <= 0).any()  # noise makes some 8-bit cells better than their 16-bit model
    law = PostTraining(bits="power", least=2e-3)
    assert "count as at most that" in law.fit(cells).note
    assert law.fit(cells).parameters["gamma"] == pytest.approx(5.497, abs=0.25)


def test_the_bivariate_law_is_recovered_where_it_holds() -> None:
    cells = planted(lambda n, _, p: 1.5 + 60 * n**-0.25 * p**-0.8)
    found = Bivariate().fit(cells)
    expected = {"E": 1.5, "ln A": np.log(60), "alpha": 0.25, "beta": 0.8}
    assert dict(found.parameters) == pytest.approx(expected, rel=2e-3)
    again = Bivariate().fit(cells, near=found)
    assert dict(again.parameters) == pytest.approx(dict(found.parameters), rel=1e-4)


def test_the_bivariate_law_fits_poorly_where_curves_are_parallel() -> None:
    cells = planted(offset_loss)
    power, parallel = Bivariate(), ParallelCurves()
    assert residuals(power.fit(cells), cells)[0] > 0.02
    assert residuals(parallel.fit(cells), cells)[0] < 1e-8
    assert held_out(power, cells).error > held_out(parallel, cells).error


def test_effective_parameters_invert_the_16_bit_curve() -> None:
    gamma = 2.67

    def shrunk(n: float, d: float, p: float) -> float:
        return float(np.interp(np.log(n * (1.0 if p == 16 else -np.expm1(-p / gamma))), np.log(sizes), curve))

    sizes = (SIZES[0] / 2, *SIZES)
    curve = [sixteen(n, np.nan) for n in sizes]
    cells = planted(shrunk)
    found = effective_parameters(cells)
    inside = found[found["known"] == "yes"]
    np.testing.assert_allclose(inside["ratio"], -np.expm1(-inside["bits_per_param"] / gamma), rtol=1e-6)
    # The smallest model has no smaller one to be as good as.
    assert set(found.loc[found["model"] == "m0", "known"]) == {"at most"}
    assert len(inside) == 35
    assert Effective().fit(cells).parameters["gamma"] == pytest.approx(gamma, rel=1e-4)
    assert residuals(Effective().fit(cells), cells)[0] < 1e-6


def test_a_curve_that_rises_is_made_monotone_and_its_smallest_size_taken() -> None:
    size, loss = monotone_curve(np.array([4.0, 1.0, 2.0, 8.0]), np.array([3.4, 4.0, 3.2, 2.0]))
    np.testing.assert_allclose(size, [1, 2, 4, 8])
    np.testing.assert_allclose(loss, [4.0, 3.3, 3.3, 2.0])
    np.testing.assert_allclose(invert(size, loss, np.array([3.3, 4.5, 1.0, 4.0])), [2, 1, 8, 1])


def test_diverged_cells_bound_their_effective_size() -> None:
    cells = planted(ouyang)
    cells.loc[cells["bits"] == 3, ["value", "diverged"]] = [np.inf, True]
    found = effective_parameters(cells)
    three = found[found["bits"] == 3]
    assert set(three["known"]) == {"at most"}
    np.testing.assert_allclose(three["effective"], SIZES[0])


def test_law_points_have_sizes_without_embeddings_and_16_bit_values(study: Study) -> None:
    points = law_points(study.wide, LOSS)
    assert (points.dtype, points.blocksize) == ("float", 64)
    cells = points.cells
    for model, (params, quantized, _) in MODELS.items():
        own = cells[cells["model"] == model]
        assert own["params"].unique().tolist() == [params]
        assert own["quantized"].tolist() == pytest.approx([quantized] * len(own))
    assert (cells.loc[cells["bits"] == 16, "change"] == 0).all()
    assert law_points(study.wide, LOSS, dtype="int", blocksize=1024).cells["bits"].value_counts().to_dict() == {
        3: 3,
        4: 3,
        16: 3,
    }
    assert law_points(study.wide, LOSS, blocksize=WHOLE_TENSOR).dtype is None


def with_checkpoints(study: Study) -> pd.DataFrame:
    """The study, and an earlier checkpoint of each model."""
    last = study.wide.assign(tokens_seen=3e11, checkpoint="step2", model=study.wide["model"] + "@step2")
    early = last.assign(
        tokens_seen=2e10,
        checkpoint="step1",
        model=study.wide["model"] + "@step1",
        key=last["key"] + "@step1",
        jargon_loss=last["jargon_loss"] + 0.3,
    )
    return pd.concat([last, early], ignore_index=True)


def test_checkpoints_are_points_of_one_model_with_their_tokens(study: Study) -> None:
    cells = law_points(with_checkpoints(study), LOSS).cells
    assert set(cells["family"]) == {"neox"}
    assert set(cells["model"]) == set(MODELS)
    assert set(cells["curve"]) == {"neox@step1", "neox@step2"}
    assert set(cells["tokens"]) == {2e10, 3e11}
    assert set(last_curves(cells)["curve"]) == {"neox@step2"}
    laws = fit_laws(with_checkpoints(study), LOSS, draws=0, laws=LAWS[::3]).set_index("law")
    assert set(laws.loc["Ouyang et al.", "parameters"]) == {"ln k", "alpha", "gamma", "beta"}
    assert laws.loc["parallel curves", "cells"] * 2 == laws.loc["Ouyang et al.", "cells"]


@pytest.fixture(scope="module")
def laws(study: Study) -> pd.DataFrame:
    return fit_laws(study.wide, LOSS, draws=20)


def test_every_law_of_a_study_has_a_row_with_its_error_out_of_sample(laws: pd.DataFrame) -> None:
    assert list(laws.columns) == list(LAW_COLUMNS)
    assert laws["law"].tolist()[0] == "parallel curves"
    assert len(laws) == 5
    assert set(laws["held_out"].dropna()) == {"neox-m"}
    fitted = laws[laws["held_out_error"].notna()]
    assert {"parallel curves", "Ouyang et al.", "Kumar et al., post-training"} <= set(fitted["law"])
    assert (fitted["held_out_error"] >= 0).all()
    parameters = law_parameters(laws)
    gamma = parameters[(parameters["law"] == "Ouyang et al.") & (parameters["parameter"] == "gamma")].iloc[0]
    assert gamma["low"] < gamma["value"] < gamma["high"]
    assert "gamma" in flat_laws(laws).loc[3, "parameters"]


def test_diverged_cells_of_a_study_are_counted_in_every_row(study: Study) -> None:
    three = study.wide["key"][(study.wide["bits"] == 3) & (study.wide["dtype"] == "float")]
    laws = fit_laws(diverge(study, study.wide["key"].isin(three)).wide, LOSS, draws=0, laws=LAWS[::3])
    assert set(laws["diverged"]) == {3}
    assert "3 diverged cells" in laws.set_index("law").loc["Ouyang et al.", "note"]


def test_accuracies_have_parallel_curves_and_no_law_of_losses(study: Study) -> None:
    laws = fit_laws(study.wide, ACC, draws=0).set_index("law")
    assert np.isfinite(laws.loc["parallel curves", "rmse"])
    assert laws.loc["Ouyang et al.", "note"] == "a law of losses; jargon_choice_acc is none"


@pytest.mark.parametrize("part", ["nothing", "baseline", "one model", "all diverged"])
def test_partial_studies_say_what_is_missing(study: Study, part: str) -> None:
    wide = study.wide
    parts = {
        "nothing": wide.iloc[:0],
        "baseline": wide[wide["bits"] == 16],
        "one model": wide[wide["model"] == "neox-s"],
        "all diverged": diverge(study, wide["bits"] < 16).wide,
    }
    laws = fit_laws(parts[part], LOSS, draws=10)
    if part in ("nothing", "baseline"):
        assert laws.empty
        return
    assert (laws["note"] != "").all()
    assert laws.set_index("law").loc["parallel curves", "note"].startswith("not fitted: parallel curves need two")
    assert law_parameters(laws)["low"].isna().all()
