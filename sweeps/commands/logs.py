"""``mode=logs``: why cells failed, and the ends of the logs of jobs that died."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, cast

from rich.console import Console
from rich.markup import escape

from sweeps.commands.ask import observed_flight
from sweeps.commands.selection import chosen_results
from sweeps.executors.base import with_jobs
from sweeps.options import Options
from sweeps.status import State
from sweeps.store.schema import Row
from sweeps.text import counted

MOST_CELLS_SHOWN: Final = 10


def logs(options: Options, console: Console) -> int:
    """Print why cells failed, and the ends of the logs of jobs that died."""
    observed_flight(options.out, console)
    long = chosen_results(options, long=True)
    failed = long[long["status"].isin([State.FAILED, State.OOM]) & long["error"].notna()]
    for alike in _by_trace(cast(list[Row], failed.to_dict("records"))).values():
        _show_failures(alike, options.out, console)
    unrecorded = long[long["row_id"].isna() & (long["status"] != State.MISSING)]
    wanted = set(unrecorded["measurement"])
    shown = sum(executor.logs(options.out, wanted, console) for executor in with_jobs(options.out))
    if not len(failed) and not shown:
        states = ", ".join(f"{n} {s}" for s, n in long["status"].value_counts().items())
        console.print(f"No failed measurement among those chosen ({states}).")
    return 0


def _by_trace(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Group failures that came the same way, in the order of their first: what the last line says may differ."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        trace, _, last = row["error"].rstrip().rpartition("\n")
        groups.setdefault((str(row["error_type"]), trace or last), []).append(row)
    return groups


def _show_failures(rows: Sequence[Row], out: Path, console: Console) -> None:
    """Print whose failures these are, the traceback that they share, and where each lies in full."""
    said = {row["error"].rstrip().rpartition("\n")[2] for row in rows}
    cells: dict[str, list[Row]] = {}
    for row in rows:
        cells.setdefault(row["key"], []).append(row)
    names = [
        f"{key[:10]}  {its[0]['model']} {its[0]['label']}  {', '.join(row['eval'] for row in its)}"
        for key, its in cells.items()
    ]
    if len(rows) == 1:
        console.rule(escape(names[0]))
    else:
        count = f"{counted(len(rows), 'measurement')} of {counted(len(cells), 'cell')}"
        console.rule(f"{count} failed alike: {escape(str(rows[0]['error_type']))}")
        for name, its in list(zip(names, cells.values(), strict=True))[:MOST_CELLS_SHOWN]:
            _print(name, console)
            # The traceback below ends with one of them.
            for last in (
                dict.fromkeys(row["error"].rstrip().rpartition("\n")[2] for row in its) if len(said) > 1 else ()
            ):
                _print(f"    {last}", console)
        if len(cells) > MOST_CELLS_SHOWN:
            _print(f"… and {counted(len(cells) - MOST_CELLS_SHOWN, 'more cell')}: cell= or where= chooses", console)
    _print(rows[0]["error"], console)
    jobs = {(row["host"], row["job"], row["launch"]): row for row in rows}
    for (host, job, launch), row in jobs.items():
        folder = out / "logs" / str(launch).split(" ")[0]
        of_job = sorted(folder.glob(f"*/{str(job).partition('/')[2]}_*log*"))
        _print(f"host {host}, job {job}, {row['finished']}; logs: {', '.join(map(str, of_job or [folder]))}", console)


def _print(text: str, console: Console) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
