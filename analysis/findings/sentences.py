"""Findings: sentences computed from a result table, each on one of the paper's questions (section 5, Appendix C)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Final

import numpy as np
import pandas as pd

from analysis.cells import (
    baselines,
    block_name,
    exponents_text,
    measured,
    numbers,
    one_exponent,
    ordered_dtypes,
    plain,
    points,
    some_eval_diverged,
    with_baseline,
)
from analysis.metrics import Metric, ranked_metrics
from analysis.scaling import best_precision, budget_grid, common_range, scaling_points
from analysis.significance import Comparison, SampleKey, Samples, can_pair, compare_mean_loss, sample_keys
from kbit.specs.base import BASELINE_BITS

_BLOCKSIZE: Final = 64
_HIGH: Final = (6, 7, 8)
_PAPER_FRACTION: Final = 0.02
_FRACTIONS: Final = 2
"""Fractions of outlier dimensions of which each has its sentences."""


def findings(df: pd.DataFrame, samples: Mapping[SampleKey, Samples] | None = None) -> list[str]:
    """Return what a study shows, in sentences with their numbers; a sentence that the data don't support is left out.

    Args:
        df: a wide result table.
        samples: per-sample outcomes, for confidence intervals; ``wanted_samples`` says which.

    Returns:
        In order: the best precision for a number of model bits (a sentence a family and headline metric); then, of the
        first headline metric, data types and block sizes at 4 bits, 6 to 8 bits against 16, outlier dimensions;
        divergence.
    """
    metrics = ranked_metrics(df)
    if not metrics:
        return []
    metric, rows, samples = metrics[0], measured(df), samples or {}
    cells = with_baseline(points(plain(rows), metric), points(baselines(rows), metric))
    return [
        *(sentence for m in metrics for sentence in _best_precision(df, m)),
        *_data_types(cells, metric, samples),
        *_block_sizes(cells, metric, samples),
        *_high_precision(cells, metric),
        *_outliers(rows, cells, metric, samples),
        *_divergence(rows),
    ]


def wanted_samples(df: pd.DataFrame, long_df: pd.DataFrame) -> dict[str, SampleKey]:
    """Measurement key -> (cell key, eval) of the outcomes that ``findings`` and the figures compare.

    Those of the first headline metric at 3, 4 and 16 bits. Use: ``wanted = wanted_samples(df, long_df)``, then
    ``{wanted[m]: s for m, s in load_samples(out, list(wanted)).items()}``.
    """
    metrics = ranked_metrics(df)
    if not metrics or not metrics[0].eval:
        return {}
    rows = measured(df)
    keys = set(rows.loc[numbers(rows, "bits").isin([3, 4, BASELINE_BITS]), "key"])
    found = long_df[(long_df["eval"] == metrics[0].eval) & long_df["key"].isin(keys)]
    return sample_keys(found)


def _best_precision(df: pd.DataFrame, metric: Metric) -> list[str]:
    curves, dtype = scaling_points(df, metric)
    said = []
    for family, own in curves.groupby("family"):
        span = common_range(own)
        if span is None:
            # Few models: a small one at 16 bits may have more bits than a large one at 3.
            own = own[own["bits"] != BASELINE_BITS]
            span = common_range(own)
        if span is None:
            continue
        best = best_precision(own, metric, budget_grid(*span)).dropna(subset=["bits"])
        if best.empty:
            continue
        exponents = exponents_text(own)
        share = best["bits"].astype(int).value_counts(normalize=True)
        parts = [f"{bits}-bit over {_share(part)}" for bits, part in share.items()]
        where = parts[0].replace("over 100%", "throughout") if len(parts) == 1 else ", ".join(parts) + " of that range"
        margin = best.loc[best["bits"] == share.index[0], "margin"].mean()
        ahead = f" ({_amount(margin, metric)} ahead of the next on average)" if np.isfinite(margin) else ""
        said.append(
            f"Best precision for a fixed number of model bits, {family}, {_bits(span[0])} to {_bits(span[1])}: "
            f"{where}{ahead}; {metric.phrase}, {dtype}, block size {_BLOCKSIZE}"
            + (f" (exponent bits: {exponents})." if exponents else ".")
        )
    return said


def _data_types(cells: pd.DataFrame, metric: Metric, samples: Mapping[SampleKey, Samples]) -> list[str]:
    at = cells[(cells["bits"] == 4) & (cells["blocksize"] == _BLOCKSIZE) & cells["baseline"].notna()]
    at = _balanced(one_exponent(at, ["dtype", "bits"]), "dtype")
    at = at.assign(name=[_dtype_name(d, e) for d, e in zip(at["dtype"], at["exponent_bits"], strict=True)])
    names = dict.fromkeys(name for d in ordered_dtypes(at) for name in at.loc[at["dtype"] == d, "name"])
    if len(names) < 2:
        return []
    means, diverged = _means(at, "name")
    ranked = sorted((n for n in names if n in means), key=lambda n: metric.sign * means[n])
    # What diverged anywhere has no mean over the same models: it stands last, the most often diverged at the end.
    last = sorted((n for n in names if n in diverged), key=lambda n: diverged[n])
    listed = _listed([*ranked, *last], means, diverged, at, metric)
    proof = _interval_text(at, "name", ranked[0], ranked[1], metric, samples) if len(ranked) > 1 else ""
    return [
        f"Data types at 4 bits, block size {_BLOCKSIZE}, change of {metric.phrase} from 16-bit{_unit(metric)}, "
        f"{_models(at)}: {listed}.{proof}"
    ]


def _block_sizes(cells: pd.DataFrame, metric: Metric, samples: Mapping[SampleKey, Samples]) -> list[str]:
    at = cells[(cells["bits"] == 4) & cells["baseline"].notna()]
    at = one_exponent(at, ["dtype", "bits"], axis="blocksize")
    said = []
    for dtype in ordered_dtypes(at):
        own = _balanced(at[at["dtype"] == dtype], "blocksize")
        sizes = sorted(own["blocksize"].unique(), key=lambda b: b or np.inf)
        if len(sizes) < 2:
            continue
        means, diverged = _means(own, "blocksize")
        listed = _listed(sizes, means, diverged, own, metric)
        finite = [b for b in sizes if b in means]
        proof = _interval_text(own, "blocksize", finite[0], finite[-1], metric, samples) if len(finite) > 1 else ""
        said.append(
            f"Block sizes at 4 bits, {_dtype_name(dtype, own['exponent_bits'].iloc[0])}, change of {metric.phrase} "
            f"from 16-bit{_unit(metric)}, {_models(own)}: {listed}.{proof}"
        )
    return said


def _high_precision(cells: pd.DataFrame, metric: Metric) -> list[str]:
    at = cells[cells["bits"].isin(_HIGH) & (cells["blocksize"] == _BLOCKSIZE) & cells["baseline"].notna()]
    at = one_exponent(at, ["dtype", "bits"])
    if set(at["bits"]) != set(_HIGH):
        return []
    change = at["change"].abs().to_numpy()
    farthest = at.iloc[int(change.argmax())]
    if not np.isfinite(change.max()):
        return []
    loss = metric.metric == "loss"
    size = f"perplexity within {np.expm1(change.max()):.2%}" if loss else f"{metric.phrase} within {change.max():.4f}"
    return [
        f"6 to 8 bits, block size {_BLOCKSIZE}: {size} of 16-bit in all {len(at)} cells; farthest "
        f"{_dtype_name(farthest['dtype'], farthest['exponent_bits'])} at {farthest['bits']} bits, {farthest['model']}."
    ]


def _outliers(
    rows: pd.DataFrame, cells: pd.DataFrame, metric: Metric, samples: Mapping[SampleKey, Samples]
) -> list[str]:
    said = []
    fractions = sorted(f for f in numbers(rows, "outlier_fraction").dropna().unique() if f > 0)
    if len(fractions) > _FRACTIONS:  # the claims have them all
        fractions = [min(fractions, key=lambda f: abs(f - _PAPER_FRACTION))]
    for fraction in fractions:
        kept = _with_and_without(points(plain(rows, outlier_fraction=fraction), metric), cells)
        for (bits, dtype, blocksize), own in kept.groupby(["bits", "dtype", "blocksize"]):
            name = _dtype_name(str(dtype), own["exponent_bits"].iloc[0])
            about = (
                f"{100 * fraction:g} % outlier dimensions in 16 bits, {name} at {bits} bits, block size "
                f"{block_name(int(str(blocksize)))}: "
            )
            gone = own["diverged"] | own["diverged_without"]
            if gone.any():
                with_, without = own["diverged"].sum(), own["diverged_without"].sum()
                about += f"diverged on {with_} of {len(own)} models with them, on {without} without"
                own = own[~gone]
                if own.empty:
                    said.append(f"{about}.")
                    continue
                about += "; over the others, "
            change = (own["value"] - own["value_without"]).mean()
            extra = (own["bits_per_param"] - own["bits_per_param_without"]).mean()
            interval = _mean_interval(own, own["key"], own["key_without"], metric, samples)
            said.append(
                f"{about}change of {metric.phrase}{_unit(metric)}, {_models(own)}: "
                f"{_signed(change, metric)}{_ci(interval, metric)}, for {extra:.2f} more bits per parameter."
            )
    return said


def _with_and_without(kept: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Pair cells with outlier dimensions with those without ('_without'), alike in all else, exponent bits included."""
    columns = list(kept.columns)
    both = [part.assign(outliers=outliers)[[*columns, "outliers"]] for part, outliers in ((kept, 1), (cells, 0))]
    if any(part.empty for part in both):
        return kept.iloc[:0]
    alike = one_exponent(pd.concat(both, ignore_index=True), ["dtype", "bits", "blocksize"], axis="outliers")
    with_, without = (alike[alike["outliers"] == x].drop(columns="outliers") for x in (1, 0))
    same = ["family", "model", "dtype", "bits", "blocksize", "exponent_bits"]
    return with_.merge(without, on=same, suffixes=("", "_without"))


