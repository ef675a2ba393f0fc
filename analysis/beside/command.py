"""``python -m analysis beside OUT [OUT2 …]``: what a method gains over rounding at the same bits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from analysis.beside.pairs import beside_markdown, beside_rounding
from analysis.inputs import Inputs

HELP: Final = "each quantization beside the best rounding of at most as many bits, with 95 %% intervals"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", action="append", default=[], help="only cells of this one; may be repeated")
    parser.add_argument("--dtype", action="append", default=[], help="only rounding to this one; may be repeated")
    parser.add_argument("--to", type=Path, metavar="FILE", help="write all columns as CSV, too")


def run(arguments: argparse.Namespace, inputs: Inputs) -> int:
    """Print the table, and where the intervals lie."""
    table = beside_rounding(inputs, methods=arguments.method, dtypes=arguments.dtype)
    if not len(table):
        print("nothing to compare: no cell of a method has rounding of the same model and data type, and no more bits")
        return 0
    print(beside_markdown(table))
    better, worse = (table["high"] < 0).sum(), (table["low"] > 0).sum()
    print(
        f"Loss less rounding's, over the same windows. Of {len(table)} comparisons the interval lies below 0 in "
        f"{better}, above in {worse}; {len(table) - better - worse} hold 0."
    )
    if arguments.to is not None:
        table.to_csv(arguments.to, index=False)
        print(arguments.to)
    return 0
