"""Cells that kill their jobs: after a few deaths without a word, they are recorded as failed, so that none loops."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sweeps.launches.in_flight import InFlight
from sweeps.status import FINAL
from sweeps.store.parts import Store
from sweeps.store.rows import Origin, failed_row
from sweeps.study.manifest import Manifest
from sweeps.worker.pool import LOG_TAIL

MOST_DEATHS: Final = 3
"""Jobs that may die while they measure the same thing."""


def record_poison(store: Store, manifest: Manifest, flight: InFlight) -> list[str]:
    """Record measurements that too many jobs died of as failed; return a sentence for each.

    'retry=[failed]' gives such a measurement as many lives again: only deaths after its last record count.
    """
    repeated = {m: deaths for m, deaths in flight.suspects.items() if len(deaths) >= MOST_DEATHS}
    if not repeated:
        return []
    rows = store.read(["measurement", "status", "finished"], measurements=set(repeated)).to_pylist()
    stored = {r["measurement"]: r for r in rows}
    said = []
    for measurement in manifest.measurements():
        deaths = repeated.get(measurement.key, [])
        row = stored.get(measurement.key)
        if not deaths or (row is not None and row["status"] in FINAL) or measurement.key in flight.held:
            continue
        since = row["finished"].timestamp() if row is not None else 0.0
        logs = [log for log, began in deaths if began > since]
        if len(logs) < MOST_DEATHS:
            continue
        log = logs[-1]
        why = f"{len(logs)} jobs died while measuring this; the last one's log, {log}, ends with:\n{_tail(log)}"
        cell = measurement.cell
        origin = Origin(sweep=manifest.sweep, pack="poison")
        store.write(failed_row(measurement, origin, error_type="JobDied", error=why))
        said.append(f"{cell.label} on {measurement.eval.name}: {len(logs)} jobs died of it; it counts as failed now")
    store.close()
    return said


def _tail(log: str) -> str:
    try:
        return Path(log).read_text(errors="replace")[-LOG_TAIL:]
    except OSError as error:
        return f"(it can't be read: {error.strerror})"
