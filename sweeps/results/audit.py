"""Audit a results directory: each planned measurement is there exactly once, is what its key says, and is whole.

Cells' keys are computed again from the content of every plan (sweeps.study.manifest.changed_manifests). A row that
carries a planned measurement's key, and in each column that goes into it what the plan has, therefore has the identity
that its key says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, cast

from kbit.axes import Axis
from kbit.doors import load
from kbit.evaluation.evaluators import EVALUATORS
from kbit.spec import axes
from sweeps.files import JsonObject
from sweeps.launches.in_flight import InFlight
from sweeps.results.joined import state_of
from sweeps.status import FINAL, State
from sweeps.store.joining import digests
from sweeps.store.parts import Store
from sweeps.store.rows import measurement_row
from sweeps.store.samples import decode_samples
from sweeps.store.schema import Row, columns
from sweeps.study.cell import Measurement, eval_columns


class Fault(StrEnum):
    """What can be wrong with a planned measurement, each with what to do about it."""

    MISSING = "missing"
    FAILED = "failed"
    TWICE = "measured twice"
    IDENTITY = "not what its key says"
    PROVENANCE = "without its whole provenance"
    NUMBERS = "not what its samples say"

    @property
    def advice(self) -> str:
        return _ADVICE[self]


_DROP: Final = "mode=drop cell=KEY retires it, and the next launch measures it again"
_ADVICE: Final[Mapping[Fault, str]] = {
    Fault.MISSING: "the study's command runs what nobody is at",
    Fault.FAILED: "mode=logs says why, and retry= runs it again",
    Fault.TWICE: f"readers take the newest; {_DROP}, once",
    Fault.IDENTITY: f"something changed the row or the plan; {_DROP}",
    Fault.PROVENANCE: f"the number may be right, and can't be traced; {_DROP}",
    Fault.NUMBERS: f"don't trust the number; {_DROP}",
}
ALWAYS: Final = (
    *("sweep", "seconds", "peak_memory_bytes", "started", "finished", "commit", "versions", "device", "kernel", "seed"),
    *("launch", "pack", "job", "host", "batch_tokens", "dataset_hash", "n_samples", "bits_per_param", "total_bits"),
)
"""Columns that the row of a result has, of whatever version."""
RELATIVE: Final = 1e-5
"""Samples are float32, and metrics were made from float64."""
FINITE: Final = ("loss", "kl", "acc")
"""Metrics of which a result that did not diverge has a finite value."""
_OTHERWISE: Final = ("compute_dtype", "calibration_seed")
"""Columns that say more than the plan (the dtype that 'storage' was), or were null in earlier versions."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A fault of one planned measurement, with what was found, for people."""

    fault: Fault
    measurement: Measurement
    what: str


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What an audit looks for.

    Attributes:
        known: every measurement that some launch planned, by key.
        needed: keys of those that must be there: what the newest launches of the studies plan.
    """

    known: Mapping[str, Measurement]
    needed: Collection[str]


def find_faults(store: Store, planned: Planned, flight: InFlight, say: Callable[[str], None]) -> Iterator[Finding]:
    """Yield what is wrong. Memory holds one file of rows, and an id for each measurement.

    Args:
        store: read twice: which rows count, then all of them.
        planned: what it should hold.
        flight: who is at what.
        say: told how far it is.

    Raises:
        StoreError: a file is of a newer version, or can't be read.
    """
    rows = store.read(["measurement", "row_id", "status", "error_type"]).to_pylist()
    current = {row["measurement"]: row for row in rows if row["measurement"] in planned.known}
    for key in planned.needed:
        row = current.get(key)
        state = state_of(row, key, flight)
        if row is None:
            yield Finding(fault=Fault.MISSING, measurement=planned.known[key], what=state.meaning)
        elif row["status"] not in FINAL:
            what = f"{row['error_type']}" + ("" if state is State(row["status"]) else f", now {state}")
            yield Finding(fault=Fault.FAILED, measurement=planned.known[key], what=what)
    yield from _measured_twice(store, planned)
    wanted = {row["row_id"] for row in current.values() if row["status"] in FINAL}
    count = len(wanted)
    for row in _each(store, wanted):
        yield from _row_findings(row, planned.known[row["measurement"]])
        say(f"{count - len(wanted):,} of {count:,} measurements looked at")


def _measured_twice(store: Store, planned: Planned) -> Iterator[Finding]:
    """Look for measurements with several results that stand; a diverged one may be measured again on request."""
    first: dict[str, str] = {}
    several: dict[str, set[str]] = {}
    dropped = store.dropped_ids()
    for table in store.scan(["row_id", "measurement", "status"]):
        for row in table.to_pylist():
            key, row_id = row["measurement"], row["row_id"]
            if row["status"] != State.DONE or row_id in dropped or key not in planned.known:
                continue
            if first.setdefault(key, row_id) != row_id:
                several.setdefault(key, {first[key]}).add(row_id)
    if not several:
        return
    numbers = digests(store, {row_id for row_ids in several.values() for row_id in row_ids})
    for key, row_ids in several.items():
        alike = len({numbers.get(row_id) for row_id in row_ids}) == 1
        what = f"{len(row_ids)} results, with {'equal' if alike else 'different'} numbers"
        yield Finding(fault=Fault.TWICE, measurement=planned.known[key], what=what)


def _each(store: Store, wanted: set[str]) -> Iterator[Row]:
    """Yield rows by id, each once, file by file; takes their ids out of ``wanted``."""
    import pyarrow as pa

    for table in store.scan([c.name for c in columns() if c.name not in ("error", "higher_is_better")]):
        ids = table.column("row_id").to_pylist()
        for row in table.filter(pa.array([row_id in wanted for row_id in ids], pa.bool_())).to_pylist():
            if row["row_id"] in wanted:
                wanted.discard(row["row_id"])
                yield row


def _row_findings(row: Row, measurement: Measurement) -> Iterator[Finding]:
    checks = (
        (Fault.IDENTITY, differs(row, measurement)),
        (Fault.PROVENANCE, _lacks(row, measurement)),
        (Fault.NUMBERS, disagrees(row)),
    )
    for fault, what in checks:
        if what:
            yield Finding(fault=fault, measurement=measurement, what=what)


def differs(row: Row, measurement: Measurement) -> str:
    """Return which column of a row is not what the key is made of; '' where all are."""
    expected = measurement_row(measurement)
    model = ("weights_hash",) if expected["weights_hash"] else ("model_id", "revision")
    names: dict[str, Axis | None] = dict.fromkeys(("key", "measurement", *model, "method", "calibration"))
    names |= {**axes(), **eval_columns()}
    for name, declared in names.items():
        if name in _OTHERWISE or row[name] == expected[name]:
            continue
        # A column that came later is null in rows from before it.
        if declared is None or not (declared.is_neutral(row[name]) and declared.is_neutral(expected[name])):
            return f"{name} is {row[name]!r}, and {expected[name]!r} by its key"
    return ""


def _lacks(row: Row, measurement: Measurement) -> str:
    """Return what a row doesn't tell of its origin; '' where it tells all."""
    quantized = () if measurement.cell.quant.is_baseline else ("quantize_seconds",)
    missing = [name for name in (*ALWAYS, *quantized) if row[name] is None]
    if missing:
        return f"no {', '.join(missing)}"
    try:
        versions = json.loads(row["versions"])
    except ValueError:
        return "versions is no JSON"
    if not isinstance(versions, dict) or "torch" not in versions:
        return "versions doesn't name torch"
    return "it ends before it begins" if row["finished"] < row["started"] else ""


