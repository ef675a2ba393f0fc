"""Statistics against scipy, numbers of statsmodels 0.15 (no dependency), closed forms, and their nominal rates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from analysis.findings.contrasts import Differences, slope
from analysis.metrics import parse_metric
from analysis.significance import (
    Effect,
    Margins,
    benjamini_hochberg,
    bootstrap,
    by_ranks,
    compare_loss,
    compare_outcomes,
    holm,
    mcnemar,
    mean_of_tasks,
    models_needed,
    of_samples,
    over_models,
    resampling,
    samples_needed,
    sign_flip,
    smallest_detectable,
    tost,
    wilson,
)
from analysis.significance.effects import signed_ranks

P = [0.001, 0.04, 0.03, 0.2, 0.03, 0.9, 0.012]
DIFFERENCES = [0.012, -0.003, 0.004, 0.008, -0.001, 0.006]


def table(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = np.repeat([True, True, False, False], [both, first, second, neither])
    return a, np.repeat([True, False, True, False], [both, first, second, neither])


def test_mcnemar_is_the_exact_binomial_test_of_those_that_change_sides() -> None:
    found = mcnemar(*table(30, 9, 3, 58))
    assert (found.first_only, found.second_only) == (9, 3)
    assert found.p == pytest.approx(0.14599609375, abs=1e-14)  # statsmodels: mcnemar(exact=True)
    assert found.p == pytest.approx(stats.binomtest(3, 12).pvalue, abs=1e-14)
    assert mcnemar(*table(5, 0, 0, 5)).p == 1
    assert mcnemar(*table(0, 6, 6, 0)).p == 1
    assert mcnemar(*table(0, 0, 20, 0)).p == pytest.approx(2 * 0.5**20)


def test_mcnemar_refuses_what_it_is_not_for() -> None:
    with pytest.raises(ValueError, match="2 and 3 documents"):
        mcnemar(np.ones(2, bool), np.ones(3, bool))
    with pytest.raises(ValueError, match="right-or-wrong"):
        mcnemar(np.ones(2), np.ones(2))


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.27753279986288926),
        (7, 12, 0.31951131254954973, 0.8067396863412435),
        (812, 1000, 0.7866068125887822, 0.8350052901162315),
    ],
)
def test_wilson_is_statsmodels(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-12)
    assert np.isnan(wilson(0, 0)).all()


def test_adjusted_p_values_are_statsmodels_and_scipys() -> None:
    assert holm(P) == pytest.approx([0.007, 0.15, 0.15, 0.4, 0.15, 0.9, 0.072])
    assert benjamini_hochberg(P) == pytest.approx(stats.false_discovery_control(P))
    with_gap = [*P[:3], float("nan"), *P[3:]]
    assert np.delete(holm(with_gap), 3) == pytest.approx(holm(P))
    assert np.isnan(benjamini_hochberg(with_gap)[3])
    assert len(holm([])) == 0


def test_an_effect_over_models_is_the_t_test_and_two_one_sided_ones_are_tost() -> None:
    found, scipy = over_models(DIFFERENCES), stats.ttest_1samp(DIFFERENCES, 0)
    interval = scipy.confidence_interval()
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(DIFFERENCES), interval.low, interval.high))
    assert found.p_above(0) == pytest.approx(stats.ttest_1samp(DIFFERENCES, 0, alternative="greater").pvalue)
    assert found.p_below(0.005) == pytest.approx(stats.ttest_1samp(DIFFERENCES, 0.005, alternative="less").pvalue)
    assert tost(found, 0.01) == pytest.approx(0.028111359768538385)  # statsmodels: ttost_paired
    assert tost(over_models([0.02, 0.021, 0.022]), 0.01) > 0.99


def test_one_model_or_none_has_no_interval() -> None:
    for effect in (over_models([0.3]), over_models([]), over_models([np.nan, 0.1])):
        assert not effect.tested
        assert np.isnan([effect.low, effect.high, effect.p_above(0), tost(effect, 1)]).all()


@pytest.mark.parametrize("same", [0.1, -0.3, 1e-5])
def test_models_that_all_say_the_same_number_tell_nothing_of_its_error(same: float) -> None:
    """In float64 the mean of three times 0.1 is not 0.1, so that the spread is not exactly 0 either."""
    for n in (2, 3, 7):
        effect = over_models([same] * n)
        assert effect.value == pytest.approx(same)
        assert effect.n == n
        assert not effect.tested
        assert np.isnan([effect.low, effect.high, effect.p_above(0), effect.p_below(0), tost(effect, 1)]).all()
        assert math.isnan(smallest_detectable(effect.stderr, effect.dof))


def test_models_on_which_two_cells_are_the_same_are_surely_alike() -> None:
    effect = over_models([0.0] * 4)
    assert (effect.low, effect.high, tost(effect, 0.01)) == (0, 0, 0)
    assert effect.p_above(0) == effect.p_below(0) == 1


def test_a_slope_of_differences_that_are_all_the_same_has_no_error() -> None:
    def slope_of(d: list[float]) -> Effect:
        n = len(d)
        return slope(
            Differences(
                units=tuple("abcde"[:n]),
                families=("f",) * n,
                x=np.asarray([1.0, 2.1, 3.3, 4.2, 5.9])[:n],
                d=np.asarray(d),
                combinations=tuple({f"a{i}": -1.0, f"b{i}": 1.0} for i in range(n)),
                alone=0,
                cells={},
            )
        )

    assert not slope_of([0.02] * 5).tested
    assert tost(slope_of([0.0] * 5), 0.01) == 0
    spread = slope_of([0.02, 0.03, 0.02, 0.05, 0.04])
    oracle = stats.linregress([1.0, 2.1, 3.3, 4.2, 5.9], [0.02, 0.03, 0.02, 0.05, 0.04])
    assert (spread.value, spread.stderr) == pytest.approx((oracle.slope, oracle.stderr))


def test_a_mean_of_tasks_has_the_error_of_independent_ones() -> None:
    rng = np.random.default_rng(2)
    each = [compare_outcomes(rng.normal(0.1, 1, n), np.zeros(n)) for n in (200, 50, 1000)]
    found = mean_of_tasks(each)
    mean = np.mean([c.difference for c in each])
    error = math.sqrt(sum(c.stderr**2 for c in each)) / 3
    low, high = stats.norm.interval(0.95, mean, error)
    assert (found.difference, found.low, found.high) == pytest.approx((mean, low, high))
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(mean) / error))
    assert found.n == 50
    assert mean_of_tasks(each[:1]) is each[0]
    same = compare_outcomes(np.ones(5), np.zeros(5))
    assert math.isnan(mean_of_tasks([same, same]).p)


def test_correlated_differences_have_the_error_of_their_mean() -> None:
    """d_i = e_i - (e_i + e_i+1) / 2: an interpolation between neighbours; the closed form is a simulation's."""
    n, rng = 6, np.random.default_rng(0)
    weights = np.eye(n, n + 1) - 0.5 * (np.eye(n, n + 1) + np.eye(n, n + 1, 1)) + 0.2
    covariance = weights @ weights.T
    scale = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(scale, scale)
    d = rng.normal(size=(4000, n + 1)) @ weights.T / scale
    squares = np.mean([over_models(row, correlation).stderr ** 2 for row in d[:1500]])
    assert squares == pytest.approx(d.mean(1).var(), rel=0.08)
    assert over_models(d[0], np.eye(n)) == over_models(d[0])


