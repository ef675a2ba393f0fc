"""``mode=drop``: retire wrong results, or with undo=true take the last drop back."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.prompt import Confirm

from sweeps.commands.selection import chosen_results
from sweeps.errors import UserError
from sweeps.options import Options
from sweeps.store.parts import Store
from sweeps.text import counted

if TYPE_CHECKING:
    import pandas as pd

MOST_SHOWN: Final = 10


def drop(options: Options, console: Console) -> int:
    """Retire the chosen rows, so that their measurements run again; the rows stay on disk.

    Raises:
        UserError: nothing is chosen or measured, or nobody is there to be asked.
        StoreError: the results can't be written.
    """
    store = Store(out=options.out)
    store.check_may_write()
    if options.undo:
        return _undo(options, store, console)
    if not options.choice:
        raise UserError("mode=drop needs cell=KEY_PREFIX, 'where={axis: value}' or 'status=[failed]': what to retire")
    long = chosen_results(options, long=True)
    asked = str(options.choice)
    rows = long[long["row_id"].notna()]
    if not len(rows):
        raise UserError(
            f"mode=drop: {asked} chooses {counted(len(long), 'measurement')}, and none has a result: nothing was "
            "dropped. What was dropped before, or not measured yet, runs with the next launch"
        )
    what = f"{counted(len(rows), 'measurement')} of {counted(rows['key'].nunique(), 'cell')}"
    if not options.yes:
        _show(rows, f"{asked} chooses {what}:", console)
        if not _is_wanted(what, console):
            console.print("Nothing was dropped.")
            return 0
    # Older rows of the same measurements go too: else an earlier failure would come back in place of a new run.
    store.drop(store.row_ids(set(rows["measurement"])), why=asked)
    console.print(
        f"Retired {what}. They stay on disk (dropped/ names them) and run again with the next launch. "
        "mode=drop undo=true takes it back.",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _undo(options: Options, store: Store, console: Console) -> int:
    if options.choice:
        raise UserError(f"mode=drop undo=true takes the last drop back as a whole: leave out {options.choice}")
    undone = store.undo_drop()
    if undone is None:
        raise UserError(f"mode=drop undo=true: no drop in {options.out} is left to take back")
    rows, why = undone
    console.print(f"Took the drop of {why} back: {counted(rows, 'row')} count again.", markup=False, highlight=False)
    return 0


def _show(rows: pd.DataFrame, title: str, console: Console) -> None:
    """Print which cells are chosen, with the state of each of their measurements."""
    console.print(title, markup=False, highlight=False)
    cells = rows.groupby("key", sort=False)
    for _, its in list(cells)[:MOST_SHOWN]:
        first = its.iloc[0]
        evals = ", ".join(f"{e} {s}" for e, s in zip(its["eval"], its["status"], strict=True))
        line = f"  {first['key'][:10]}  {first['model']} {first['label']}  {evals}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if len(cells) > MOST_SHOWN:
        console.print(f"  … and {counted(len(cells) - MOST_SHOWN, 'more cell')}", highlight=False)


def _is_wanted(what: str, console: Console) -> bool:
    if not (sys.stdin.isatty() and console.is_terminal):
        raise UserError(f"mode=drop asks before it retires {what}, and this is no terminal to answer at: add yes=true")
    try:
        return Confirm.ask(f"Retire {what}?", console=console, default=False)
    except EOFError:
        return False
