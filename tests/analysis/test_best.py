"""Fronts, the best precision for a number of bits with its confidence, and the best cell for a memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.metrics import parse_metric
from analysis.scaling import Cache, Use, best_by_budget, best_for_memory, comparable_metric, pareto
from analysis.scaling.budgets import family_budgets
from analysis.scaling.memory import GB
from analysis.significance import compare_loss
from tests.analysis.studies import Study, diverge

LOSS = parse_metric("jargon_loss")
ACC = parse_metric("jargon_choice_acc")

OPT: dict[str, tuple[float, float, int, int]] = {
    "opt-30b": (29.97e9, 29.2e9, 48, 7168),
    "opt-66b": (65.72e9, 65.2e9, 64, 9216),
    "opt-175b": (175e9, 174.1e9, 96, 12288),
}
"""Parameters, of which quantized, layers and hidden size (Zhang et al. 2022, Table 1)."""
ACCURACY = {"opt-30b": 0.700, "opt-66b": 0.715, "opt-175b": 0.735}
LOST = {16: 0.0, 8: 0.0, 6: 0.001, 5: 0.002, 4: 0.006, 3: 0.05}
"""Mean zero-shot accuracy, and what precisions lose of it: of the size of the paper's Figure 2."""


def opt(models: tuple[str, ...] = tuple(OPT)) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for model in models:
        params, quantized, _, _ = OPT[model]
        for bits, lost in LOST.items():
            per = 16.0 if bits == 16 else bits + 0.25
            total = quantized * per + (params - quantized) * 16
            rows.append(
                {
                    **{"key": f"{model} {bits}", "status": "done", "family": "opt", "model": model, "params": params},
                    **{"method": "baseline" if bits == 16 else "blockwise", "bits": bits, "label": f"{bits}-bit"},
                    **{"dtype": None if bits == 16 else "float", "blocksize": None if bits == 16 else 64},
                    **{"bits_per_param": per, "bits_per_param_nominal": per, "total_bits": total},
                    **{"total_bits_nominal": total, "zero_shot_mean": ACCURACY[model] - lost},
                    **{"zero_shot_mean_stderr": 0.004},
                }
            )
    return pd.DataFrame(rows)


CACHES = {model: Cache(values=2 * layers * hidden, context=2048) for model, (_, _, layers, hidden) in OPT.items()}
MEAN = parse_metric("zero_shot_mean")


def test_48_gb_hold_a_66b_model_at_5_bits_and_no_175b_model_at_4() -> None:
    found = best_for_memory(opt(), MEAN, Use(memory=48 * GB), CACHES)
    best = found.ranked.iloc[0]
    assert (best["model"], best["bits"]) == ("opt-66b", 5)
    # 65.2e9 weights of 5.25 bits and the rest of 16; 2 x 64 x 9216 values of 2 bytes for each of 2048 tokens; 1 GB.
    weights = (65.2e9 * 5.25 + 0.52e9 * 16) / 8
    cache = 2 * 64 * 9216 * 2 * 2048
    assert best["weights"] == pytest.approx(weights, abs=1)
    assert best["cache"] == cache
    assert best["needed"] == pytest.approx(weights + cache + 2**30, abs=1)
    larger = found.larger
    four = larger[(larger["model"] == "opt-175b") & (larger["bits"] == 4)].iloc[0]
    assert four["needed"] > 90 * GB
    assert four["value"] > best["value"]
    assert larger["needed"].is_monotonic_increasing
    # 6 bits of the same model don't fit.
    assert larger.iloc[0][["model", "bits"]].tolist() == ["opt-66b", 6]


def test_more_memory_or_less_context_moves_the_choice() -> None:
    def choice(use: Use) -> tuple[str, int]:
        best = best_for_memory(opt(), MEAN, use, CACHES).ranked.iloc[0]
        return str(best["model"]), int(best["bits"])

    assert choice(Use(memory=100 * GB)) == ("opt-175b", 4)
    assert choice(Use(memory=48 * GB, context=128)) == ("opt-66b", 5)
    assert choice(Use(memory=52 * GB)) == ("opt-66b", 5)
    assert choice(Use(memory=54 * GB)) == ("opt-66b", 6)
    # Eight sequences take eight caches.
    assert choice(Use(memory=48 * GB, batch=8)) == ("opt-30b", 6)