def test_flipped_signs_are_scipys_permutations() -> None:
    for above in (0.0, 0.002):
        d = np.asarray(DIFFERENCES) - above
        scipy = stats.permutation_test((d,), np.mean, permutation_type="samples", alternative="greater")
        assert sign_flip(d) == pytest.approx(scipy.pvalue)
    assert sign_flip([1, 2, 3]) == 1 / 8
    many = np.random.default_rng(1).normal(0.4, 1, 40)
    assert sign_flip(many) == pytest.approx(stats.ttest_1samp(many, 0, alternative="greater").pvalue, abs=0.006)


def test_signed_ranks_are_scipys_and_take_infinite_differences() -> None:
    expected = stats.wilcoxon(DIFFERENCES, alternative="greater", method="exact").pvalue
    assert signed_ranks(np.asarray(DIFFERENCES)) == pytest.approx(expected)
    found = over_models([0.1, np.inf, 0.3, np.inf, 0.2, 0.4, np.nan])
    assert (found.basis, found.n, found.value) == ("ranks", 6, 0.35)
    assert (found.low, found.high) == (0.1, np.inf)  # order statistics 1 and 6 of 6: 96.9 %
    assert found.p_above(0) == 1 / 64
    assert found.p_below(0) == 1
    assert by_ranks([0.1, np.inf]).low == -np.inf


def losses(n: int, effect: float, rng: np.random.Generator, spread: float = 0.05) -> tuple[dict, dict]:
    tokens = rng.integers(200, 512, n).astype(np.int32)
    base = tokens * rng.normal(3, 0.3, n)
    other = base - tokens * (effect + spread * rng.standard_exponential(n) - spread)
    return {"nats": base, "tokens": tokens}, {"nats": other, "tokens": tokens}


