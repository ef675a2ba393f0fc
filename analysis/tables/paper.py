"""The paper's tables by its numbers: methods by block size (Table 1), weights and outliers (Table 2)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from analysis.cells import WHOLE_TENSOR, block_name, measured, numbers, one_exponent, points
from analysis.metrics import Metric, metric_columns, parse_metric, primary_loss
from analysis.replicates import pooled
from analysis.tables.files import write_table
from kbit.errors import SpecError
from kbit.specs.base import BASELINE_BITS

FORMATS: Final = ("csv", "md", "tex")
_TABLE_1_BITS: Final = (2, 3)
"""Table 1 has GPTQ at 2 and float at 3 bits."""


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        paper: its number.
        title: what it shows.
        make: from a wide result table, and the correlations of ``analysis.outliers`` where they are known, to the
            table; without rows where the data don't allow it.
        needs: the measurements that it takes.
        command: what would measure them.
    """

    paper: int
    title: str
    make: Callable[[pd.DataFrame, pd.DataFrame | None], pd.DataFrame]
    needs: str
    command: str


def methods_by_block(
    df: pd.DataFrame, *, metric: Metric | str | None = None, bits: Sequence[int] | None = None
) -> pd.DataFrame:
    """Tabulate methods by block size: a row per model and block size, a column per quantization (Table 1).

    A column is a quantization whose blocks alone vary. Formats measured at one block size only are left out, and so are
    block sizes with one format only, which compare nothing. Replicates are their mean. Floats have one number of
    exponent bits per family and precision.

    Args:
        df: a wide result table.
        metric: a metric or its column; None for the perplexity of the text set with the most values (the paper has
            WikiText-2's).
        bits: only these; None for 2 and 3, as Table 1, or where those compare nothing, all.

    Returns:
        Columns: family, model, block size, then a float64 column per quantization, e.g. 'gptq int2 asymmetric' and
        'float3 e2'; NaN where it was not measured, infinite where it diverged without a value. Block sizes descend, as
        in the paper. Without rows where nothing can be compared.

    Raises:
        ValueError: ``metric`` isn't a metric's name.
    """
    found = _perplexity(df) if metric is None else parse_metric(metric, df) if isinstance(metric, str) else metric
    blank = pd.DataFrame({"family": [], "model": [], "block size": []}, dtype="object")
    if found is None:
        return blank
    rows = measured(df)
    quantized = rows[(numbers(rows, "bits") < BASELINE_BITS) & numbers(rows, "outlier_fraction").fillna(0).eq(0)]
    chosen = quantized[numbers(quantized, "bits").isin(_TABLE_1_BITS if bits is None else bits)]
    table = _pivot(rows, chosen, found)
    if table.empty and bits is None:
        table = _pivot(rows, quantized, found)
    return blank if table.empty else table


def _perplexity(df: pd.DataFrame) -> Metric | None:
    """Return the perplexity beside the fullest loss, else that loss."""
    loss = primary_loss(df)
    column = None if loss is None else f"{loss.eval}_perplexity"
    beside = [m for m in metric_columns(df) if m.column == column]
    return beside[0] if beside else loss


def _pivot(rows: pd.DataFrame, quantized: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    cells = points(quantized, metric)
    if cells.empty:
        return cells
    cells = pooled(cells, rows)
    floats = cells["exponent_bits"].notna()
    cells = pd.concat([one_exponent(cells[floats], ["family", "dtype", "bits"], axis="blocksize"), cells[~floats]])
    # A missing block size is the whole tensor's; a format with blocks of its own has none to vary.
    size = numbers(cells, "blocksize").fillna(WHOLE_TENSOR).astype(int)
    labels = cells["key"].map(quantized.set_index("key")["label"].astype("string").str.split(", ").str[0])
    names = [_without_block(str(label), b) for label, b in zip(labels, size, strict=True)]
    cells = cells.assign(size=size, name=names)
    cells = cells[cells.groupby("name")["size"].transform("nunique") > 1]
    cells = cells[cells.groupby(["family", "model", "size"])["name"].transform("nunique") > 1]
    if cells.empty:
        return cells
    order = list(dict.fromkeys(cells.sort_values(["bits", "method", "name"], kind="stable")["name"]))
    rank = cells["size"].map(lambda b: np.inf if b == WHOLE_TENSOR else float(b))
    cells = cells.assign(_rank=-rank)
    wide = cells.pivot_table(index=["family", "params", "model", "_rank", "size"], columns="name", values="value")
    wide = wide.reindex(columns=order).reset_index()
    wide["block size"] = wide["size"].map(block_name)
    return wide[["family", "model", "block size", *order]].rename_axis(columns=None)


def _without_block(label: str, blocksize: int) -> str:
    """'int2 asymmetric' of 'int2 b64 asymmetric'."""
    gone = {f"b{blocksize}", f"g{blocksize}", "row", "tensor", block_name(blocksize)}
    return " ".join(word for word in label.split(" ") if word not in gone)


def correlations_by_layer(df: pd.DataFrame, correlations: pd.DataFrame | None) -> pd.DataFrame:  # noqa: ARG001
    """Tabulate the rank correlation of weights' spread with activations' size: layers down, models across (Table 2).

    Args:
        df: not needed; tables share their arguments.
        correlations: ``analysis.outliers.outliers_of(inputs).correlations``.

    Returns:
        Columns: family, text, layers, then a float64 column per model, small ones first. Without rows where nothing was
        measured.
    """
    blank = pd.DataFrame({"family": [], "text": [], "layers": []}, dtype="object")
    if correlations is None or correlations.empty:
        return blank
    models = list(dict.fromkeys(correlations.sort_values("params", kind="stable")["model"]))
    named = correlations.assign(text=correlations["eval"].str.removesuffix("_outliers"))
    wide = named.pivot_table(index=["family", "text", "layers"], columns="model", values="correlation", sort=False)
    return wide.reindex(columns=models).reset_index().rename_axis(columns=None)


TABLES: Final[dict[str, PaperTable]] = {
    "table1_methods_by_block": PaperTable(
        paper=1,
        title="Perplexity of 2-bit GPTQ and 3-bit float by block size",
        make=lambda df, _: methods_by_block(df),
        needs="two quantizations, each at the same two block sizes",
        command="python launch.py sweep=table1_gptq",
    ),
    "table2_correlations": PaperTable(
        paper=2,
        title="Rank correlation of the spread of weights with the size of activations, by layer",
        make=correlations_by_layer,
        needs="outliers of 16-bit models",
        command="python launch.py 'sweep.quant=[{bits: 16}]' 'eval.kinds={outliers: [wikitext2]}'",
    ),
}
"""The paper's tables: name of the file to what makes it."""


def write_paper_tables(
    df: pd.DataFrame,
    directory: str | os.PathLike[str],
    *,
    correlations: pd.DataFrame | None = None,
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Write each of ``TABLES`` that has rows, once in each format.

    Args:
        df: a wide result table.
        directory: made if missing.
        correlations: of ``analysis.outliers``, for Table 2.
        formats: among 'csv', 'md', 'tex' and 'parquet'.

    Returns:
        The files.

    Raises:
        SpecError: another format.
    """
    for wrong in [f for f in formats if f not in (*FORMATS, "parquet")]:
        raise SpecError("formats", wrong, "one of " + ", ".join((*FORMATS, "parquet")))
    made = {name: entry.make(df, correlations) for name, entry in TABLES.items()}
    return [
        write_table(table, Path(directory) / f"{name}.{suffix}")
        for name, table in made.items()
        if len(table)
        for suffix in formats
    ]