def test_nothing_fits_and_what_needs_least_is_named() -> None:
    found = best_for_memory(opt(("opt-175b",)), MEAN, Use(memory=24 * GB), CACHES)
    assert found.ranked.empty
    assert found.larger.iloc[0]["bits"] == 3


@pytest.mark.parametrize("lacks", [{"zero_shot_mean": np.nan}, {"status": "diverged"}])
def test_without_a_value_nothing_is_chosen(lacks: dict[str, Any]) -> None:
    found = best_for_memory(opt().assign(**lacks), MEAN, Use(memory=48 * GB), CACHES)
    assert found.ranked.empty
    assert found.larger.empty


def test_a_model_whose_cache_is_unknown_is_named_and_not_chosen() -> None:
    found = best_for_memory(opt(), MEAN, Use(memory=48 * GB), {**CACHES, "opt-66b": Cache(values=None)})
    assert found.ranked.iloc[0]["model"] == "opt-30b"
    assert list(found.unknown) == ["opt-66b"]


def test_a_sequence_is_no_longer_than_its_models_context() -> None:
    use = Use(memory=48 * GB, context=4096)
    found = best_for_memory(opt(), MEAN, use, {**CACHES, "opt-30b": Cache(values=1000)}).ranked
    assert set(found.loc[found["model"] == "opt-66b", "context"]) == {2048}
    assert set(found.loc[found["model"] == "opt-30b", "context"]) == {4096}


def test_differences_are_paired_on_samples_where_there_are_any(study: Study) -> None:
    caches = {model: Cache(values=1000) for model in study.wide["model"].unique()}
    loaded: list[str] = []

    def load(keys: Any) -> Any:
        loaded.extend(keys)
        return study.samples

    use = Use(memory=2 * GB, reserve=GB)
    found = best_for_memory(study.wide, LOSS, use, caches, load=load, top=3).ranked
    best, second = found.iloc[0], found.iloc[1]
    oracle = compare_loss(study.samples[second["key"], "jargon"], study.samples[best["key"], "jargon"])
    assert second[["behind", "low", "high"]].tolist() == pytest.approx([oracle.difference, oracle.low, oracle.high])
    assert second["paired"]
    # The first three, and the best of the two other models.
    assert len(loaded) == 5
    assert found["behind"].notna().sum() == 4
    other = found[found["model"] == "neox-xs"].iloc[0]
    assert other["significant"]
    unpaired = best_for_memory(study.wide, LOSS, use, caches, top=3).ranked.iloc[1]
    assert not unpaired["paired"]
    assert unpaired["high"] - unpaired["low"] > 3 * (second["high"] - second["low"])


def test_bits_per_byte_are_paired_as_the_loss_is(study: Study) -> None:
    caches = {model: Cache(values=1000) for model in study.wide["model"].unique()}
    metric = parse_metric("jargon_bits_per_byte", study.wide)
    use = Use(memory=2 * GB)
    found = best_for_memory(study.wide, metric, use, caches, load=lambda _: study.samples).ranked.iloc[1]
    nats = best_for_memory(study.wide, LOSS, use, caches, load=lambda _: study.samples).ranked.iloc[1]
    assert found["paired"]
    assert found["behind"] == pytest.approx(found["value"] - best_value(study, metric.column))
    assert found["low"] == pytest.approx(nats["low"] / np.log(2) / 2.9)


def best_value(study: Study, column: str) -> float:
    return float(study.wide[column].min())


def test_families_are_compared_by_what_no_tokenizer_changes(study: Study) -> None:
    other = study.wide.assign(family="opt", key=study.wide["key"] + "'", model=study.wide["model"] + "'")
    both = pd.concat([study.wide, other], ignore_index=True)
    assert comparable_metric(study.wide) == parse_metric("jargon_loss", study.wide)
    chosen = comparable_metric(both)
    assert chosen is not None
    assert chosen.column == "jargon_bits_per_byte"
    with pytest.raises(ValueError, match="neox, opt don't compare"):
        best_for_memory(both, LOSS, Use(memory=GB), {})
    assert comparable_metric(study.wide.iloc[:0]) is None


