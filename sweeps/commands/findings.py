"""``mode=findings``: each of the paper's claims held against the results: holds, fails, can't tell."""

from __future__ import annotations

from rich.console import Console

from sweeps.commands.selection import chosen_inputs, say_notes
from sweeps.commands.writing import write_to
from sweeps.errors import UserError
from sweeps.files import write_atomically
from sweeps.options import Options


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
    text = to_json(found, name=inputs.title, margins=margins)
    write_to(lambda to: write_atomically(to, text.encode()), options.to)
    console.print(f"{len(found)} findings: {options.to}", highlight=False, soft_wrap=True)
    return 0
