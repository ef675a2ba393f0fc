"""``python -m analysis report OUT [OUT2 …]``: findings in the terminal, figures and tables in a directory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from analysis.inputs import Inputs
from analysis.report.writing import report_findings, write_files

HELP: Final = "write figures, tables and findings of what is stored"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=Path, metavar="DIR", help="where to write; else OUT/reports/STUDY")


def run(arguments: argparse.Namespace, inputs: Inputs) -> int:
    """Write the report and say where it is."""
    directory = arguments.to or arguments.out[0] / "reports" / inputs.name
    for line in report_findings(inputs):
        print(f"• {line}")
    for path in write_files(inputs, directory):
        print(path)
    return 0