def test_a_bootstrap_agrees_with_the_ratio_estimator_and_with_scipys() -> None:
    rng = np.random.default_rng(3)
    a, b = losses(200, 0.01, rng)
    found, ratio = bootstrap(a, b, "loss"), compare_loss(a, b)
    assert (found.difference, found.stderr, found.n) == (ratio.difference, ratio.stderr, 200)
    assert (found.low, found.high) == pytest.approx((ratio.low, ratio.high), abs=0.1 * (ratio.high - ratio.low))
    assert found == bootstrap(a, b, "loss")  # the draws are the seed's
    d = {"kl": rng.normal(0.02, 0.1, 300)}
    zero = {"kl": np.zeros(300)}
    kl = bootstrap(d, zero, "kl")
    scipy = stats.bootstrap((d["kl"],), np.mean, method="bca", n_resamples=4000, rng=0).confidence_interval
    assert (kl.low, kl.high) == pytest.approx((scipy.low, scipy.high), abs=0.0015)


def test_a_bootstrap_over_clusters_is_that_of_their_sums() -> None:
    rng = np.random.default_rng(4)
    d = np.repeat(rng.normal(0.1, 1, 30), 5)  # all five windows of a document say the same
    values, zero, of = {"kl": d}, {"kl": np.zeros(150)}, [f"document {i // 5}" for i in range(150)]
    clustered, alone = bootstrap(values, zero, "kl", clusters=of), bootstrap(values, zero, "kl")
    assert clustered.n == 30
    assert clustered.difference == pytest.approx(alone.difference)
    assert clustered.stderr == pytest.approx(d[::5].std(ddof=1) / math.sqrt(30))
    assert clustered.stderr > 2 * alone.stderr


def test_a_bootstrap_of_few_skewed_windows_covers_the_truth_nearly_as_often_as_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resampling, "LEAST_ROUNDS", 500)  # enough here
    monkeypatch.setattr(resampling, "ROUNDS", 500)
    rng = np.random.default_rng(5)
    covered = rejected = 0
    for _ in range(200):
        found = bootstrap(*losses(24, 0.0, rng), "loss")
        covered += found.low <= 0 <= found.high
        rejected += found.p < 0.05
    assert covered >= 200 * (0.95 - 2.6 * math.sqrt(0.05 * 0.95 / 200))
    assert rejected <= 200 * (0.05 + 2.6 * math.sqrt(0.05 * 0.95 / 200))


def test_a_against_a_differs_in_nothing() -> None:
    a, _ = losses(30, 0.0, np.random.default_rng(6))
    found = bootstrap(a, a, "loss")
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert compare_loss(a, a).p == 1
    with pytest.raises(ValueError, match="can't be paired"):
        bootstrap(a, {"nats": a["nats"][:5], "tokens": a["tokens"][:5]}, "loss")


def test_what_could_have_been_shown_is_found_at_its_power() -> None:
    rng, n = np.random.default_rng(7), 20
    truth = smallest_detectable(1 / math.sqrt(n), n - 1)
    draws = rng.normal(truth, 1, (3000, n))
    found = (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean()
    assert found == pytest.approx(0.8, abs=0.03)
    assert smallest_detectable(1.0, 1e9) == pytest.approx(2.8016, abs=1e-3)  # z at 97.5 % + z at 80 %
    assert math.isnan(smallest_detectable(1.0, 0))


def test_what_it_would_take_falls_with_the_square_of_the_gap() -> None:
    assert samples_needed(0.01, 1000, 0.014) == pytest.approx(1000 * (2.8033 * 0.01 / 0.014) ** 2, rel=0.01)
    assert samples_needed(0.01, 1000, 1.0) == 1000
    assert samples_needed(0.01, 1000, 0) == math.inf
    needed = models_needed(0.02, 0.01)
    assert smallest_detectable(0.02 / math.sqrt(needed), needed - 1) <= 0.01
    assert smallest_detectable(0.02 / math.sqrt(needed - 1), needed - 2) > 0.01
    assert models_needed(1.0, 1e-4) == math.inf


def test_a_single_models_effect_is_its_samples() -> None:
    found = compare_outcomes(*(x.astype(float) for x in table(30, 9, 3, 58)))
    effect = of_samples(found, sign=-1)
    assert isinstance(effect, Effect)
    assert (effect.value, effect.low, effect.high) == (-found.difference, -found.high, -found.low)
    assert 2 * min(effect.p_above(0), effect.p_below(0)) == pytest.approx(found.p)


def test_margins_are_of_losses_and_shares_and_of_nothing_else() -> None:
    margins = Margins(loss=0.02, points=1)
    columns = ("wikitext2_loss", "wikitext2_kl", "piqa_acc", "wikitext2_ttft", "piqa_mcc", "wikitext2_perplexity")
    assert [margins.of(parse_metric(c)) for c in columns] == [0.02, 0.02, 0.01, None, None, None]
