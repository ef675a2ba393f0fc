"""``python -m analysis report OUT [OUT2 …]``: findings in the terminal; a page, figures and tables in a directory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from analysis.inputs import Inputs
from analysis.report.places import Places
from analysis.report.writing import report_of, write_report

HELP: Final = "write a page with findings, figures and tables of what is stored"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=Path, metavar="DIR", help="where to write; else into OUT, as mode=report does")


def run(arguments: argparse.Namespace, inputs: Inputs) -> int:
    """Write the report and say where it is."""
    report = report_of(inputs)
    places = Places.within(arguments.to) if arguments.to else Places.of_study(arguments.out[0], inputs.name)
    print(report.summary)
    for sentence in report.sentences:
        print(f"• {sentence}")
    files, problems = write_report(report, places, paper=inputs)
    for problem in (*report.warnings, *problems):
        print(f"warning: {problem}")
    for path in files:
        print(path)
    return 0
