"""``mode=table``: show results as a table over any axes and metrics, or write them in a format of choice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.markup import escape

from kbit.garbage import uncollected
from sweeps.commands.selection import chosen_measurements, chosen_results, chosen_tables
from sweeps.commands.writing import write_to
from sweeps.errors import UserError
from sweeps.options import Options
from sweeps.results.frames import long_frame, metric_frame
from sweeps.results.table import left_out

if TYPE_CHECKING:
    import pandas as pd

MOST_ROWS_SHOWN: Final = 100
"""In the terminal, unless top= or to=- asks for more."""
_TERMINAL: Final = Path("-")


@uncollected()
def table(options: Options, console: Console) -> int:
    """Show results by axes and metrics, or write them: as shown, or with neither of these keys all of each cell."""
    laid_out = bool(options.by or options.columns is not None or options.metrics or options.sort)
    laid_out |= options.top is not None
    if options.long and (laid_out or options.to == _TERMINAL):
        raise UserError(
            "long=true writes a row per measurement to a file: leave out by=, columns=, metrics=, sort=, top= and to=-"
        )
    if options.long:
        rows = _measured_with(options, chosen_results(options, long=True))
        return _write_rows(options, rows, rows, console)
    if laid_out or options.to == _TERMINAL:
        measured = chosen_measurements(options, _needed(options))
        long = _measured_with(options, long_frame(measured))
        _show_or_write(options, long, console)
        _say_about(options, long, metric_frame(measured), console)
        return 0
    wide, long = chosen_tables(options)
    long = _measured_with(options, long)
    if options.to is None:
        _show_or_write(options, long, console)
    return _write_rows(options, wide, long, console)


def _needed(options: Options) -> tuple[str, ...]:
    from analysis.mixtures import MIXED
    from analysis.tables.axes import columns_of_pivots

    chosen_by = [name for name in options.measured_with if name != MIXED]
    return columns_of_pivots([*options.by, *(options.columns or ()), *chosen_by], sizes=bool(options.metrics))


def _show_or_write(options: Options, long: pd.DataFrame, console: Console) -> None:
    from analysis.tables import pivot, show, write_pivot
    from analysis.tables.pivoting import DEFAULT_BY, DEFAULT_COLUMNS

    columns = options.columns
    if columns is None:
        columns = tuple(c for c in DEFAULT_COLUMNS if c not in options.by)
    found = pivot(
        long,
        by=options.by or tuple(b for b in DEFAULT_BY if b not in columns),
        columns=columns,
        metrics=options.metrics,
        sort=options.sort,
        top=options.top,
    )
    if options.to is not None and options.to != _TERMINAL:
        path = _written(lambda to: write_pivot(found, to), options.to)
        console.print(f"{len(found):,} rows: {path}", highlight=False, soft_wrap=True)
        return
    hidden = 0 if options.top is not None or options.to == _TERMINAL else max(0, len(found) - MOST_ROWS_SHOWN)
    show(found.iloc[: len(found) - hidden], console)
    if hidden:
        console.print(
            f"{hidden:,} more rows: to=- shows all, top= the best, where= those of interest, to=FILE writes them.",
            highlight=False,
            soft_wrap=True,
        )


def _write_rows(options: Options, rows: pd.DataFrame, long: pd.DataFrame, console: Console) -> int:
    """Write all columns of cells, or of measurements."""
    from analysis.mixtures import with_mixed
    from analysis.tables import write_table
    from analysis.tables.choosing import of_measurements

    rows = with_mixed(rows) if options.long else of_measurements(rows, long)
    path = _written(lambda to: write_table(rows, to), options.to or options.out / "table.csv")
    console.print(f"{len(rows):,} rows, {len(rows.columns)} columns: {path}", highlight=False, soft_wrap=True)
    _say_about(options, long, rows, console)
    return 0


def _measured_with(options: Options, long: pd.DataFrame) -> pd.DataFrame:
    from analysis.tables import select

    return select(long, options.measured_with) if options.measured_with else long


def _written(write: Callable[[Path], Path], target: Path) -> Path:
    from analysis.tables.files import check_suffix

    check_suffix(target)
    return write_to(write, target)


def _say_about(options: Options, long: pd.DataFrame, rows: pd.DataFrame, console: Console) -> None:
    """Say what was left out, what the table mixes, and what is not ranked."""
    from analysis.metrics import direction_warnings
    from analysis.mixtures import mixture_warnings

    for note in left_out(options.out, options.asked_sweep):
        console.print(escape(note), highlight=False, soft_wrap=True)
    unranked = [] if options.long else direction_warnings(rows)
    for warning in [*mixture_warnings(long), *unranked]:
        console.print(f"[yellow]{escape(warning)}[/]")
