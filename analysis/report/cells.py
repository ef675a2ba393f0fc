"""The cells of a report, as columns of its page: what they are, their bits, and every metric that there is room for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd

from analysis.cells import WHOLE_TENSOR, block_name, numbers, ordered_dtypes, some_eval_diverged
from analysis.figures.style import family_name
from analysis.metrics import Metric, headline_metrics, metric_columns, stderr
from analysis.report.encoding import Column, key_column, log_column, name_column, number_column, packed
from kbit.axes import VARIED
from kbit.spec import axes
from kbit.specs.base import BASELINE_BITS

KEY_DIGITS: Final = 10
"""Of a cell's key: enough for ``cell=``, and for 35,000 cells to differ."""
MOST_BYTES: Final = 1_250_000
"""Compressed bytes of all columns; base64 makes 4/3 of them, of the 2 MB of a page."""
_CORE: Final = ("bits", "dtype", "blocksize", "exponent_bits")
NONE: Final = "—"
"""What a cell has no value of: the data type of a 16-bit model."""
PLAIN: Final = "plain"


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Cells for a page.

    Attributes:
        count: how many.
        heads: how to read each column.
        data: the bytes of all columns (``encoding.packed``).
        metrics: those in the page, the headline ones first.
        left_out: metrics for which there was no room.
    """

    count: int
    heads: list[dict[str, Any]]
    data: str
    metrics: list[dict[str, Any]]
    left_out: list[str]


def report_cells(rows: pd.DataFrame) -> Cells:
    """Encode measured cells (``analysis.cells.measured``), ordered by family, model and bits."""
    order = pd.DataFrame(
        {"family": rows["family"], "params": numbers(rows, "params"), "model": rows["model"], "bits": rows["bits"]}
    )
    rows = rows.loc[order.assign(label=rows.get("label")).sort_values([*order, "label"], kind="stable").index]
    rows = rows.reset_index(drop=True)
    columns = _about(rows)
    metrics, values, left_out = _metrics(rows, MOST_BYTES - sum(c.compressed for c in columns))
    columns += values
    return Cells(
        count=len(rows),
        heads=[c.head for c in columns],
        data=packed(columns),
        metrics=metrics,
        left_out=left_out,
    )


def _about(rows: pd.DataFrame) -> list[Column]:
    """What a cell is: columns that are in every page."""
    bits = numbers(rows, "bits")
    words = pd.Series([f"{b:g}" if np.isfinite(b) else NONE for b in bits], index=rows.index, dtype="str")
    blocks = numbers(rows, "blocksize")
    is_blocked = rows["dtype"].notna() & ~bits.eq(BASELINE_BITS)
    total = numbers(rows, "total_bits_nominal").fillna(numbers(rows, "total_bits"))
    per_param = numbers(rows, "bits_per_param_nominal").fillna(numbers(rows, "bits_per_param"))
    label = rows["label"] if "label" in rows else rows["method"]
    state = np.where(some_eval_diverged(rows), "diverged", np.where(rows["status"] == "done", "done", "incomplete"))
    names = [block_name(int(b)) if np.isfinite(b) else block_name(WHOLE_TENSOR) for b in blocks]
    sizes = pd.Series(names, index=rows.index, dtype="str").where(is_blocked, NONE)
    present = sorted({int(b) for b in blocks[is_blocked].dropna()})
    block_order = [NONE, *map(block_name, present), block_name(WHOLE_TENSOR)]
    return [
        key_column("key", rows["key"].fillna("").astype(str).map(_hexadecimal), KEY_DIGITS),
        name_column("family", rows["family"].map(str).map(family_name)),
        name_column("model", rows["model"].astype("string")),
        log_column("params", numbers(rows, "params")),
        name_column("label", label.astype("string")),
        name_column("method", rows["method"].astype("string"), ["baseline", "blockwise"]),
        name_column("bits", words, [f"{b:g}" for b in sorted(bits.dropna().unique())]),
        name_column("dtype", rows["dtype"].astype("string").fillna(NONE), [NONE, *ordered_dtypes(rows)]),
        name_column("blocksize", sizes, block_order),
        name_column("options", _options(rows), [PLAIN]),
        number_column("bits_per_param", per_param, 1e-3),
        log_column("total_bits", total),
        name_column("state", pd.Series(state, index=rows.index, dtype="str"), ["done", "diverged", "incomplete"]),
    ]


def _hexadecimal(key: str) -> str:
    """Return a key's first digits; of a key that is no hash (a table from elsewhere), its bytes."""
    digits = key[:KEY_DIGITS].lower()
    is_hash = len(digits) == KEY_DIGITS and not set(digits) - set("0123456789abcdef")
    return digits if is_hash else key.encode()[: KEY_DIGITS // 2].ljust(KEY_DIGITS // 2, b"\0").hex()


def _options(rows: pd.DataFrame) -> pd.Series[str]:
    """Return what a cell has besides bits, data type and blocks: 'center', 'outlier_fraction 0.02'."""
    said = pd.Series("", index=rows.index)
    for name, axis in axes().items():
        if name in _CORE or axis.neutral is VARIED:
            continue
        column = rows[name].astype(object)
        # Which way a method's blocks lie is its own matter.
        matters = column.notna() & (column != axis.neutral) & ~((rows["method"] != "blockwise") & (name == "scheme"))
        text = pd.Series([name if v is True else f"{name} {v}" for v in column], index=rows.index, dtype="str")
        said = said.where(~matters, said + ", " + text)
    seed = rows["calibration_seed"]
    if seed.nunique() > 1:  # replicates
        said = said.where(seed.isna(), said + ", seed " + seed.astype("string").fillna(""))
    return said.str.removeprefix(", ").replace("", PLAIN)


def _metrics(rows: pd.DataFrame, room: int) -> tuple[list[dict[str, Any]], list[Column], list[str]]:
    """Encode metrics with their standard errors while there is room: the headline ones, then in the table's order."""
    found = [m for m in _by_importance(rows) if numbers(rows, m.column).notna().any()]
    losses = {m.eval for m in found if m.metric == "loss"}
    said: list[dict[str, Any]] = []
    columns: list[Column] = []
    left_out: list[str] = []
    for metric in found:
        if metric.metric == "perplexity" and metric.eval in losses:
            continue  # the page knows it by the loss
        own = _metric_columns(rows, metric)
        size = sum(c.compressed for c in own)
        if size > room:
            left_out.append(metric.column)
            continue
        room -= size
        columns += own
        said.append(_about_metric(metric))
        if metric.metric == "loss":
            perplexity = {"column": f"{metric.eval}_perplexity", "name": f"Perplexity on {metric.eval}", "unit": ""}
            said.append({**_about_metric(metric), **perplexity, "exp": metric.column, "decimals": 2})
    return said, columns, left_out


def _by_importance(rows: pd.DataFrame) -> Sequence[Metric]:
    first = headline_metrics(rows)
    return [*first, *(m for m in metric_columns(rows) if m.column not in {f.column for f in first})]


def _metric_columns(rows: pd.DataFrame, metric: Metric) -> list[Column]:
    value, error = numbers(rows, metric.column), stderr(rows, metric)
    finite = value[np.isfinite(value)]
    step = 10.0 ** -(metric.decimals + 1)
    wide = len(finite) and float(finite.min()) > 0 and float(finite.max()) > 1e6 * step
    column = log_column(metric.column, value) if wide else number_column(metric.column, value, step)
    # Two digits of an error that is much smaller than its value are enough.
    fine = number_column(f"{metric.column}_stderr", error, step)
    return [column, log_column(f"{metric.column}_stderr", error.where(error > 0)) if wide else fine]


def _about_metric(metric: Metric) -> dict[str, Any]:
    higher = metric.higher_is_better
    return {
        "column": metric.column,
        "eval": metric.eval,
        "name": metric.name,
        "unit": metric.unit,
        "higher": higher,
        "decimals": metric.decimals,
        "loss": metric.metric == "loss",
    }