def disagrees(row: Row) -> str:
    """Return which number of a row does not follow from its samples; '' where all do that can."""
    metrics, stderr = dict(row["metrics"] or ()), dict(row["stderr"] or ())
    if not metrics:
        return "it has no metrics"
    broken = [name for name in FINITE if not math.isfinite(metrics.get(name, 0.0))]
    if row["status"] == State.DONE and broken:
        return f"it is done, and {broken[0]} is {metrics[broken[0]]!r}: it diverged"
    if any(len(item["data"]) != _bytes_of(item) for item in row["samples"] or ()):
        return "samples have another length than they say"
    samples = decode_samples(row["samples"] or [])
    recompute = EVALUATORS[row["eval_kind"]].recompute
    if recompute is None:
        return ""
    try:
        found = cast(Callable[..., tuple[dict[str, float], dict[str, float]]], load(recompute))(samples)
    except KeyError as error:
        return f"it has no samples {error.args[0]!r}"
    for name, value in found[0].items():
        if name not in metrics or not _alike(metrics[name], value, 0.1):
            return f"{name} is {metrics.get(name)!r}, and {value!r} by its samples"
    for name, value in found[1].items():
        # Older rows may lack one. It is the small difference of numbers as large as the metric.
        if name in stderr and not _alike(stderr[name], value, found[0][name]):
            return f"the standard error of {name} is {stderr[name]!r}, and {value!r} by its samples"
    return ""


def _bytes_of(item: JsonObject) -> int:
    return (item["count"] + 7) // 8 if item["dtype"] == "bits" else 4 * int(item["count"])


def _alike(a: float, b: float, size: float) -> bool:
    """Tell whether two numbers are alike, one made of samples of about this size, one of the same in float32."""
    if not math.isfinite(a) or not math.isfinite(b):
        return a == b or (math.isnan(a) and math.isnan(b))
    return math.isclose(a, b, rel_tol=RELATIVE, abs_tol=RELATIVE / 10 * abs(size))
