"""The paper's figures by its numbers, each as the paper has it unless the results ask for other bits or blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

import pandas as pd

from analysis.figures.chart import Chart
from analysis.figures.comparisons import block_sizes_chart, data_types_chart
from analysis.figures.entries import Entry
from analysis.figures.latency import speeds
from analysis.figures.one_shot import one_shot_chart
from analysis.figures.questions import exponents_chart, outliers_chart
from analysis.figures.results import HELD, NoFigureError, Results
from analysis.figures.scaling import bit_scaling_chart

SCALING: Final = ("blocksize", "dtype")
"""What a figure of several precisions obeys."""
_FIGURE_2: Final = ("opt", "bloom", "pythia", "gpt2")


def _of_bits(chart: Callable[[Results], Chart], bits: int) -> Callable[[Results], Chart]:
    """Return the chart at the paper's bits, unless the results ask for others."""

    def at(results: Results) -> Chart:
        return chart(results if results.bits is not None else replace(results, bits=bits))

    return at


def _one_family(chart: Callable[[Results], Chart], family: str) -> Callable[[Results], Chart]:
    """Return the chart of one family: the paper's, or without it the one with the most models."""

    def of(results: Results) -> Chart:
        found = chart(results)
        models = found.cells.drop_duplicates(["family", "model"])["family"].value_counts(sort=False)
        only = family if family in models.index else models.idxmax()
        return replace(found, cells=_used(found.cells[found.cells["family"] == only]))

    return of


def _four_families(results: Results) -> Chart:
    """Figure 2 has four families: the paper's that the study has, then those of most models."""
    found = bit_scaling_chart(results)
    models = found.cells.drop_duplicates(["family", "model"])["family"].value_counts(sort=False)
    ranked = sorted(models.index, key=lambda family: (family not in _FIGURE_2, -models[family]))
    return replace(found, cells=_used(found.cells[found.cells["family"].isin(ranked[: len(_FIGURE_2)])]))


def _used(cells: pd.DataFrame) -> pd.DataFrame:
    if cells.empty:
        raise NoFigureError("no cells of that family")
    return cells


_NEEDS_SCALING: Final = "several precisions of one data type at one block size, beside 16 bits"
_DATA_TYPES: Final = "two data types at one precision and block size"
_BLOCKS: Final = "two block sizes at one precision, of one data type"
_FAMILIES: Final = "'model=[opt,bloom,bloomz,gpt2]'"

PAPER: Final[dict[str, Entry]] = {
    "fig01_bit_scaling": Entry(
        paper=1,
        title="Bit-level scaling of one family",
        chart=partial(bit_scaling_chart, one_family=True),
        obeys=SCALING,
        needs=_NEEDS_SCALING,
        metrics="accuracy",
        sweep="fig2_bit_scaling model=opt",
    ),
    "fig02_bit_scaling": Entry(
        paper=2,
        title="Bit-level scaling of four families",
        chart=_four_families,
        obeys=SCALING,
        needs=_NEEDS_SCALING,
        metrics="accuracy",
        sweep="fig2_bit_scaling",
    ),
    "fig03_data_types": Entry(
        paper=3,
        title="Data types at 4 bits, one family",
        chart=_one_family(_of_bits(data_types_chart, 4), "pythia"),
        obeys=("bits", "blocksize"),
        needs=_DATA_TYPES,
        sweep="fig3_data_types",
    ),
    "fig03_block_sizes": Entry(
        paper=3,
        title="Block sizes at 4 bits, one family",
        chart=_one_family(_of_bits(block_sizes_chart, 4), "pythia"),
        obeys=("bits", "dtype"),
        needs=_BLOCKS,
        sweep="fig3_block_size",
    ),
    "fig04_outlier_dimensions": Entry(
        paper=4,
        title="Outlier dimensions in 16 bits (proxy quantization)",
        chart=outliers_chart,
        obeys=HELD,
        needs="cells that keep outlier dimensions in 16 bits",
        sweep="fig4_proxy",
    ),
    "fig05_gptq": Entry(
        paper=5,
        title="GPTQ beside float in small blocks",
        chart=partial(one_shot_chart, gptq=True),
        obeys=HELD,
        needs="GPTQ and float at block size 64, at 3 and 4 bits",
        sweep="fig5_gptq",
    ),
    "fig07_bit_scaling": Entry(
        paper=7,
        title="Bit-level scaling of all families",
        chart=bit_scaling_chart,
        obeys=SCALING,
        needs=_NEEDS_SCALING,
        metrics="accuracy",
        sweep="fig2_bit_scaling 'model=[opt,bloom,bloomz,pythia,gpt2]'",
    ),
    "fig08_block_sizes": Entry(
        paper=8,
        title="Block sizes at 4 bits, all families",
        chart=_of_bits(block_sizes_chart, 4),
        obeys=("bits", "dtype"),
        needs=_BLOCKS,
        metrics="accuracy",
        sweep=f"fig3_block_size {_FAMILIES}",
    ),
    "fig09_data_types": Entry(
        paper=9,
        title="Data types at 4 bits, all families",
        chart=_of_bits(data_types_chart, 4),
        obeys=("bits", "blocksize"),
        needs=_DATA_TYPES,
        metrics="accuracy",
        sweep=f"fig3_data_types {_FAMILIES}",
    ),
    "fig10_data_types": Entry(
        paper=10,
        title="Data types at 6 bits",
        chart=_of_bits(data_types_chart, 6),
        obeys=("bits", "blocksize"),
        needs=_DATA_TYPES,
        sweep="fig3_data_types sweep.quant.1.bits=6",
    ),
    "fig11_block_sizes": Entry(
        paper=11,
        title="Block sizes at 6 bits",
        chart=_of_bits(block_sizes_chart, 6),
        obeys=("bits", "dtype"),
        needs=_BLOCKS,
        sweep="fig3_block_size sweep.quant.1.bits=6",
    ),
    "fig12_exponent_bits": Entry(
        paper=12,
        title="Exponent bits of floats at each precision",
        chart=exponents_chart,
        obeys=("bits", "blocksize"),
        needs="floats of one precision with different exponent bits",
        sweep="fig12_exponent_bits",
    ),
    "fig13_bit_scaling": Entry(
        paper=13,
        title="Bit-level scaling, perplexity",
        chart=bit_scaling_chart,
        obeys=SCALING,
        needs=_NEEDS_SCALING,
        metrics="loss",
        sweep="fig2_bit_scaling 'model=[opt,bloom,bloomz,gpt2]' eval=perplexity",
    ),
    "fig14_data_types": Entry(
        paper=14,
        title="Data types at 4 bits, perplexity",
        chart=_of_bits(data_types_chart, 4),
        obeys=("bits", "blocksize"),
        needs=_DATA_TYPES,
        metrics="loss",
        sweep=f"fig3_data_types {_FAMILIES} eval=perplexity",
    ),
    "fig15_block_sizes": Entry(
        paper=15,
        title="Block sizes at 4 bits, perplexity",
        chart=_of_bits(block_sizes_chart, 4),
        obeys=("bits", "dtype"),
        needs=_BLOCKS,
        metrics="loss",
        sweep=f"fig3_block_size {_FAMILIES} eval=perplexity",
    ),
    "fig16_latency": Entry(
        paper=16,
        title="Speedups over 16 bits, measured decoding beside the limit",
        chart=speeds,
        obeys=("dtype",),
        needs="latency of models held in k bits and of the 16-bit one, on a GPU",
        metrics="latency",
        sweep="survey",
    ),
}
"""Name to entry. Figure 6 of the paper is a sketch of data types; it shows no results."""
