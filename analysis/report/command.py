"""``python -m analysis report OUT [OUT2 …]``: findings in the terminal; a page, figures and tables in a directory."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Final

from analysis.inputs import Inputs, directory_of
from analysis.report.places import Places
from analysis.report.writing import report_of, write_page, write_report

HELP: Final = "write a page with findings, figures and tables of what is stored"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--title", help="of the page; else the study, or the directories")
    parser.add_argument("--page-only", action="store_true", help="leave out the figures and tables beside the page")
    parser.add_argument("--to", type=Path, metavar="DIR", help="where to write; else into OUT, as mode=report does")


def run(arguments: argparse.Namespace, inputs: Inputs) -> int:
    """Write the report and say where it is."""
    report = report_of(replace(inputs, title=arguments.title) if arguments.title else inputs)
    places = (
        Places.within(arguments.to) if arguments.to else Places.of_study(directory_of(arguments.out[0]), inputs.name)
    )
    print(report.summary)
    for sentence in report.sentences:
        print(f"• {sentence}")
    if arguments.page_only:
        files, problems = [write_page(report, places)], list[str]()
    else:
        files, problems = write_report(report, places, paper=inputs)
    for problem in (*report.warnings, *problems):
        print(f"warning: {problem}")
    for path in files:
        print(path)
    return 0
