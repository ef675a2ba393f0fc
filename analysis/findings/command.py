"""``python -m analysis findings OUT [OUT2 …]``: the paper's claims held against results."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from analysis.inputs import BITS_OF, Inputs, counting

HELP: Final = "hold each claim of the paper against the results: holds, fails, or can't tell and what would"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=Path, metavar="FILE", help="write JSON (.json), or a table of the claims (.md)")
    parser.add_argument("--bits-of", choices=("model", "quantized"), default="model", help=BITS_OF)
    parser.add_argument("--loss", type=float, default=0.01, metavar="NATS", help="less is no effect; default 0.01")
    parser.add_argument("--points", type=float, default=0.5, metavar="POINTS", help="of accuracies; default 0.5")


def run(arguments: argparse.Namespace, inputs: Inputs) -> int:
    """Print the findings, or write them."""
    from rich.console import Console

    from analysis.findings.judging import judge_inputs
    from analysis.findings.text import render_findings, to_json, to_markdown
    from analysis.significance import Margins

    margins = Margins(loss=arguments.loss, points=arguments.points)
    found = judge_inputs(counting(inputs, arguments.bits_of)[0], margins=margins)
    if arguments.to is None:
        render_findings(found, Console(), margins=margins)
    else:
        arguments.to.parent.mkdir(parents=True, exist_ok=True)
        is_table = arguments.to.suffix.lower() == ".md"
        written = to_markdown(found) if is_table else to_json(found, name=inputs.title, margins=margins)
        arguments.to.write_text(written)
        print(arguments.to)
    return 0
