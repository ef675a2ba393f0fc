"""``python -m analysis references OUT …``: which 16-bit models and methods agree with published scores."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from analysis.inputs import Inputs
from analysis.references import check_references, references_text
from analysis.tables import write_table

HELP: Final = "compare 16-bit models and methods with published scores: agrees, off or unknown, and why"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=Path, metavar="FILE", help="write a row per score and source, with citations")


def run(arguments: argparse.Namespace, inputs: Inputs) -> int:
    """Say which scores agree; write them all, with their citations, where that is asked for."""
    checked = check_references(inputs.long)
    for line in references_text(checked) or ["Nothing is measured yet."]:
        print(line)
    if arguments.to is not None:
        print(write_table(checked, arguments.to))
    return 0
