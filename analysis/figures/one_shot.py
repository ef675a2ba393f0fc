"""One-shot methods beside zero-shot types: a metric against total model bits (Figure 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from analysis.cells import numbers, points
from analysis.figures import style
from analysis.figures.chart import Chart
from analysis.figures.results import NoFigureError, NotAskedError, Results, SamplesByCell, block_text
from analysis.figures.showing import shown
from analysis.metrics import Metric
from analysis.replicates import pooled
from kbit.data_types import EXPONENT_RULES
from kbit.specs.base import BASELINE_BITS, ROW

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_FORMATS: Final = 8
"""Curves that can be told apart."""
_PAPER_BITS: Final = (3, 4)


def one_shot_scaling(
    df: pd.DataFrame, metric: Metric, *, sweep: str | None = None, samples: SamplesByCell | None = None
) -> Figure | None:
    """Draw each quantization of a study in which some calibrate, over model sizes, one panel per family (Figure 5).

    A curve per quantization, whatever its method, data type, bits and blocks; replicates are one point with their
    spread. None, with the reason logged, where nothing calibrates, or there are more than eight of them.
    """
    return shown(one_shot_chart, Results(df=df, metrics=[metric], sweep=sweep, samples=samples))


def one_shot_chart(results: Results, *, gptq: bool = False) -> Chart:
    """Return the chart of all quantizations of a study in which some calibrate.

    Args:
        results: what it is drawn from.
        gptq: as Figure 5: only families in which GPTQ was measured, its cells of 3 and 4 bits (or the bits given) and
            the plain block-wise float cells of as many bits with blocks of 64 (or the block size given).

    Raises:
        NoFigureError: nothing that was measured calibrates, or there are more than eight curves.
    """
    rows = results.rows
    quantized = rows[numbers(rows, "bits") < BASELINE_BITS]
    calibrates = quantized["calibration"].notna()
    if gptq:
        quantized = _figure_5(results, quantized)
    elif not calibrates.any():
        raise NotAskedError("no figure of one-shot methods: none of the cells calibrates")
    cells = points(quantized, results.metric)
    if not cells["key"].isin(quantized.loc[quantized["calibration"].notna(), "key"]).any():
        raise NoFigureError(f"no figure of one-shot methods: no cell that calibrates has {results.metric.column}")
    cells = pooled(cells, rows)
    # A label says first how, then on which data.
    labels = quantized.set_index("key")["label"].astype("string").str.split(", ").str[0]
    cells["format"] = cells["key"].map(labels)
    formats = _ordered(cells)
    if not 0 < len(formats) <= MOST_FORMATS:
        raise NoFigureError(
            f"no figure of one-shot methods: {len(formats)} quantizations have {results.metric.column}; "
            f"at most {MOST_FORMATS} curves can be told apart"
        )
    baseline = f"{BASELINE_BITS}-bit"
    base = results.base[results.base["family"].isin(cells["family"])].assign(format=baseline, replicates=1)
    curves = pd.concat([c for c in (base, cells) if len(c)], ignore_index=True).dropna(subset=["total_bits"])
    return Chart(
        results=results,
        cells=curves.assign(panel=curves["family"].map(style.family_name), curve=curves["format"]),
        looks={
            baseline: style.bits_style(BASELINE_BITS),
            **dict(zip(formats, style.ordinal_styles(len(formats)), strict=True)),
        },
        title=f"{results.metric.name} against {results.size.lower()}, one-shot and zero-shot",
        legend="Quantization",
    )


def _figure_5(results: Results, quantized: pd.DataFrame) -> pd.DataFrame:
    """Return GPTQ's cells and the plain float ones beside them.

    Raises:
        NoFigureError: a side is missing.
    """
    bits = numbers(quantized, "bits")
    precisions = _PAPER_BITS if results.bits is None else (results.bits,)
    wanted = bits.isin(precisions)
    gptq = quantized[wanted & (quantized["method"] == "gptq")]
    cells = results.plain()
    blocksize, dtype = 64 if results.blocksize is None else results.blocksize, results.dtype or "float"
    plain = cells[(cells["blocksize"] == blocksize) & (cells["dtype"] == dtype)]
    beside = quantized[wanted & quantized["key"].isin(plain["key"]) & quantized["family"].isin(gptq["family"])]
    if gptq.empty or beside.empty:
        missing = "GPTQ" if gptq.empty else f"{dtype} with {block_text(blocksize)}"
        where = " or ".join(map(str, precisions))
        raise NoFigureError(f"no figure of GPTQ beside {dtype}: no cell of {missing} at {where} bits")
    rank = beside["exponent_bits"].ne(beside["bits"].map(EXPONENT_RULES["paper"]))
    first = beside.assign(_rank=rank).sort_values("_rank", kind="stable")
    beside = first.drop_duplicates(["family", "model", "bits"]).drop(columns="_rank")
    if gptq["label"].nunique() + beside["bits"].nunique() > MOST_FORMATS:
        # Too many curves to tell apart: of the data type of most cells whole rows, and blocks as small as the float's.
        gptq = gptq[gptq["dtype"] == gptq["dtype"].value_counts(sort=False).idxmax()]
        gptq = gptq[gptq["blocksize"].isin([ROW, blocksize])]
    return pd.concat([gptq, beside])


def _ordered(cells: pd.DataFrame) -> list[str]:
    """Quantizations by bits, methods that don't calibrate first, then by blocks: whole rows last."""
    first = cells.drop_duplicates("format")
    size = numbers(first, "blocksize").where(lambda b: b > 0, np.inf)
    order = first.assign(_one_shot=first["method"] != "blockwise", _size=size)
    return order.sort_values(["bits", "_one_shot", "_size"], kind="stable")["format"].astype(str).tolist()
