"""``mode=status``: count cells by state, and say how their jobs do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sweeps.commands.ask import observed_flight
from sweeps.commands.selection import chosen_results
from sweeps.executors.base import with_jobs
from sweeps.options import Options
from sweeps.status import FAILURES, State
from sweeps.study.grid import check_axes
from sweeps.text import counted

if TYPE_CHECKING:
    import pandas as pd


def status(options: Options, console: Console) -> int:
    """Count cells by state, and by the axes of ``by``; say how their jobs do."""
    check_axes(options.by, "by")
    flight = observed_flight(options.out, console)
    results = chosen_results(options)
    states = [s for s in reversed(State) if (results["status"] == s).any()]
    console.print(f"Cells in {options.out}:", highlight=False, soft_wrap=True)
    table = Table()
    groups = list(options.by) or ["sweep"]
    for name in groups:
        table.add_column(name)
    for state in [*states, "all"]:
        table.add_column(state, justify="right")
    for values, group in results.groupby(groups, dropna=False, sort=True):
        counts = group["status"].value_counts()
        numbers = [str(counts.get(s, 0) or "") for s in states]
        table.add_row(*("-" if _is_na(v) else str(v) for v in values), *numbers, str(len(group)))
    console.print(table)
    for claim in flight.local:
        console.print(f"{claim.sweep} is running: launch {claim.launch}, process {claim.pid} on {claim.host}")
    executors = with_jobs(options.out)
    for executor in executors:
        executor.show(flight, console)
    cancelled = {m for m, how in flight.ended.items() if how == State.CANCELLED}
    for executor in executors:
        blocked = executor.blocked(options.out, flight.queued | cancelled)
        if blocked:
            results = _say_blocked(blocked, results, chosen_results(options, long=True), console)
    _explain_states(results, console)
    return 0


def _say_blocked(
    blocked: Mapping[str, set[str]], results: pd.DataFrame, long: pd.DataFrame, console: Console
) -> pd.DataFrame:
    """Say which cells wait for what failed; returns the other cells."""
    waiting = long[long["status"].isin([State.CANCELLED, State.QUEUED])]
    for why, measurements in blocked.items():
        keys = set(waiting.loc[waiting["measurement"].isin(measurements), "key"])
        if keys:
            console.print(
                f"[red]{counted(len(keys), 'cell')} can't run:[/] {escape(why)}", highlight=False, soft_wrap=True
            )
            console.print("  mode=logs says more. Fix it, and run the same command again.", highlight=False)
        results = results[~results["key"].isin(keys)]
    return results


def _explain_states(results: pd.DataFrame, console: Console) -> None:
    """For what did not finish: why, and what to do."""
    failed = results[results["status"] == State.FAILED]
    for error, count in failed["error_type"].value_counts().items():
        console.print(f"[red]{count} failed[/] with {error!s}: {State.FAILED.advice}", highlight=False)
    for state in FAILURES:
        count = int((results["status"] == state).sum())
        if count and state is not State.FAILED:
            console.print(f"[yellow]{count} {state}:[/] {escape(state.advice)}", highlight=False)


def _is_na(value: Any) -> bool:
    import pandas as pd

    return bool(pd.isna(value))
