"""Bit-level scaling: a metric against total model bits, a curve per precision (Figures 1, 2, 7 and 13)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from analysis.cells import one_exponent
from analysis.figures import style
from analysis.figures.chart import Chart
from analysis.figures.results import NoFigureError, Results, SamplesByCell, block_text, held
from analysis.figures.showing import shown
from analysis.metrics import Metric
from kbit.specs.base import BASELINE_BITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def bit_scaling(
    df: pd.DataFrame,
    metric: Metric,
    *,
    dtype: str | None = None,
    blocksize: int | None = None,
    sweep: str | None = None,
    samples: SamplesByCell | None = None,
) -> Figure | None:
    """Draw a metric against total model bits by precision, one panel per family (Figures 2 and 13).

    None, with the reason logged, where there are no quantized cells. ``dtype`` and ``blocksize`` (0: the whole tensor)
    None take those that most cells have.
    """
    results = Results(df=df, metrics=[metric], sweep=sweep, samples=samples, dtype=dtype, blocksize=blocksize)
    return shown(bit_scaling_chart, results)


def bit_scaling_chart(results: Results, *, one_family: bool = False) -> Chart:
    """Return the chart of a data type's precisions at one block size, and the 16-bit baseline.

    Args:
        results: what it is drawn from.
        one_family: only OPT (Figure 1), or without it the family with the most models.

    Raises:
        NoFigureError: no quantized cell of a known size.
    """
    cells = results.at(results.plain(), "dtype", "blocksize")
    if len(cells) and cells["total_bits"].isna().all():
        raise NoFigureError("no figure of scaling: the number of bits of no quantized cell is known")
    cells = held(cells.dropna(subset=["total_bits"]), ["dtype", "blocksize"], over="bits", at_least=1)
    if cells.empty:
        block = "" if results.blocksize is None else f" at {block_text(results.blocksize)}"
        kind = results.dtype or "block-wise"
        raise NoFigureError(f"no figure of scaling: no plain {kind} cell{block} has {results.metric.column}")
    dtype, blocksize = str(cells["dtype"].iloc[0]), int(cells["blocksize"].iloc[0])
    cells = one_exponent(cells, ["family", "dtype", "bits"])
    both = [c for c in (results.base.dropna(subset=["total_bits"]), cells) if len(c)]
    curves = pd.concat(both, ignore_index=True)
    if one_family:
        curves = curves[curves["family"] == _first_family(curves)]
    named = {bits: f"{bits}-bit" for bits in curves["bits"].unique()}
    order = [BASELINE_BITS, *sorted((b for b in named if b != BASELINE_BITS), reverse=True)]
    return Chart(
        results=results,
        cells=curves.assign(panel=curves["family"].map(style.family_name), curve=curves["bits"].map(named)),
        looks={named[b]: style.bits_style(b) for b in order if b in named},
        title=f"{results.metric.name} against {results.size.lower()}, by precision ({dtype}, {block_text(blocksize)})",
        legend="Precision",
    )


def _first_family(curves: pd.DataFrame) -> str:
    """OPT, which the paper's Figure 1 shows; without it the family with the most models."""
    models = curves.drop_duplicates(["family", "model"])["family"].value_counts(sort=False)
    return "opt" if "opt" in models.index else str(models.idxmax())
