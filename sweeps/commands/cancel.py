"""``mode=cancel``: end a study's jobs, and no others."""

from __future__ import annotations

from rich.console import Console

from sweeps.commands.selection import chosen_results
from sweeps.errors import UserError
from sweeps.executors.base import EXECUTORS, with_jobs
from sweeps.launches.claims import Claims
from sweeps.launches.in_flight import load_launch, read_flight
from sweeps.options import Options


def cancel(options: Options, console: Console) -> int:
    """Cancel the jobs of a study, or those that hold nothing but chosen cells, wherever they run.

    Raises:
        UserError: several studies have jobs and none was named, or an executor can't be asked.
    """
    sweep, out = options.asked_sweep, options.out
    for executor in with_jobs(out):
        # A job that was seen to end may have been put back into the queue since.
        executor.observe(out)
    flight = read_flight(out)
    unsettled = {la.sweep for la, _ in flight.launches if sweep in (None, la.sweep)}
    if len(unsettled) > 1:
        first, *_ = names = sorted(unsettled)
        raise UserError(f"mode=cancel: {', '.join(names)} have jobs: name one, e.g. sweep={first}")
    # Of the study every launch, whatever is known of its jobs.
    launched = [(c, la) for c in Claims(out=out).open() if c.detached if (la := load_launch(out, c))]
    studies = unsettled or ({sweep} if sweep else {la.sweep for _, la in launched})
    chosen = [(c, la) for c, la in launched if len(studies) == 1 and la.sweep in studies]
    if not chosen:
        named = f" of {sweep}" if sweep else ""
        console.print(f"No jobs{named} in {out} are known to be queued or running.", highlight=False)
        return 0
    measurements = set(chosen_results(options, long=True)["measurement"]) if options.choice else None
    codes = []
    for name in dict.fromkeys(c.executor for c, _ in chosen):
        its = [la for c, la in chosen if c.executor == name]
        codes.append(EXECUTORS[name].cancel(out, its, console, measurements))
    return max(codes)
