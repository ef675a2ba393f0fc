"""``mode=findings``: each of the paper's claims held against the results: holds, fails, can't tell."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from sweeps.commands.selection import chosen_rows
from sweeps.errors import UserError
from sweeps.files import make_directory, share_with_group, write_atomically
from sweeps.options import Options
from sweeps.results.inputs import read_inputs

if TYPE_CHECKING:
    from analysis.inputs import Inputs


def findings(options: Options, console: Console) -> int:
    """Print the claims with their verdicts, or write them as JSON.

    Raises:
        UserError: nothing is chosen, or ``to=`` can't be written.
    """
    from analysis.findings.judging import judge_inputs
    from analysis.findings.text import render_findings, to_json
    from analysis.significance import Margins

    if options.to is not None and options.to.suffix.lower() != ".json":
        raise UserError(f"to={str(options.to)!r} is not valid with mode=findings: a file that ends in .json")
    inputs, margins = chosen_inputs(options), Margins(**options.margins)
    found = judge_inputs(inputs, margins=margins)
    say_notes(inputs, console)
    if options.to is None:
        render_findings(found, console, margins=margins)
        return 0
    try:
        make_directory(options.to.parent)
        write_atomically(options.to, to_json(found, name=inputs.title, margins=margins).encode())
        share_with_group(options.to)
    except OSError as error:
        raise UserError(f"to={str(options.to)!r} can't be written: {error.strerror or error}") from error
    console.print(f"{len(found)} findings: {options.to}", highlight=False, soft_wrap=True)
    return 0


def chosen_inputs(options: Options) -> Inputs:
    """Return the tables of the chosen cells, and where their samples are.

    Raises:
        UserError: nothing is chosen.
    """
    inputs = read_inputs([options.out], sweep=options.asked_sweep)
    if not options.choice:
        return inputs
    df = chosen_rows(options, inputs.df)
    return replace(inputs, df=df, long=inputs.long[inputs.long["key"].isin(set(df["key"]))])


def say_notes(inputs: Inputs, console: Console) -> None:
    """Say what was left out, and what is mixed."""
    from analysis.mixtures import mixture_warnings

    for note in inputs.notes:
        console.print(escape(note), highlight=False, soft_wrap=True)
    for warning in mixture_warnings(inputs.long):
        console.print(f"[yellow]{escape(warning)}[/]", soft_wrap=True)
