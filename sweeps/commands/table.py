"""``mode=table``: write the results as CSV, parquet, Markdown or LaTeX."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from sweeps.commands.selection import chosen_results
from sweeps.errors import UserError
from sweeps.files import make_directory, share_with_group
from sweeps.options import Options
from sweeps.results.table import left_out, load_results


def table(options: Options, console: Console) -> int:
    """Write the results as CSV, parquet, Markdown or LaTeX."""
    from analysis.metrics import direction_warnings
    from analysis.mixtures import mixture_warnings
    from analysis.tables import TABLE_SUFFIXES, write_table

    results = chosen_results(options, long=options.long)
    target = options.to or options.out / "table.csv"
    try:
        if target.suffix.lower() in TABLE_SUFFIXES:
            make_directory(target.parent)
        path = write_table(results, target)
        share_with_group(path)
    except OSError as error:
        raise UserError(f"to={str(target)!r} can't be written: {error.strerror or error}") from error
    console.print(f"{len(results):,} rows, {len(results.columns)} columns: {path}", highlight=False, soft_wrap=True)
    unranked = [] if options.long else direction_warnings(results)
    for note in left_out(options.out, options.asked_sweep):
        console.print(escape(note), highlight=False, soft_wrap=True)
    for warning in [*mixture_warnings(load_results(options.out, long=True)), *unranked]:
        console.print(f"[yellow]{escape(warning)}[/]")
    return 0