def test_replicates_are_one_choice_with_their_mean(study: Study) -> None:
    wide = study.wide[study.wide["model"] == "neox-s"].head(1)
    twice = pd.concat([wide, wide.assign(key="again", jargon_loss=wide["jargon_loss"] + 0.2)], ignore_index=True)
    found = best_for_memory(twice, LOSS, Use(memory=2 * GB), {"neox-s": Cache(values=10)}).ranked
    assert len(found) == 1
    assert found["value"].iloc[0] == pytest.approx(wide["jargon_loss"].iloc[0] + 0.1)


def test_replicates_are_behind_by_the_difference_of_what_is_shown(study: Study) -> None:
    """They have no samples of their mean: their interval is of their spread and of the texts."""
    wide = study.wide[study.wide["model"] == "neox-s"]
    ordered = wide.sort_values("jargon_loss", kind="stable")
    best, own = ordered.iloc[:1], ordered.iloc[1:2]
    again = own.assign(key="again", jargon_loss=own["jargon_loss"] + 0.2)
    asked: list[str] = []

    def load(keys: Any) -> Any:
        asked.extend(keys)
        return study.samples

    use, caches = Use(memory=2 * GB), {"neox-s": Cache(values=10)}
    several = pd.concat([best, own, again], ignore_index=True)
    found = best_for_memory(several, LOSS, use, caches, load=load).ranked
    assert found["replicates"].tolist() == [1, 2]
    row = found.iloc[1]
    assert row["behind"] == pytest.approx(row["value"] - found["value"].iloc[0])
    assert not row["paired"]
    spread = 0.2 / np.sqrt(2)
    texts = [float(c["jargon_loss_stderr"].iloc[0]) for c in (own, best)]
    half = 1.959964 * np.sqrt(spread**2 + texts[0] ** 2 + texts[1] ** 2)
    assert row["high"] - row["behind"] == pytest.approx(half, rel=1e-5)
    assert "again" not in asked
    # Where the best is a mean nothing is paired with it.
    asked.clear()
    better = best.assign(key="better", jargon_loss=best["jargon_loss"] - 0.2)
    found = best_for_memory(pd.concat([best, better, own], ignore_index=True), LOSS, use, caches, load=load).ranked
    assert found["replicates"].tolist() == [2, 1]
    assert not found["paired"].iloc[1]
    assert found["behind"].iloc[1] == pytest.approx(found["value"].iloc[1] - found["value"].iloc[0])
    assert not asked


def test_a_front_is_what_no_cell_beats_in_size_and_loss(study: Study) -> None:
    front = pareto(study.wide, LOSS)
    cells = study.wide[["total_bits", "jargon_loss"]].to_numpy()
    expected = [
        key
        for key, (bits, loss) in zip(study.wide["key"], cells, strict=True)
        if not ((cells[:, 0] <= bits) & (cells[:, 1] <= loss) & ((cells[:, 0] < bits) | (cells[:, 1] < loss))).any()
    ]
    assert set(front["key"]) == set(expected)
    assert front["total_bits"].is_monotonic_increasing
    assert front["value"].is_monotonic_decreasing
    accuracy = pareto(study.wide, ACC)
    assert accuracy["value"].is_monotonic_increasing


def test_losses_have_a_front_for_each_family_and_accuracies_one(study: Study) -> None:
    other = study.wide.assign(family="opt", key=study.wide["key"] + "'", jargon_loss=study.wide["jargon_loss"] + 1)
    both = pd.concat([study.wide, other], ignore_index=True)
    assert set(pareto(both, LOSS)["family"]) == {"neox", "opt"}
    assert len(pareto(both, ACC)) == len(pareto(study.wide, ACC))
    assert set(pareto(both, ACC)["family"]) == {"neox"}  # of equals the first stays


