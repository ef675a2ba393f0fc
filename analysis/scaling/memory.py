"""The best model and quantization for a memory: what fits with its key-value cache, ranked, with paired differences.

The paper's example (section 7): 48 GB hold a 66B model at 5 bits and no 175B model at 4, so 5 bits are then best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import pandas as pd

from analysis.cells import MEASURED, measured, numbers
from analysis.metrics import ZERO_SHOT_TASKS, Metric, metric_columns, parse_metric, primary_loss, stderr, zero_shot
from analysis.replicates import pool, replicate_groups
from analysis.scaling.pareto import PER_TOKEN
from analysis.significance import Comparison, SampleKey, Samples, can_pair, compare, mean_of_tasks, normal

GB: Final = 2**30
"""Bytes of a gigabyte, as GPUs are sold: 48 GB are 48 x 2^30 bytes."""
RESERVE: Final = GB
"""Kept for the driver, the kernels and activations."""
CACHE_BYTES: Final = 2
"""Of a value in the key-value cache: 16 bits."""

LoadSamples = Callable[[Sequence[str]], Mapping[SampleKey, Samples]]
"""Gives outcomes by (cell key, eval) of some cells, by key."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """What a model has to fit, and how it is used.

    Attributes:
        memory: bytes.
        context: tokens of a sequence in the cache.
        batch: sequences at once.
        reserve: bytes that are kept free.
    """

    memory: int
    context: int = 2048
    batch: int = 1
    reserve: int = RESERVE


@dataclass(frozen=True, kw_only=True)
class Cache:
    """What is known of a model's cache.

    Attributes:
        values: keys and values of a token (``kbit.models.kv_cache``); None where unknown.
        context: the longest sequence that the model takes; None without a limit, or where unknown.
        why: why a model without values can't be considered.
    """

    values: int | None
    context: int | None = None
    why: str = "the size of its key-value cache is not known"


@dataclass(frozen=True, kw_only=True)
class Best:
    """The answer.

    Attributes:
        metric: what is compared.
        use: what had to fit.
        ranked: the cells that fit, best first: key, family, model, label, bits, bits_per_param, total_bits, value,
            stderr (with the replicates' spread), replicates (how many; key is the first's), context (tokens of a
            sequence: at most the model's), weights, cache, reserve, needed (bytes, the sum of the three), and of the
            first ``top`` and each model's best: behind (how much worse than the best, metric's
            unit), low, high (95 % interval), paired (on the same samples), significant.
        larger: cells that don't fit and are better than the best that does (all, where nothing fits), the one that
            needs least first; the same columns without the comparison.
        unknown: models with measured cells that were not considered, with the reason.
    """

    metric: Metric
    use: Use
    ranked: pd.DataFrame
    larger: pd.DataFrame
    unknown: Mapping[str, str]


_CELL: Final = ["key", "family", "model", "label", "bits", "bits_per_param", "total_bits", "value", "stderr", "context"]
_COLUMNS: Final = [*_CELL, "replicates", "weights", "cache", "reserve", "needed"]


def comparable_metric(df: pd.DataFrame) -> Metric | None:
    """Return what models of a table are compared by: the primary loss within one family, else what doesn't depend on
    a tokenizer: the zero-shot mean, or bits per byte of the primary loss's text; None without any.
    """
    rows = measured(df)
    loss = primary_loss(rows)
    families = len(_families(rows))
    if families < 2 and loss is not None:
        return loss
    mean = zero_shot(rows)
    if mean is not None:
        return mean
    per_byte = f"{loss.eval}_bits_per_byte" if loss is not None else ""
    if per_byte in rows.columns:
        return parse_metric(per_byte, rows)
    others = [m for m in metric_columns(rows) if m.higher_is_better is not None and rows[m.column].notna().any()]
    return next((m for m in others if m.metric not in PER_TOKEN), None)


def best_for_memory(
    df: pd.DataFrame,
    metric: Metric,
    use: Use,
    caches: Mapping[str, Cache],
    *,
    load: LoadSamples | None = None,
    top: int = 5,
) -> Best:
    """Return the best cell that fits into a memory, and those behind it.

    A cell takes its weights as they are stored (codes, absmax, codebooks, and at 16 bits what isn't quantized), the
    keys and values of ``batch`` sequences of ``context`` tokens in 16 bits, and the reserve. Replicates are one cell
    with their mean. A cell that diverged, or that has no value, is not considered.

    Args:
        df: a wide result table.
        metric: its direction must be known. Losses and perplexities compare only models of one tokenizer.
        use: the memory, and how the model is used.
        caches: by model, as the table names it. A sequence is no longer than its model's context.
        load: gives samples of some cells, for paired intervals; without it intervals come from standard errors.
        top: how many of the best are compared, besides the best of each other model.

    Raises:
        ValueError: the metric depends on the tokenizer, and there are several families.
    """
    rows = measured(df)
    families = _families(rows[numbers(rows, metric.column).notna()])
    if metric.metric in PER_TOKEN and len(families) > 1:
        raise ValueError(f"{metric.column} depends on the tokenizer, so {', '.join(families)} don't compare by it")
    cells = _cells(rows, metric)
    unknown = _unknown(cells, caches)
    cells = cells[~cells["model"].isin(unknown)]
    needs = _needs(cells, caches, use)
    order = needs.assign(_rank=metric.sign * needs["value"]).sort_values(["_rank", "needed"], kind="stable")
    fits = order["needed"] <= use.memory
    ranked = order[fits].drop(columns="_rank").reset_index(drop=True)
    better = order[~fits]
    if len(ranked):
        better = better[better["_rank"] < metric.sign * ranked["value"].iloc[0]]
    larger = better.sort_values("needed", kind="stable").drop(columns="_rank").reset_index(drop=True)
    return Best(
        metric=metric, use=use, ranked=_compared(ranked, rows, metric, load, top), larger=larger, unknown=unknown
    )


def _families(rows: pd.DataFrame) -> list[str]:
    """Families without their checkpoints."""
    return list(dict.fromkeys(str(f).partition("@")[0] for f in rows["family"].unique()))


def _cells(rows: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Cells with a finite value, replicates in one row."""
    status = rows[metric.status_column] if metric.eval and metric.status_column in rows.columns else rows["status"]
    found = pd.DataFrame(
        {
            **{c: rows[c] for c in ("key", "family", "model")},
            "label": rows["label"] if "label" in rows.columns else rows["method"],
            "bits": numbers(rows, "bits"),
            "bits_per_param": numbers(rows, "bits_per_param"),
            "total_bits": numbers(rows, "total_bits").fillna(numbers(rows, "total_bits_nominal")),
            "value": numbers(rows, metric.column),
            "stderr": stderr(rows, metric),
        }
    )
    usable = np.isfinite(found["value"]) & (status != "diverged") & found["total_bits"].notna()
    if metric.eval:
        usable &= status.isin(MEASURED)
    groups = replicate_groups(rows)[usable]
    own = found[usable].assign(diverged=False)
    pooled = pool(own, groups.set_axis(own["key"]))
    # Another draw would change a mean of several, and so would other texts.
    of_texts = own["stderr"].groupby(groups).transform("mean")[pooled.index]
    both = pd.Series(np.hypot(pooled["stderr"], of_texts), index=pooled.index)
    pooled["stderr"] = pooled["stderr"].where(pooled["replicates"] == 1, both)
    return pooled.reset_index(drop=True)


def _cache(caches: Mapping[str, Cache], model: str) -> Cache:
    """A model's cache; of a name that the table gave a revision, its plain name's: the architecture is the same."""
    return caches.get(model) or caches.get(model.rpartition("@")[0]) or Cache(values=None)


def _unknown(cells: pd.DataFrame, caches: Mapping[str, Cache]) -> dict[str, str]:
    models = {model: _cache(caches, model) for model in dict.fromkeys(map(str, cells["model"]))}
    return {model: cache.why for model, cache in models.items() if cache.values is None}


def _needs(cells: pd.DataFrame, caches: Mapping[str, Cache], use: Use) -> pd.DataFrame:
    of_model = [_cache(caches, str(m)) for m in cells["model"]]
    context = np.array([min(use.context, c.context or use.context) for c in of_model], dtype=np.int64)
    values = np.array([c.values or 0 for c in of_model], dtype=np.int64)
    # Bits are counted exactly, but a byte is what memory has.
    weights = np.ceil(cells["total_bits"].to_numpy(dtype=float) / 8).astype(np.int64)
    cache = values * context * use.batch * CACHE_BYTES
    needed = weights + cache + use.reserve
    needs = cells.assign(context=context, weights=weights, cache=cache, reserve=use.reserve, needed=needed)
    columns: pd.DataFrame = needs[_COLUMNS]
    return columns


def _compared(
    ranked: pd.DataFrame, rows: pd.DataFrame, metric: Metric, load: LoadSamples | None, top: int
) -> pd.DataFrame:
    """Add how far the first ``top`` cells, and the best of each model, are behind the best."""
    wanted = ranked.index[(ranked.index < top) | ~ranked["model"].duplicated()]
    single = ranked.loc[wanted, "replicates"] == 1
    # A mean of replicates has no samples of its own, so that nothing is paired with it.
    pairs = load is not None and single.sum() > 1 and single.iloc[0]
    samples = load(ranked.loc[wanted[single], "key"].tolist()) if load is not None and pairs else {}
    table = rows.drop_duplicates("key").set_index("key")
    found: dict[int, tuple[float, float, float, bool, bool]] = {}
    for i in wanted[1:]:
        best, own = ranked.loc[wanted[0]], ranked.loc[i]
        both_single = best["replicates"] == own["replicates"] == 1
        interval = _paired(best, own, metric, samples, table) if both_single else None
        paired = interval is not None
        if interval is None:
            interval = _apart(float(best["value"]), float(own["value"]), float(best["stderr"]), float(own["stderr"]))
        sign = -metric.sign
        low, high = sorted((sign * interval.low, sign * interval.high))
        found[i] = (sign * interval.difference, low, high, paired, interval.significant)
    names = ["behind", "low", "high", "paired", "significant"]
    table = pd.DataFrame.from_dict(found, orient="index", columns=names)
    return ranked.join(table)


def _paired(
    best: pd.Series, own: pd.Series, metric: Metric, samples: Mapping[SampleKey, Samples], table: pd.DataFrame
) -> Comparison | None:
    """Best minus other on the same samples, in the metric's unit; None where they can't be paired."""
    evals = [metric.eval] if metric.eval else list(ZERO_SHOT_TASKS)
    # Within a family windows are the same; across them equal numbers of tokens would be an accident.
    loss = metric.metric in ("loss", "bits_per_byte", "perplexity")
    if loss and best["family"] != own["family"]:
        return None
    name = "loss" if loss else metric.metric
    each = []
    for eval_name in evals:
        a, b = (samples.get((str(cell["key"]), eval_name)) for cell in (best, own))
        if a is None or b is None or not can_pair(a, b, name):
            return None
        each.append(compare(a, b, name))
    if metric.metric == "perplexity":
        return None
    if metric.metric == "bits_per_byte":
        unit = float(table.loc[best["key"], metric.column] / table.loc[best["key"], f"{metric.eval}_loss"])
        return _scaled(each[0], unit)
    return mean_of_tasks(each)


def _scaled(c: Comparison, unit: float) -> Comparison:
    return replace(c, difference=c.difference * unit, low=c.low * unit, high=c.high * unit, stderr=c.stderr * unit)


def _apart(a: float, b: float, error_a: float, error_b: float) -> Comparison:
    return normal(a - b, float(np.hypot(error_a, error_b)), 0)


__all__ = ["CACHE_BYTES", "GB", "RESERVE", "Best", "Cache", "Use", "best_for_memory", "comparable_metric"]
