"""``mode=sync``: make W&B whole from the store."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from sweeps.errors import UserError
from sweeps.files import list_files
from sweeps.options import Options
from sweeps.results.report import write_tables
from sweeps.results.table import load_results
from sweeps.store.parts import Store
from sweeps.study.manifest import load_manifests
from sweeps.tracking import tracker
from sweeps.tracking.artifact import upload_tables


def sync(options: Options, console: Console) -> int:
    """Make W&B whole from the store."""
    store = Store(out=options.out)
    if not store.keys():
        raise UserError(f"out={str(store.out)!r} holds no result to mirror")
    if not list_files(store.out / "manifests", "*.json"):
        raise UserError(
            f"out={str(store.out)!r} holds results, but nothing tells of which studies (manifests/*.json): restore that"
        )
    with console.status("mirroring") as status:
        report = tracker.sync(
            store.out,
            options.tracking,
            progress=lambda done, of: status.update(f"mirroring run {done} of {of}"),
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
            with tempfile.TemporaryDirectory() as elsewhere:
                try:
                    files = write_tables(store, sweep, results)
                except OSError:  # of who may only read there
                    files = write_tables(Store(out=Path(elsewhere)), sweep, results)
                problem = upload_tables(replace(options.tracking, mode="online"), sweep, files)
            if problem:
                yield problem
