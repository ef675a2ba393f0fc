"""Join what was planned with what is stored and in flight, a column at a time: one row for each planned measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sweeps.launches.in_flight import InFlight
from sweeps.results.superseded import planned_now
from sweeps.status import FINAL, State
from sweeps.store.rows import measurement_row, recorded_state, recorded_states
from sweeps.store.schema import Row, arrow_schema
from sweeps.study.cell import Measurement
from sweeps.study.manifest import Manifest
from sweeps.study.reading import superseded

if TYPE_CHECKING:
    import pyarrow as pa


def joined(manifests: Sequence[Manifest], read: Callable[[], pa.Table], flight: InFlight) -> pa.Table:
    """Return a row for each planned measurement, in the columns of what is read.

    Args:
        manifests: what was planned, oldest first; models of an earlier reading are left out.
        read: gives the rows that count (``Store.read``), with measurement, status, error_type and sweep at least. If
            nobody else holds them, each column is let go as soon as the joined one is made.
        flight: who is at what.
    """
    import pyarrow as pa

    stored = read()
    earlier = superseded(model for manifest in manifests for model in manifest.models)
    rows = [(study, m) for study, m in _each_once(manifests) if not earlier or m.cell.model not in earlier]
    at = _places([m.key for _, m in rows], stored)
    states = _states(manifests, rows, at, recorded_states(stored), flight)
    # What runs again shows nothing of its last run.
    is_new = (at < 0) | np.array([s is State.RUNNING for s in states], dtype=bool)
    place = np.where(is_new, stored.num_rows + np.cumsum(is_new) - 1, at)
    if is_new.any():
        unmeasured = _unmeasured([m for (_, m), new in zip(rows, is_new, strict=True) if new], stored.schema)
        stored = pa.concat_tables([stored, unmeasured]).unify_dictionaries()
    schema, arrays = stored.schema, stored.columns
    if not np.array_equal(place, np.arange(stored.num_rows)):
        del stored
        order = pa.array(place, pa.int64())
        arrays.reverse()
        arrays = [arrays.pop().take(order) for _ in schema]
    table = pa.Table.from_arrays(arrays, schema=schema)
    # Rows of before schema 4 lack the seed; the study knows.
    columns: dict[str, Iterable[Any]] = {
        "status": (state.value for state in states),
        "sweep": (study for study, _ in rows),
        "calibration_seed": (m.cell.calibration_seed for _, m in rows),
    }
    for name, values in columns.items():
        if name not in table.schema.names:
            continue
        field = arrow_schema().field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
    return table


def _states(
    manifests: Sequence[Manifest],
    rows: Sequence[tuple[str, Measurement]],
    places: NDArray[np.int64],
    known: Sequence[State],
    flight: InFlight,
) -> list[State]:
    """Return the state of each planned measurement, by what is stored at its place."""
    now: frozenset[str] | None = None
    held = flight.held
    states = []
    for (_, measurement), place in zip(rows, places.tolist(), strict=True):
        state = None if place < 0 else known[place]
        if state not in FINAL:
            state = decided(state, measurement.key, flight)
            if measurement.key not in held:
                now = planned_now(manifests) if now is None else now
                state = state if measurement.key in now else State.SUPERSEDED
        states.append(state)
    return states


def _each_once(manifests: Sequence[Manifest]) -> Iterable[tuple[str, Measurement]]:
    """Return the values of ``planned``; a single launch plans each only once, but for what methods need first."""
    if len(manifests) == 1 and all(cell.first is None for cell in manifests[0].cells):
        return ((manifests[0].sweep, m) for m in manifests[0].measurements())
    return planned(manifests).values()


def planned(manifests: Sequence[Manifest]) -> dict[tuple[str, str], tuple[str, Measurement]]:
    """(study, measurement) by cell key and evaluation name; of an evaluation's variants the last planned counts."""
    found: dict[tuple[str, str], tuple[str, Measurement]] = {}
    for manifest in manifests:
        for m in manifest.measurements():
            where = (m.cell.key, m.eval.name)
            known = found.get(where)
            found[where] = (manifest.sweep if known is None else known[0], m)
    return found


def state_of(row: Row | None, key: str, flight: InFlight) -> State:
    """Return ``decided`` of a stored row (columns status, error_type), or of none."""
    return decided(None if row is None else recorded_state(row), key, flight)


def decided(stored: State | None, key: str, flight: InFlight) -> State:
    """Decide by a stored result, then work in flight, then a stored failure, then how work without a record ended."""
    if stored is not None and stored.is_final:
        return stored
    if key in flight.running:
        return State.RUNNING
    if stored is not None:
        return stored
    return State.QUEUED if key in flight.queued else State(flight.ended.get(key, State.MISSING))


def _places(keys: Sequence[str], stored: pa.Table) -> NDArray[np.int64]:
    """Return where each measurement's row is; -1 for none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found = pc.index_in(pa.array(keys, pa.string()), stored.column("measurement").combine_chunks())
    return np.asarray(pc.fill_null(found, -1).to_numpy(zero_copy_only=False), dtype=np.int64)


def _unmeasured(measurements: Sequence[Measurement], schema: pa.Schema) -> pa.Table:
    """Return what is known of measurements before they run."""
    import pyarrow as pa

    rows = [measurement_row(m) for m in measurements]
    arrays = [pa.array([row.get(f.name) for row in rows], f.type) for f in schema]
    return pa.Table.from_arrays(arrays, schema=schema)
