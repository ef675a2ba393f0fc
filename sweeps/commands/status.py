"""``mode=status``: count cells by state, and say how their jobs do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.markup import escape

from sweeps.commands.ask import observed_flight
from sweeps.commands.selection import chosen_part, chosen_results, chosen_states
from sweeps.commands.watch import watch
from sweeps.errors import UserError
from sweeps.executors.base import with_jobs
from sweeps.launches.claimer import Seen
from sweeps.launches.claims import Claims
from sweeps.launches.in_flight import InFlight
from sweeps.options import Options
from sweeps.plan.packs import TO_DO, what_is_left
from sweeps.results.state_table import StateCounts
from sweeps.results.superseded import newest_launches, what_superseded
from sweeps.results.table import States
from sweeps.status import FAILURES, State
from sweeps.store.parts import Store
from sweeps.study.grid import check_axes
from sweeps.study.manifest import load_manifests
from sweeps.text import counted

if TYPE_CHECKING:
    import pandas as pd

COUNTED_BY: Final = ("calibration", "label")
"""Columns beside the axes that cells can be counted by."""


def status(options: Options, console: Console) -> int:
    """Count cells by state, and by the axes of ``by``; say how their jobs do."""
    check_axes(options.by, "by", COUNTED_BY)
    if options.watch:
        return watch(options, console)
    flight = observed_flight(options.out, console)
    # By study, a cell that several share counts in each; by other axes it is one cell.
    by = options.by or ("sweep",)
    results = chosen_states(options, by, flight, by_study=not options.by)
    states = [s for s in reversed(State) if (results["status"] == s).any()]
    console.print(f"Cells in {options.out}:", highlight=False, soft_wrap=True)
    StateCounts.of(results, by, states).show(console)
    say_left(options, flight, console)
    for claim in flight.local:
        who = Claims(out=options.out).holder(claim)
        console.print(f"{claim.sweep} is running: {who}", highlight=False, soft_wrap=True)
    executors = with_jobs(options.out)
    for executor in executors:
        executor.show(flight, console)
    ended = {m for m, how in flight.ended.items() if how in (State.CANCELLED, State.LOST)}
    for executor in executors:
        blocked = executor.blocked(options.out, flight.queued | ended)
        if blocked:
            results = _say_blocked(blocked, results, chosen_results(options, long=True), console)
    # A cell that failed in two studies failed once.
    _explain_states(results.drop_duplicates(["key", "status"]), console)
    Store(out=options.out).fold()
    return 0


def say_left(options: Options, flight: InFlight, console: Console) -> None:
    """Say of each study what is to do, as mode=plan has it, and what was superseded, by what."""
    known = Seen.after(flight, Store(out=options.out)).known
    done = {key for key, state in known.statuses.items() if State(state).is_final}
    manifests, states = load_manifests(options.out, options.asked_sweep), States(out=options.out, flight=flight)
    for name, newest in newest_launches(manifests).items():
        try:
            part = chosen_part(options.choice, options.out, newest, states)
        except UserError:
            continue  # what was chosen is of other studies, or of earlier launches
        todo = what_is_left(part, known, retry=options.retry)[0][TO_DO]
        what = f"{counted(todo, 'measurement')} to do: the same command runs them" if todo else "nothing to do"
        console.print(f"{name}: {what}.", highlight=False, soft_wrap=True)
        for line in what_superseded([m for m in manifests if m.sweep == name], done):
            console.print(f"[yellow]{escape(line)}.[/]", highlight=False, soft_wrap=True)


def _say_blocked(
    blocked: Mapping[str, set[str]], results: pd.DataFrame, long: pd.DataFrame, console: Console
) -> pd.DataFrame:
    """Say which cells wait for what failed; returns the other cells."""
    waiting = long[long["status"].isin([State.CANCELLED, State.LOST, State.QUEUED])]
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
