"""``mode=sync``: make W&B whole from the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from rich.console import Console

from sweeps.errors import UserError
from sweeps.executors.base import with_jobs
from sweeps.launches.in_flight import read_flight
from sweeps.options import Options
from sweeps.results.report import write_tables
from sweeps.results.table import load_results, superseded_measurements
from sweeps.status import State
from sweeps.store.parts import Store
from sweeps.store.schema import Row
from sweeps.study.manifest import load_manifests
from sweeps.tracking import tracker
from sweeps.tracking.artifact import upload_tables
from sweeps.worker.execution import run_config, run_name


def sync(options: Options, console: Console) -> int:
    """Make W&B whole from the store."""
    store = Store(out=options.out)
    for executor in with_jobs(store.out):
        # What ended since somebody last looked is not running any more.
        executor.observe(store.out)
    # A pack that is running mirrors itself: adding its rows here too would show them twice.
    running = read_flight(store.out).held
    by_pack: dict[str, list[Row]] = {}
    rows = store.read().to_pylist()
    busy = {row["pack"] for row in rows if row["measurement"] in running}
    superseded = superseded_measurements(store.out)
    for row in rows:
        if row["pack"] in busy:
            continue
        marked = {"status": State.SUPERSEDED.value} if row["measurement"] in superseded else {}
        by_pack.setdefault(row["pack"], []).append(
            {**row, "metrics": dict(row["metrics"] or ()), "stderr": dict(row["stderr"] or ()), **marked}
        )
    if not by_pack:
        raise UserError(f"out={str(store.out)!r} holds no finished pack to mirror")
    packs = []
    for pack_id, rows in by_pack.items():
        about = run_config(rows[0])
        name = run_name(pack_id, about)
        packs.append(tracker.TrackedPack(id=pack_id, sweep=rows[0]["sweep"], name=name, config=about, rows=rows))
    with console.status("mirroring") as status:
        report = tracker.sync(
            packs, options.tracking, progress=lambda done, of: status.update(f"mirroring pack {done} of {of}")
        )
        problems = [] if report.error else list(_sync_tables(store, options, status.update))
    console.print(str(report), highlight=False)
    for problem in problems:
        console.print(problem, markup=False, highlight=False)
    if busy:
        console.print(f"{len(busy)} packs are running and mirror themselves; sync again when they are done.")
    return 1 if report.error or problems else 0


def _sync_tables(store: Store, options: Options, say: Callable[[str], None]) -> Iterator[str]:
    """Write and upload the tables of each study that has results; yield what did not work."""
    for sweep in dict.fromkeys(manifest.sweep for manifest in load_manifests(store.out)):
        results = load_results(store.out, sweep=sweep)
        if results["finished"].notna().any():
            say(f"uploading the tables of {sweep}")
            online = replace(options.tracking, mode="online")
            problem = upload_tables(online, sweep, write_tables(store, sweep, results))
            if problem:
                yield problem
