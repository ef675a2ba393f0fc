"""Each quantization beside the best plain rounding that takes no more bits: on the same windows, with intervals."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Final

import numpy as np
import pandas as pd

from analysis.cells import measured, numbers
from analysis.inputs import Inputs
from analysis.metrics import metric_columns
from analysis.significance import can_pair, compare_loss, sample_keys
from analysis.tables.text import pipe_table
from kbit.spec import axes
from kbit.specs.base import BASELINE_BITS

BESIDE_COLUMNS: Final = (
    *("model", "text", "label", "bits", "rounding", "rounding_bits"),
    *("difference", "low", "high", "n", "predicted"),
)
_OPTIONS: Final = ("clip", "rotation", "center", "outlier_fraction")
"""Options of block-wise quantization that make it more than rounding to a codebook."""
_ROUNDING_ERROR: Final = 1e-9


def beside_rounding(inputs: Inputs, *, methods: Collection[str] = (), dtypes: Collection[str] = ()) -> pd.DataFrame:
    """Compare each quantized cell that is more than rounding with the best rounding of at most its stored bits.

    Rounding is block-wise quantization without options, on the same model; of the same data type where the cell has
    one. The best is the one with the least loss on that text. Loss is compared, of each text with outcomes by window.

    Args:
        inputs: tables and samples.
        methods: only cells of these; all where empty.
        dtypes: only rounding to these is taken; all where empty.

    Returns:
        A row per cell and text (``BESIDE_COLUMNS``): stored bits per weight of both; the cell's loss minus rounding's
        in nats per token, its 95 % interval and the windows; and 'predicted', the rise of the loss from 16 bits that
        the method predicted, NaN of most. Cells with no such rounding are left out.
    """
    rows = measured(inputs.df)
    rows = rows[(numbers(rows, "bits") < BASELINE_BITS) & rows["bits_per_param"].notna()]
    plain = _is_rounding(rows)
    cells = rows[~plain & (rows["method"].isin(list(methods)) if methods else True)]
    rounding = rows[plain & (rows["dtype"].isin(list(dtypes)) if dtypes else True)]
    found = [
        line
        for metric in metric_columns(rows)
        if metric.metric == "loss" and metric.eval
        for line in _on_text(inputs, cells, rounding, metric.eval, metric.column)
    ]
    return pd.DataFrame(found, columns=list(BESIDE_COLUMNS))


def _is_rounding(rows: pd.DataFrame) -> pd.Series[bool]:
    found = (rows["method"] == "blockwise") & rows["calibration"].isna()
    for name in _OPTIONS:
        found &= rows[name].isna() | (rows[name] == axes()[name].neutral)
    return found.astype(bool)


def _on_text(
    inputs: Inputs, cells: pd.DataFrame, rounding: pd.DataFrame, text: str, loss: str
) -> Iterator[dict[str, object]]:
    pairs = list(_pairs(cells.dropna(subset=[loss]), rounding.dropna(subset=[loss]), loss))
    keys = {str(row["key"]) for pair in pairs for row in pair}
    long = inputs.long[(inputs.long["eval"] == text) & inputs.long["key"].isin(keys)]
    samples = inputs.samples(sample_keys(long))
    for cell, other in pairs:
        a, b = (samples.get((str(row["key"]), text), {}) for row in (cell, other))
        if not can_pair(a, b, "loss"):
            continue
        compared = compare_loss(a, b)
        yield {
            "model": cell["model"],
            "text": text,
            "label": cell["label"],
            "bits": cell["bits_per_param"],
            "rounding": other["label"],
            "rounding_bits": other["bits_per_param"],
            "difference": compared.difference,
            "low": compared.low,
            "high": compared.high,
            "n": compared.n,
            "predicted": cell.get("predicted_loss_change", np.nan),
        }


def _pairs(cells: pd.DataFrame, rounding: pd.DataFrame, loss: str) -> Iterator[tuple[pd.Series[Any], ...]]:
    """Yield each cell with the best rounding that takes no more bits."""
    of_model = dict(list(rounding.groupby("model")))
    for _, cell in cells.iterrows():
        there = of_model.get(cell["model"])
        if there is None:
            continue
        there = there[there["bits_per_param"] <= cell["bits_per_param"] + _ROUNDING_ERROR]
        if isinstance(cell["dtype"], str):
            there = there[there["dtype"] == cell["dtype"]]
        if len(there):
            yield cell, there.loc[there[loss].astype(float).idxmin()]


def beside_markdown(table: pd.DataFrame) -> str:
    """Return ``beside_rounding`` as Markdown: a line per cell and text."""
    header = ["model", "text", "cell", "bits", "rounding", "its bits", "difference (nats/token)", "95 % interval"]
    lines = [
        [
            *(str(row[name]) for name in ("model", "text", "label")),
            f"{row['bits']:.3f}",
            str(row["rounding"]),
            f"{row['rounding_bits']:.3f}",
            f"{row['difference']:+.4f}",
            f"[{row['low']:+.4f}, {row['high']:+.4f}]",
        ]
        for row in table.to_dict("records")
    ]
    return pipe_table(header, lines, numeric_from=6)
