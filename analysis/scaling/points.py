"""The points that scaling laws are fitted to: one data type at one block size, each cell beside its 16-bit model.

A checkpoint of a model (``sweep.revisions``) is a point of its own. Diverged cells stay: a law takes them as censored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd

from analysis.cells import WHOLE_TENSOR, baselines, measured, numbers, plain, points
from analysis.metrics import Metric
from analysis.scaling.interpolation import scaling_points
from kbit.specs.base import BASELINE_BITS

CENSORED_AT: Final = float(np.log(100))
"""Nats a token that a diverged cell is at least above: perplexity 100, where the paper cuts (Appendix C.5).

A loss is called diverged above ln(vocabulary) + 1, which is more for any vocabulary above 37.
"""
_PREFERRED_BLOCK: Final = 64


@dataclass(frozen=True, kw_only=True)
class LawPoints:
    """The cells that laws are fitted to.

    Attributes:
        cells: one row a cell: key, family (without its checkpoint), curve (the family and checkpoint that a curve over
            sizes is of), model (the same for all checkpoints of one model: the unit of replication), checkpoint,
            params, quantized (parameters in the quantized layers: without embeddings; params where unknown), tokens
            (that the model was trained on, NaN where unknown), bits, bits_per_param, total_bits, value, stderr,
            baseline (its model's 16-bit value, NaN without), change (value - baseline), diverged.
        dtype: the data type of the quantized cells; None without any.
        blocksize: values per block; ``WHOLE_TENSOR`` for the whole tensor.
    """

    cells: pd.DataFrame
    dtype: str | None
    blocksize: int


def law_points(
    df: pd.DataFrame, metric: Metric, *, dtype: str | None = None, blocksize: int | None = None
) -> LawPoints:
    """Return the points of a table that laws are fitted to.

    Args:
        df: a wide result table.
        metric: what is measured.
        dtype: data type; None takes the one that most cells have (of equals float, the paper's).
        blocksize: values per block, ``WHOLE_TENSOR`` for the whole tensor; None takes the one that most cells have (of
            equals 64, the paper's, then the smallest).
    """
    size = fullest_blocksize(df, metric, dtype=dtype) if blocksize is None else blocksize
    curves, dtype = scaling_points(df, metric, dtype=dtype, blocksize=size or None)
    rows = measured(df)
    own = rows.drop_duplicates("key").set_index("key")
    base = points(baselines(rows), metric)
    base = base[np.isfinite(base["value"])].drop_duplicates(["family", "model"])
    of_model = base.set_index(["family", "model"])["value"]
    cells = curves.rename(columns={"family": "curve"})
    pairs = pd.MultiIndex.from_frame(cells[["curve", "model"]])
    checkpoint = cells["key"].map(own["checkpoint"]).astype("object")
    cells = cells.assign(
        checkpoint=checkpoint.where(checkpoint.notna(), None),
        family=_without_checkpoint(cells["curve"], checkpoint),
        model=_without_checkpoint(cells["model"], checkpoint),
        tokens=cells["key"].map(numbers(own, "tokens_seen")).astype("float64"),
        baseline=of_model.reindex(pairs).to_numpy(dtype=np.float64),
    )
    cells = cells.assign(change=cells["value"] - cells["baseline"], quantized=_quantized(cells))
    wanted = ["key", "family", "curve", "model", "checkpoint", "params", "quantized", "tokens", "bits"]
    wanted += ["bits_per_param", "total_bits", "value", "stderr", "baseline", "change", "diverged"]
    cells["bits_per_param"] = cells["bits_per_param"].where(cells["bits"] != BASELINE_BITS, float(BASELINE_BITS))
    return LawPoints(cells=cells[wanted].reset_index(drop=True), dtype=dtype, blocksize=size)


def fullest_blocksize(df: pd.DataFrame, metric: Metric, *, dtype: str | None = None) -> int:
    """Return the block size at which most plain cells have a value; of equals 64, then the smallest; 64 without any."""
    cells = points(plain(measured(df)), metric)
    cells = cells if dtype is None else cells[cells["dtype"] == dtype]
    counts = cells.drop_duplicates(["family", "model", "bits", "blocksize"])["blocksize"].value_counts()
    sizes = sorted((int(str(s)) for s in counts.index), key=lambda s: (s != _PREFERRED_BLOCK, s or np.inf))
    return max(sizes, key=lambda s: counts[s]) if sizes else _PREFERRED_BLOCK


def last_curves(cells: pd.DataFrame) -> pd.DataFrame:
    """Keep one curve a family of ``LawPoints.cells``: of models without a checkpoint, else of the most tokens."""
    order = cells["tokens"].where(cells["checkpoint"].notna(), np.inf).fillna(-1.0)
    best = order.groupby(cells["family"]).transform("max")
    last = cells[order == best]
    return last[last["curve"] == last.groupby("family")["curve"].transform("first")]


def _without_checkpoint(names: pd.Series[str], checkpoint: pd.Series[str]) -> list[str]:
    return [n.removesuffix(f"@{c}") if isinstance(c, str) else n for n, c in zip(names, checkpoint, strict=True)]


def _quantized(cells: pd.DataFrame) -> pd.Series[float]:
    """Parameters in quantized layers, since total bits = quantized x bits_per_param + (params - quantized) x 16."""
    full = float(BASELINE_BITS)
    own = (full * cells["params"] - cells["total_bits"]) / (full - cells["bits_per_param"])
    own = own.where((cells["bits"] < BASELINE_BITS) & (own > 0) & (own <= cells["params"]))
    return own.groupby(cells["model"]).transform("median").fillna(cells["params"])


__all__ = ["CENSORED_AT", "WHOLE_TENSOR", "LawPoints", "fullest_blocksize", "last_curves", "law_points"]
