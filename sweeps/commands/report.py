"""``mode=report``: write a page with findings, figures and tables of what is stored, while a study runs too."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.markup import escape

from analysis.report.places import Places
from sweeps.commands.selection import chosen_inputs
from sweeps.errors import UserError
from sweeps.options import Options
from sweeps.results.report import make_report


def report(options: Options, console: Console) -> int:
    """Write the report of a study, or without ``sweep=`` of all that the directory holds.

    Raises:
        UserError: there is no study, no chosen cell, or the place can't be written.
    """
    inputs = chosen_inputs(options)
    if options.choice:
        # A part of a study is no study: it has files of its own.
        inputs = replace(inputs, name=f"{inputs.name}-chosen", title=f"{inputs.title}: chosen cells")
    places = Places.within(options.to) if options.to else Places.of_study(options.out, inputs.name)
    try:
        with console.status("comparing cells, drawing figures, writing the report"):
            made, files, problems = make_report(inputs, places, paper=True)
    except OSError as error:
        raise UserError(f"{places.page.parent} can't be written: {error.strerror or error}. Name to=DIR") from error
    console.print(made.summary, highlight=False, markup=False)
    for warning in (*made.warnings, *problems):
        console.print(f"[yellow]{escape(warning)}[/]")
    for sentence in made.sentences:
        console.print(f"• {escape(sentence)}", highlight=False)
    console.print(f"\n{escape(str(places.page))}", highlight=False, soft_wrap=True)
    console.print(
        f"and {len(files) - 1} figures and tables in {escape(str(places.figures))} and {escape(str(places.tables))}; "
        f"the paper's, for a publication, in {escape(str(places.paper))}",
        highlight=False,
        soft_wrap=True,
    )
    return 0
