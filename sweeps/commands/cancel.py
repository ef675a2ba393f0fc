"""``mode=cancel``: end a study's jobs, and no others."""

from __future__ import annotations

from rich.console import Console

from sweeps.commands.selection import chosen_results
from sweeps.errors import UserError
from sweeps.executors.base import EXECUTORS
from sweeps.launches.in_flight import read_flight
from sweeps.options import Options


def cancel(options: Options, console: Console) -> int:
    """Cancel the jobs of a study, or those that hold nothing but chosen cells, wherever they run.

    Raises:
        UserError: several studies have jobs and none was named, or an executor can't be asked.
    """
    sweep, flight = options.asked_sweep, read_flight(options.out)
    chosen = [la for la, _ in flight.launches if sweep in (None, la.sweep)]
    studies = sorted({la.sweep for la in chosen})
    if len(studies) > 1:
        raise UserError(f"mode=cancel: {', '.join(studies)} have jobs: name one, e.g. sweep={studies[0]}")
    if not chosen:
        named = f" of {sweep}" if sweep else ""
        console.print(f"No jobs{named} in {options.out} are known to be queued or running.", highlight=False)
        return 0
    measurements = set(chosen_results(options, long=True)["measurement"]) if options.choice else None
    codes = []
    for name in dict.fromkeys(flight.executors[la.id] for la in chosen):
        its = [la for la in chosen if flight.executors[la.id] == name]
        codes.append(EXECUTORS[name].cancel(options.out, its, console, measurements))
    return max(codes)
