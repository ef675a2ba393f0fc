"""``mode=drop``: retire wrong results."""

from __future__ import annotations

from rich.console import Console

from sweeps.commands.selection import chosen_results
from sweeps.errors import UserError
from sweeps.options import Options
from sweeps.store.parts import Store
from sweeps.text import counted


def drop(options: Options, console: Console) -> int:
    """Retire the chosen rows, so that their measurements run again; the rows stay on disk."""
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
    store = Store(out=options.out)
    # Older rows of the same measurements go too: else an earlier failure would come back in place of a new run.
    store.drop(store.row_ids(set(rows["measurement"])), why=asked)
    console.print(
        f"Retired {len(rows)} measurement(s) of {rows['key'].nunique()} cell(s). They stay on disk "
        f"(dropped/ names them) and run again with the next launch."
    )
    return 0