def _divergence(rows: pd.DataFrame) -> list[str]:
    diverged = rows[some_eval_diverged(rows)]
    if diverged.empty:
        return []
    counts = numbers(diverged, "bits").astype("Int64").value_counts().sort_index()
    listed = ", ".join(f"{n} at {bits} bits" for bits, n in counts.items())
    return [f"{len(diverged)} of {len(rows)} measured cells diverged: {listed}."]


def _means(cells: pd.DataFrame, axis: str) -> tuple[dict[Hashable, float], dict[Hashable, int]]:
    """Mean change of each value of an axis that diverged on no model; on how many models the others diverged."""
    counts = cells.groupby(axis)["diverged"].sum()
    means = cells.groupby(axis)["change"].mean()
    return {v: float(means[v]) for v in means.index if not counts[v]}, {v: int(n) for v, n in counts.items() if n}


def _listed(
    values: Sequence[str | int],
    means: Mapping[Hashable, float],
    diverged: Mapping[Hashable, int],
    cells: pd.DataFrame,
    metric: Metric,
) -> str:
    """'int +0.0421, float e2 diverged on 1 of 3 models'."""
    models = len(cells.drop_duplicates(["family", "model"]))
    said = []
    for value in values:
        name = _named(value)
        on = f" on {diverged.get(value)} of {models} models" if models > 1 else ""
        said.append(f"{name} {_signed(means[value], metric)}" if value in means else f"{name} diverged{on}")
    return ", ".join(said)


