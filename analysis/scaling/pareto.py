"""Pareto fronts: the cells that no other beats in size and metric at once."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.cells import measured, numbers
from analysis.metrics import Metric

PER_TOKEN = frozenset({"loss", "perplexity", "word_perplexity", "kl"})
"""Metrics that depend on the tokenizer, so that only models of one family compare."""

_COLUMNS = ["family", "model", "label", "method", "dtype", "bits", "blocksize", "bits_per_param", "total_bits"]


def pareto(df: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Return the cells that are on the front: every cell with as few bits is worse, whatever its method.

    A metric that depends on the tokenizer has a front for each family. Of cells that are equal in both, the first
    stays. A cell that diverged, or whose size is unknown, is on no front.

    Args:
        df: a wide result table, all methods.
        metric: its direction must be known.

    Returns:
        One row a cell of a front, by family and total bits: key, family, model, label, method, dtype, bits, blocksize,
        bits_per_param, total_bits (bits as stored), value.
    """
    rows = measured(df)
    if "label" not in rows.columns:
        rows = rows.assign(label=None)
    value = numbers(rows, metric.column)
    cells = rows[["key", *_COLUMNS]].assign(value=value, total_bits=numbers(rows, "total_bits"))
    status = rows[metric.status_column] if metric.eval and metric.status_column in rows.columns else rows["status"]
    usable = np.isfinite(value) & np.isfinite(cells["total_bits"]) & (status != "diverged")
    cells = cells[usable]
    apart = metric.metric in PER_TOKEN
    groups = [own for _, own in cells.groupby("family", sort=True)] if apart else [cells]
    fronts = [_front(own, metric.sign) for own in groups if len(own)]
    return pd.concat(fronts, ignore_index=True) if fronts else cells.reset_index(drop=True)


def _front(cells: pd.DataFrame, sign: float) -> pd.DataFrame:
    ordered = cells.assign(_rank=sign * cells["value"]).sort_values(["total_bits", "_rank"], kind="stable")
    best_before = ordered["_rank"].cummin().shift(fill_value=np.inf)
    return ordered[ordered["_rank"] < best_before].drop(columns="_rank")
