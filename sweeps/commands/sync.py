"""``mode=sync``: make W&B whole from the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from rich.console import Console

from sweeps.errors import UserError
from sweeps.options import Options
from sweeps.results.report import write_tables
from sweeps.results.table import load_results
from sweeps.store.parts import Store
from sweeps.study.manifest import load_manifests
from sweeps.tracking import tracker
from sweeps.tracking.artifact import upload_tables
from sweeps.tracking.runs import settled


def sync(options: Options, console: Console) -> int:
    """Make W&B whole from the store."""
    store, tracking = Store(out=options.out), options.tracking
    manifests = load_manifests(store.out)
    if not store.keys():
        raise UserError(f"out={str(store.out)!r} holds no result to mirror")
    for sweep in dict.fromkeys(manifest.sweep for manifest in manifests):
        planned = (cell.axes() for manifest in manifests if manifest.sweep == sweep for cell in manifest.cells)
        settled(store.out, sweep, tracking.by, planned)
    with console.status("mirroring") as status:
        report = tracker.sync(
            store.out, tracking, progress=lambda done, of: status.update(f"mirroring: {done} of {of} runs")
        )
        problems = [] if report.error else list(_sync_tables(store, options, status.update))
    console.print(str(report), highlight=False)
    for problem in problems:
        console.print(problem, markup=False, highlight=False)
    return 1 if report.error or problems else 0


def _sync_tables(store: Store, options: Options, say: Callable[[str], None]) -> Iterator[str]:
    """Write and upload the tables of each study that has results; yield what did not work."""
    for sweep in dict.fromkeys(manifest.sweep for manifest in load_manifests(store.out)):
        results = load_results(store.out, sweep=sweep)
        if results["finished"].notna().any():
            say(f"uploading the tables of {sweep}")
            online = replace(options.tracking, mode="online")
            problem = upload_tables(online, store.out, sweep, write_tables(store, sweep, results))
            if problem:
                yield problem