def test_what_diverged_is_on_no_front(study: Study) -> None:
    best = pareto(study.wide, LOSS)["key"].iloc[-1]
    wide = study.wide.copy()
    wide.loc[wide["key"] == best, "status"] = "diverged"
    assert best not in set(pareto(wide, LOSS)["key"])
    assert pareto(study.wide.iloc[:0], LOSS).empty


def test_a_clear_best_is_sure_over_texts_and_models(study: Study) -> None:
    best = best_by_budget(study.wide, LOSS, study.samples).dropna(subset=["bits"])
    assert len(best) > 10
    clear = best[best["low"] > 0]
    assert len(clear)
    assert (clear["confidence"] > 0.97).all()
    assert (best["low"] <= best["margin"]).all()
    assert (best["margin"] <= best["high"]).all()
    assert set(best["windows"]) == {24}
    assert best["confidence_models"].between(0, 1).all()
    unsampled = best_by_budget(study.wide, LOSS)
    assert unsampled["confidence"].isna().all()
    assert (unsampled["windows"] == 0).all()


def crossing(seed: int, ahead: float) -> tuple[pd.DataFrame, dict[Any, Any]]:
    """Two models at 3 and 4 bits and the same total bits; 4 bits are better by ``ahead`` nats on all texts."""
    rng = np.random.default_rng(seed)
    rows, samples = [], {}
    texts = rng.normal(0, 0.3, 40)
    for i, size in enumerate((1e9, 8e9)):
        for bits in (3, 4):
            nats = 100 * (3.0 - 0.2 * i + texts + rng.normal(0, 0.02, 40) - ahead * (bits == 4))
            key = f"{i} {bits}"
            samples[key, "jargon"] = {"nats": nats, "tokens": np.full(40, 100)}
            rows.append(
                {
                    **{"key": key, "model": f"m{i}", "bits": bits, "total_bits": size * 4, "diverged": False},
                    "value": nats.sum() / 4000,
                }
            )
    return pd.DataFrame(rows), samples


def covered(trials: int) -> tuple[float, float]:
    """(share of intervals that hold the planted margin, share of null studies in which they leave out 0)."""
    held, false = 0, 0
    for seed in range(trials):
        df, samples = crossing(seed, 0.01)
        row = family_budgets(df, LOSS, samples, [1e10]).iloc[0]
        low, high = (row["low"], row["high"]) if row["bits"] == 4 else (-row["high"], -row["low"])
        held += low <= 0.01 <= high
        df, samples = crossing(seed + 10**6, 0.0)
        row = family_budgets(df, LOSS, samples, [1e10]).iloc[0]
        false += row["low"] > 0
    return held / trials, false / trials


def test_planted_margins_are_held_by_their_intervals() -> None:
    held, false = covered(40)
    assert held > 0.8
    assert false < 0.2


@pytest.mark.slow
def test_planted_margins_are_held_as_often_as_intervals_say() -> None:
    trials = 600
    error = np.sqrt(0.05 * 0.95 / trials)
    held, false = covered(trials)
    # The percentile interval of 40 windows is a little narrow.
    assert held > 0.95 - 0.015 - 2.6 * error
    assert false < 0.05 + 0.015 + 2.6 * error


def test_equal_precisions_are_best_half_of_the_time() -> None:
    df, samples = crossing(3, 0.0)
    row = family_budgets(df, LOSS, samples, [1e10]).iloc[0]
    assert row["low"] < 0 < row["high"]
    assert 0.4 < row["confidence"] < 1


def test_a_precision_that_diverged_is_never_best(study: Study) -> None:
    four = study.wide["bits"] == 4
    best = best_by_budget(diverge(study, four).wide, LOSS, study.samples)
    assert 4 not in set(best["bits"].dropna())
    assert (best["confidence"].dropna() > 0).all()


def test_budgets_that_no_model_reaches_have_no_best(study: Study) -> None:
    best = best_by_budget(study.wide, LOSS, study.samples, budgets=[1.0, 1e15])
    assert best["bits"].isna().all()
    assert best_by_budget(study.wide.iloc[:0], LOSS).empty
