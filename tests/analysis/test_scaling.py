"""Scaling curves and paired comparisons: numbers against independent oracles and known answers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis.metrics import parse_metric
from analysis.scaling import best_precision, budget_grid, common_range, interpolate, scaling_points
from analysis.significance import can_pair, compare, compare_loss, compare_mean_loss, compare_outcomes
from tests.analysis.studies import MODELS, Study

LOSS = parse_metric("jargon_loss")
ACC = parse_metric("jargon_choice_acc")


def windows(nats: object, tokens: object) -> dict[str, np.ndarray]:
    return {"nats": np.asarray(nats, dtype=np.float32), "tokens": np.asarray(tokens, dtype=np.int32)}


def test_interpolation_is_linear_in_log_bits_and_extrapolates_nothing() -> None:
    found = interpolate([16.0, 4.0, 64.0], [2.0, 3.0, 1.0], [2.0, 4.0, 8.0, 32.0, 64.0, 128.0])
    np.testing.assert_allclose(found, [np.nan, 3.0, 2.5, 1.5, 1.0, np.nan])
    assert np.isnan(interpolate([], [], [4.0])).all()


def test_beside_a_diverged_model_nothing_is_interpolated() -> None:
    found = interpolate([4.0, 16.0, 64.0, 256.0], [3.0, 2.5, np.inf, np.inf], [4.0, 8.0, 16.0, 17.0, 64.0, 100.0])
    np.testing.assert_array_equal(found, [3.0, 2.75, 2.5, np.inf, np.inf, np.inf])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1, 1e9), st.floats(-5, 5)), min_size=1, max_size=6, unique_by=lambda p: np.log2(p[0]))
)
def test_interpolation_meets_every_model_and_stays_between_them(models: list[tuple[float, float]]) -> None:
    bits, values = np.array(models).T
    np.testing.assert_allclose(interpolate(bits, values, bits), values, atol=1e-9)
    between = interpolate(bits, values, budget_grid(bits.min(), bits.max(), 11)[1:-1])
    assert ((between >= values.min() - 1e-9) & (between <= values.max() + 1e-9)).all()


def curve(bits: int, total: list[float], value: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"bits": bits, "total_bits": total, "value": value})


def test_best_precision_changes_where_curves_cross() -> None:
    both = pd.concat([curve(3, [1.0, 16.0], [3.0, 1.0]), curve(4, [1.0, 16.0], [2.0, 2.0])])
    assert common_range(both) == (1.0, 16.0)
    best = best_precision(both, LOSS, [2.0, 4.0, 8.0, 32.0])
    assert best["bits"].tolist() == [4, 3, 3, pd.NA]  # a tie at 4 goes to fewer bits
    np.testing.assert_allclose(best["margin"], [0.5, 0.0, 0.5, np.nan])
    assert best["runner_up"].tolist() == [3, 4, 4, pd.NA]
    assert best["precisions"].tolist() == [2, 2, 2, 0]
    assert best_precision(both, ACC, [8.0])["bits"].tolist() == [4]
    assert best_precision(both, ACC, [8.0])["value"].tolist() == [2.0]


def test_a_diverged_curve_is_never_the_best() -> None:
    for metric, worst in ((LOSS, np.inf), (ACC, -np.inf)):
        both = pd.concat([curve(3, [1.0, 16.0], [worst, worst]), curve(4, [1.0, 16.0], [2.0, 2.0])])
        best = best_precision(both, metric, [4.0])
        assert best["bits"].tolist() == [4]
        assert best["precisions"].tolist() == [2]


def test_precisions_without_a_common_range_are_not_compared() -> None:
    assert common_range(pd.concat([curve(3, [1.0, 2.0], [1, 1]), curve(4, [3.0, 4.0], [1, 1])])) is None
    assert common_range(curve(3, [1.0, 2.0], [1, 1])) is None


def test_scaling_points_are_one_data_type_block_64_and_the_baseline(study: Study) -> None:
    found, dtype = scaling_points(study.wide, LOSS)
    assert dtype == "float"
    assert len(found) == 3 * 7
    assert set(found["dtype"].dropna()) == {"float"}
    assert set(found["blocksize"].dropna()) == {64}
    row = found[(found["model"] == "neox-m") & (found["bits"] == 4)].iloc[0]
    params, quantized, _ = MODELS["neox-m"]
    assert row["total_bits"] == quantized * 4.25 + (params - quantized) * 16  # nominal, the paper's count
    assert scaling_points(study.wide, LOSS, dtype="int")[1] == "int"
    assert scaling_points(study.wide.iloc[:0], LOSS)[1] is None


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_equal_windows_give_the_paired_t_interval(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (windows(rng.normal(1500, 100, n), np.full(n, 511)) for _ in range(2))
    oracle = stats.ttest_rel(a["nats"].astype(float) / 511, b["nats"].astype(float) / 511)
    found = compare_loss(a, b)
    interval = oracle.confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], [interval.low, interval.high], rtol=1e-6, atol=1e-9)
    assert found.n == n
    assert found.significant == (oracle.pvalue < 0.05)


def test_unequal_windows_give_the_difference_of_the_losses_with_the_jackknifes_error() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(100, 900, 400)
    a, b = (windows(tokens * rng.normal(3, 0.2, 400), tokens) for _ in range(2))
    found = compare_loss(a, b)
    d = a["nats"].astype(float) - b["nats"]
    assert found.difference == pytest.approx(
        a["nats"].sum(dtype=float) / tokens.sum() - b["nats"].sum(dtype=float) / tokens.sum()
    )
    left_out = (d.sum() - d) / (tokens.sum() - tokens)
    jackknife = np.sqrt(399 / 400 * ((left_out - left_out.mean()) ** 2).sum())
    assert found.stderr == pytest.approx(jackknife, rel=0.01)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    losses, accuracies = 0, 0
    trials = 600
    for _ in range(trials):
        tokens = rng.integers(200, 512, 24)
        shared = rng.normal(3, 0.3, 24)
        found = compare_loss(
            windows(tokens * (shared + rng.normal(0.02, 0.02, 24)), tokens), windows(tokens * shared, tokens)
        )
        losses += found.low <= 0.02 <= found.high
        u = rng.random(50)
        pair = compare_outcomes(u < 0.40, np.where(rng.random(50) < 0.9, u, rng.random(50)) < 0.40)
        accuracies += pair.low <= 0.0 <= pair.high
    assert 0.92 < losses / trials < 0.98
    assert accuracies / trials > 0.93


def test_different_windows_and_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="different windows"):
        compare_loss(windows([1, 2], [5, 5]), windows([1, 2], [5, 6]))
    with pytest.raises(ValueError, match="3 and 2 documents"):
        compare_outcomes(np.ones(3, dtype=bool), np.ones(2, dtype=bool))


def test_accuracies_that_never_differ_still_have_a_width() -> None:
    same = np.ones(50, dtype=bool)
    found = compare({"acc": same}, {"acc": same}, "acc")
    assert found.difference == 0
    assert found.low < 0 < found.high
    assert found.high - found.low < 0.15


def test_many_documents_give_the_paired_t_interval_of_accuracies() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random(20000) < 0.4, rng.random(20000) < 0.38
    interval = stats.ttest_rel(a.astype(float), b.astype(float)).confidence_interval(0.95)
    found = compare_outcomes(a, b)
    np.testing.assert_allclose([found.low, found.high], [interval.low, interval.high], atol=1e-5)
    numbers = compare_outcomes(a.astype(float), b.astype(float))
    np.testing.assert_allclose([numbers.low, numbers.high], [interval.low, interval.high], rtol=1e-9)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_diverged_window_has_no_interval(bad: float) -> None:
    found = compare_loss(windows([1.0, bad], [5, 5]), windows([1.0, 2.0], [5, 5]))
    assert not np.isfinite(found.difference)
    assert np.isnan(found.low)
    assert not found.significant


def test_one_sample_has_no_interval() -> None:
    assert np.isnan(compare_loss(windows([3.0], [5]), windows([2.0], [5])).low)
    assert np.isnan(compare_outcomes(np.array([True]), np.array([False])).low)


def test_a_mean_over_models_counts_what_they_share_in_a_window() -> None:
    rng = np.random.default_rng(4)
    shared = rng.normal(5, 3, 30)
    one = (windows(1500 + shared, np.full(30, 511)), windows(np.full(30, 1500.0), np.full(30, 511)))
    single, twice = compare_mean_loss([one], ["x"]), compare_mean_loss([one, one], ["x", "x"])
    assert twice.stderr == pytest.approx(single.stderr)  # twice the same evidence is no more evidence
    other = (windows(1400 + shared[:20], np.full(20, 300)), windows(np.full(20, 1400.0), np.full(20, 300)))
    mixed = compare_mean_loss([one, other], ["x", "x"])
    assert mixed.difference == pytest.approx((compare_loss(*one).difference + compare_loss(*other).difference) / 2)
    assert mixed.stderr == pytest.approx((compare_loss(*one).stderr + compare_loss(*other).stderr) / 2)
    with pytest.raises(ValueError, match="no models"):
        compare_mean_loss([], [])
    with pytest.raises(ValueError, match="different windows"):
        compare_mean_loss([(one[0], other[0])] * 2, ["x", "x"])


def test_windows_of_different_tokenizers_are_not_averaged_though_their_tokens_are_as_many() -> None:
    rng = np.random.default_rng(5)
    full = np.full(30, 511)
    base = windows(np.full(30, 1500.0), full)
    one, two, three = ((windows(1500 + rng.normal(5, 3, 30), full), base) for _ in range(3))
    errors = [compare_loss(*pair).stderr for pair in (one, two, three)]
    apart = compare_mean_loss([one, two, three], ["x", "y", "z"])
    assert apart.stderr == pytest.approx(np.mean(errors))
    shared = compare_mean_loss([one, two], ["x", "x"])
    assert shared.stderr < 0.9 * np.mean(errors[:2])
    mixed = compare_mean_loss([one, three, two], ["x", "y", "x"])
    assert mixed.stderr == pytest.approx((2 * shared.stderr + errors[2]) / 3)
    assert mixed.difference == pytest.approx(apart.difference)


def test_only_samples_of_the_same_windows_or_documents_can_be_paired() -> None:
    a, b = windows([1, 2], [5, 5]), windows([1, 2], [5, 6])
    assert can_pair(a, a, "loss")
    assert not can_pair(a, b, "loss")
    assert not can_pair(a, {}, "loss")
    assert not can_pair({"acc": np.ones(3)}, {"acc": np.ones(2)}, "acc")
    assert not can_pair({"acc": np.ones(3)}, {"f1": np.ones(3)}, "acc")
