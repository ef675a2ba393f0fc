"""``python -m analysis figures OUT …``: the paper's figures and tables of what is stored, for a publication."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Final

from analysis.figures.missing import missing_figures
from analysis.figures.registry import FIGURES, figure_metrics
from analysis.figures.results import CUT, Results
from analysis.figures.saving import FORMATS
from analysis.findings.judging import compared_samples
from analysis.inputs import BITS_OF, Inputs, counting
from analysis.paper import write_paper

HELP: Final = "write the paper's figures and tables, by its numbers, as wide as one or two columns of a page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="directory that they are written to")
    parser.add_argument("--names", nargs="+", choices=list(FIGURES), metavar="NAME", help="these; else the paper's")
    parser.add_argument("--columns", type=int, choices=(1, 2), default=1, help="of a page; 1 (default) or 2")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["pdf", "png", "svg"], help="kinds of files")
    parser.add_argument("--bits", type=int, help="other bits than the paper's")
    parser.add_argument("--blocksize", type=int, help="other blocks than most cells have; 0 is the whole tensor")
    parser.add_argument("--dtype", help="another data type than most cells have")
    parser.add_argument("--bits-of", choices=("model", "quantized"), default="model", help=BITS_OF)
    parser.add_argument("--all-metrics", action="store_true", help="of each text set and task, not of the first alone")
    parser.add_argument("--cut", type=float, default=CUT, help="perplexity from which an axis is compressed; 0: none")


def run(arguments: argparse.Namespace, inputs: Inputs) -> int:
    """Write figures and tables, and print where they are and what is missing."""
    samples = compared_samples(inputs)
    inputs, size = counting(inputs, arguments.bits_of)
    results = Results.of(inputs.df, sweep=inputs.name, samples=samples, cut=arguments.cut or None)
    results = replace(results, size=size)
    results = replace(results, bits=arguments.bits, blocksize=arguments.blocksize, dtype=arguments.dtype)
    if arguments.all_metrics:
        results = replace(results, metrics=figure_metrics(inputs.df))
    chosen = {"columns": (arguments.columns,), "names": arguments.names, "formats": arguments.formats}
    made = write_paper(inputs, arguments.to, results=results, **chosen)
    for path in made:
        print(path)
    for missing in missing_figures(inputs.df, results=results):
        print(f"missing: {missing.name}: {missing.reason}\n  {missing.command}")
    return 0
