"""``mode=sync``: make W&B whole from the store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from sweeps.errors import UserError
from sweeps.executors.base import with_jobs
from sweeps.launches.in_flight import read_flight
from sweeps.options import Options
from sweeps.store.parts import Store
from sweeps.tracking import tracker
from sweeps.worker.execution import run_config, run_name


def sync(options: Options, console: Console) -> int:
    """Make W&B whole from the store."""
    store = Store(out=options.out)
    for executor in with_jobs(store.out):
        # What ended since somebody last looked is not running any more.
        executor.observe(store.out)
    # A pack that is running mirrors itself: adding its rows here too would show them twice.
    running = read_flight(store.out).held
    by_pack: dict[str, list[Mapping[str, Any]]] = {}
    rows = store.read().to_pylist()
    busy = {row["pack"] for row in rows if row["measurement"] in running}
    for row in rows:
        if row["pack"] in busy:
            continue
        by_pack.setdefault(row["pack"], []).append(
            {**row, "metrics": dict(row["metrics"] or ()), "stderr": dict(row["stderr"] or ())}
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
    console.print(str(report), highlight=False)
    if busy:
        console.print(f"{len(busy)} packs are running and mirror themselves; sync again when they are done.")
    return 1 if report.error else 0
