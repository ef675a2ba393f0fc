"""``mode=logs``: why cells failed, and the ends of the logs of jobs that died."""

from __future__ import annotations

from rich.console import Console

from sweeps.commands.ask import observed_flight
from sweeps.commands.selection import chosen_results
from sweeps.executors.base import with_jobs
from sweeps.options import Options
from sweeps.status import State


def logs(options: Options, console: Console) -> int:
    """Print why cells failed, and the ends of the logs of jobs that died."""
    observed_flight(options.out, console)
    long = chosen_results(options, long=True)
    failed = long[long["status"].isin([State.FAILED, State.OOM]) & long["error"].notna()]
    for row in failed.to_dict("records"):
        console.rule(f"{row['key'][:10]}  {row['model']} {row['label']}  {row['eval']}")
        console.print(row["error"], markup=False, highlight=False, soft_wrap=True)
        folder = options.out / "logs" / str(row["launch"]).split(" ")[0]
        of_job = sorted(folder.glob(f"*/{str(row['job']).partition('/')[2]}_*log*"))
        where = (
            f"host {row['host']}, job {row['job']}, {row['finished']}; logs: {', '.join(map(str, of_job or [folder]))}"
        )
        console.print(where, markup=False, highlight=False, soft_wrap=True)
    unrecorded = long[long["row_id"].isna() & (long["status"] != State.MISSING)]
    wanted = set(unrecorded["measurement"])
    shown = sum(executor.logs(options.out, wanted, console) for executor in with_jobs(options.out))
    if not len(failed) and not shown:
        states = ", ".join(f"{n} {s}" for s, n in long["status"].value_counts().items())
        console.print(f"No failed measurement among those chosen ({states}).")
    return 0