def _balanced(cells: pd.DataFrame, axis: str) -> pd.DataFrame:
    """Cells of the models that have every value of an axis, so that means over models compare like with like."""
    have = cells.groupby(["family", "model"])[axis].transform("nunique")
    return cells[have == cells[axis].nunique()]


def _interval_text(
    cells: pd.DataFrame,
    axis: str,
    first: str | int,
    second: str | int,
    metric: Metric,
    samples: Mapping[SampleKey, Samples],
) -> str:
    """' int against float e2: -0.0123 (95 % CI ...).', over models that have both; empty without samples to pair."""
    keys = cells.pivot(index=["family", "model"], columns=axis, values="key")
    interval = _mean_interval(keys.reset_index(), keys[first], keys[second], metric, samples)
    if interval is None:
        return ""
    verdict = "" if interval.significant else ", not significant"
    sides = f"{_named(first)} against {_named(second)}"
    return f" {sides}: {_signed(interval.difference, metric)}{_ci(interval, metric)}{verdict}."


def _mean_interval(
    models: pd.DataFrame,
    first: pd.Series[str],
    second: pd.Series[str],
    metric: Metric,
    samples: Mapping[SampleKey, Samples],
) -> Comparison | None:
    """Paired difference of two cells' losses averaged over models, of which the families are known.

    None for other metrics, or where a sample is missing, not finite or can't be paired (of other windows).
    """
    wanted = [((a, metric.eval), (b, metric.eval)) for a, b in zip(first, second, strict=True)]
    if metric.metric != "loss" or not wanted or any(k not in samples for pair in wanted for k in pair):
        return None
    pairs = [(samples[a], samples[b]) for a, b in wanted]
    if not all(can_pair(a, b, metric.metric) for a, b in pairs):
        return None
    # The models of a family share a tokenizer, and with it their windows.
    interval = compare_mean_loss(pairs, models["family"].tolist())
    return interval if np.isfinite(interval.low) else None


def _named(value: str | int) -> str:
    return value if isinstance(value, str) else block_name(value)


def _dtype_name(dtype: str, exponent_bits: float) -> str:
    return dtype if np.isnan(exponent_bits) else f"{dtype} e{exponent_bits:.0f}"


def _ci(interval: Comparison | None, metric: Metric) -> str:
    return f" (95 % CI {_signed(interval.low, metric)} to {_signed(interval.high, metric)})" if interval else ""


def _unit(metric: Metric) -> str:
    return f" in {metric.unit}" if metric.unit else ""


def _signed(value: float, metric: Metric) -> str:
    return f"{value:+.{metric.decimals + (metric.metric == 'loss')}f}"


def _amount(value: float, metric: Metric) -> str:
    return f"{value:.{metric.decimals}f}" + (f" {metric.unit}" if metric.unit else "")


def _share(part: float) -> str:
    return "<1%" if part < 0.01 else f"{part:.0%}"


def _models(cells: pd.DataFrame) -> str:
    names = list(dict.fromkeys(cells.sort_values("params")["model"]))
    return f"mean of {len(names)} models" if len(names) > 1 else str(names[0])


def _bits(value: float) -> str:
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {prefix}bit"
    return f"{value:.0f} bit"
