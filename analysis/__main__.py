"""``python -m analysis COMMAND OUT [OUT2 …]``: what a results directory, or several, have to say.

A command is a module with ``HELP``, ``add_arguments(parser)`` and ``run(arguments, inputs) -> exit code``; its entry in
``COMMANDS`` is all that makes it known.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Final

COMMANDS: Final[Mapping[str, str]] = {
    "report": "analysis.report.command",
    "figures": "analysis.figures.command",
    "findings": "analysis.findings.command",
    "compare": "analysis.significance.command",
    "beside": "analysis.beside.command",
    "laws": "analysis.scaling.command",
    "outliers": "analysis.outliers",
    "table": "analysis.tables.command",
    "references": "analysis.references_command",
}
"""Command to its module."""


def main(given: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, or 2 with a message where the directories can't be read."""
    from kbit.errors import SpecError
    from sweeps.errors import EXIT_BAD_INPUT, UserError
    from sweeps.results.inputs import read_inputs

    arguments = _parser().parse_args(given)
    try:
        inputs = read_inputs(arguments.out, sweep=arguments.study)
        code: int = import_module(COMMANDS[arguments.command]).run(arguments, inputs)
    except (UserError, SpecError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m analysis", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = import_module(module)
        own = commands.add_parser(name, help=command.HELP, description=command.HELP)
        own.add_argument("out", nargs="+", type=Path, metavar="OUT", help="results directories, or files of mode=keep")
        own.add_argument("--study", help="only this study; else all that the directories hold")
        command.add_arguments(own)
    return parser


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("analysis").setLevel(logging.ERROR)  # a figure that a study has no cells for is no news
    sys.exit(main())
