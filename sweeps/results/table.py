"""Read a study: ``load_results`` joins what was planned, what is stored and what is in flight into one table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sweeps.errors import StoreError, UserError
from sweeps.launches.in_flight import InFlight, read_flight
from sweeps.results.superseded import newest_launches, planned_now
from sweeps.status import State
from sweeps.store.parts import Store
from sweeps.store.rows import measurement_row, recorded_state
from sweeps.store.samples import Samples, decode_samples
from sweeps.store.schema import Row, cell_columns, columns
from sweeps.study.cell import Measurement, ModelRef
from sweeps.study.manifest import Manifest, load_manifests
from sweeps.study.reading import superseded
from sweeps.text import counted

if TYPE_CHECKING:
    import pandas as pd

ZERO_SHOT: Final = ("lambada_openai", "winogrande", "hellaswag", "piqa")
"""The paper's four tasks; zero_shot_mean is the mean of their accuracies (section 4)."""

# What a cell's row in the wide table says of the run, besides its metrics: summed, or the latest measurement's.
_WIDE_SUMS: Final = ("seconds",)
_WIDE_MAX: Final = ("peak_memory_bytes", "finished")
_WIDE_LAST: Final = (
    *("compute_dtype", "commit", "dirty", "versions", "device", "kernel", "seed", "launch", "pack", "job", "host"),
    "error_type",
)


def load_results(out: str | Path, long: bool = False, *, sweep: str | None = None) -> pd.DataFrame:
    """Read the results of a directory as a table.

    Args:
        out: the results directory.
        long: one row per measurement; else one row per planned cell, with a column ``{eval}_{metric}`` and
            ``{eval}_{metric}_stderr`` for each metric, ``{eval}_{metric}_higher_is_better`` where only the task's
            definition says it, ``{eval}_status``, and ``zero_shot_mean`` where the paper's four tasks are there. Where
            launches planned an evaluation with different settings, the newest launch's count. What was measured of an
            earlier reading of a model's weights is left out (``sweeps.study.reading``).
        sweep: only the cells that this study planned.

    Raises:
        UserError: no study was ever planned there.
    """
    rows = _long_rows(Path(out), planned_there(Path(out), sweep))
    return _long(rows) if long else _wide(rows)


def load_tables(
    outs: Sequence[Path], *, sweep: str | None = None, manifest: Manifest | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read (wide, long) tables of one or several directories, each once.

    A measurement that several directories planned is the one that is done; of several, the first.

    Args:
        outs: results directories.
        sweep: only what this study planned, in those that hold it.
        manifest: exactly what this launch planned.

    Raises:
        UserError: no study was ever planned there, or none of that name.
    """
    found: dict[tuple[str, str], Row] = {}
    problems: list[UserError] = []
    for out in outs:
        try:
            manifests = [manifest] if manifest is not None else planned_there(out, sweep)
        except StoreError:
            raise
        except UserError as problem:
            problems.append(problem)
            continue
        for row in _long_rows(out, manifests):
            where = (row["key"], row["eval"])
            if where not in found or (not State(found[where]["status"]).is_final and State(row["status"]).is_final):
                found[where] = row
    if len(problems) == len(outs):
        raise problems[0]
    rows = list(found.values())
    return _wide(rows), _long(rows)


def results_by_study(out: Path, long: bool = False, *, sweep: str | None = None) -> pd.DataFrame:
    """Read the results of each study of a directory: a cell that several studies planned has a row for each of them.

    Args:
        out: the results directory.
        long: one row per measurement; else one per cell.
        sweep: only this study.

    Raises:
        UserError: no study was ever planned there.
    """
    import pandas as pd

    manifests = planned_there(out, sweep)
    flight = read_flight(out)
    stored: dict[str, Row] = {row["measurement"]: row for row in Store(out=out).read().to_pylist()}
    frames = []
    for name in newest_launches(manifests):
        rows = _joined([m for m in manifests if m.sweep == name], stored, flight)
        frames.append(_long(rows) if long else _wide(rows))
    return frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)


def study_results(out: Path, manifest: Manifest) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(wide, long) of exactly what one launch planned, whatever else the directory holds."""
    rows = _long_rows(out, [manifest])
    return _wide(rows), _long(rows)


def left_out(out: Path, sweep: str | None = None) -> list[str]:
    """Say, per model, which cells ``load_results`` leaves out because they are of an earlier reading, and why."""
    manifests = load_manifests(out, sweep)
    cells = {m.cell.key: m.cell.model for _, m in planned(manifests).values()}
    earlier = superseded(_models(manifests))
    counts = Counter(model for model in cells.values() if model in earlier)
    return [f"{counted(n, 'cell')} of {model.label} left out: {earlier[model]}" for model, n in counts.items()]


def superseded_measurements(out: Path) -> frozenset[str]:
    """Return the measurements, by key, that studies planned once and no study's table shows any more.

    Their models are of an earlier reading, or a later launch of the study planned the evaluation otherwise.
    """
    manifests = load_manifests(out)
    earlier = superseded(_models(manifests))
    shown: set[str] = set()
    for name in newest_launches(manifests):
        of_study = planned([m for m in manifests if m.sweep == name])
        shown |= {m.key for _, m in of_study.values() if m.cell.model not in earlier}
    return frozenset(m.key for manifest in manifests for m in manifest.measurements() if m.key not in shown)


def load_samples(out: str | Path, measurements: Iterable[str]) -> dict[str, Samples]:
    """Per-sample outcomes by measurement key and name: bool for right or wrong, float32 nats, int32 tokens."""
    table = Store(out=Path(out)).read(["measurement", "samples"], measurements=set(measurements))
    pairs = zip(table.column("measurement").to_pylist(), table.column("samples").to_pylist(), strict=True)
    return {key: decode_samples(samples or []) for key, samples in pairs}


def planned_there(out: Path, sweep: str | None) -> list[Manifest]:
    """Return the manifests of a results directory, or one study's, oldest first.

    Raises:
        UserError: there are none.
    """
    manifests = load_manifests(out, sweep)
    if not manifests:
        known = sorted({m.sweep for m in load_manifests(out)})
        raise UserError(
            f"out={str(out)!r} holds no study" + (f" named {sweep!r}; it holds {', '.join(known)}" if known else "")
        )
    return manifests


def _models(manifests: Sequence[Manifest]) -> Iterable[ModelRef]:
    return (cell.model for manifest in manifests for cell in manifest.cells)


def _long_rows(out: Path, manifests: Sequence[Manifest]) -> list[Row]:
    # Who is at it first: what ends in between has then already been stored.
    flight = read_flight(out)
    stored: dict[str, Row] = {row["measurement"]: row for row in Store(out=out).read().to_pylist()}
    return _joined(manifests, stored, flight)


def _joined(manifests: Sequence[Manifest], stored: Mapping[str, Row], flight: InFlight) -> list[Row]:
    """Join what was planned with what is stored and in flight."""
    rows: list[Row] = []
    now = planned_now(manifests)
    earlier = superseded(_models(manifests))
    for study, measurement in planned(manifests).values():
        if measurement.cell.model in earlier:
            continue
        row = stored.get(measurement.key)
        state = state_of(row, measurement.key, flight)
        if measurement.key not in now and not state.is_final and measurement.key not in flight.held:
            state = State.SUPERSEDED
        if row is None or state is State.RUNNING:
            row = _planned_row(measurement)
        metrics, stderr = dict(row["metrics"] or ()), dict(row["stderr"] or ())
        # Parquet can't hold a column of empty mappings.
        directions = dict(row.get("higher_is_better") or ()) or None
        # Rows of before schema 4 lack it; the study knows.
        seed = {"calibration_seed": measurement.cell.calibration_seed}
        about = {**seed, "metrics": metrics, "stderr": stderr, "higher_is_better": directions}
        rows.append({**row, **about, "status": state.value, "sweep": study})
    return rows


def measurement_states(out: Path, manifest: Manifest, flight: InFlight) -> dict[str, State]:
    """Return the state of each measurement that a launch of a study may run: all of them, unless some were chosen."""
    rows = Store(out=out).read(["measurement", "status", "error_type"]).to_pylist()
    stored = {row["measurement"]: row for row in rows}
    return {m.key: state_of(stored.get(m.key), m.key, flight) for m in manifest.wanted()}


def state_of(row: Row | None, key: str, flight: InFlight) -> State:
    """Decide by a stored result, then work in flight, then a stored failure, then how work without a record ended."""
    stored = None if row is None else recorded_state(row)
    if stored is not None and stored.is_final:
        return stored
    if key in flight.running:
        return State.RUNNING
    if stored is not None:
        return stored
    return State.QUEUED if key in flight.queued else State(flight.ended.get(key, State.MISSING))


def planned(manifests: Sequence[Manifest]) -> dict[tuple[str, str], tuple[str, Measurement]]:
    """(study, measurement) by cell key and evaluation name; of an evaluation's variants the last planned counts."""
    found: dict[tuple[str, str], tuple[str, Measurement]] = {}
    for manifest in manifests:
        for m in manifest.measurements():
            where = (m.cell.key, m.eval.name)
            study = found[where][0] if where in found else manifest.sweep
            found[where] = (study, m)
    return found


def _planned_row(measurement: Measurement) -> Row:
    empty = {c.name: None for c in columns() if c.name != "samples"}
    return {**empty, **measurement_row(measurement), "metrics": {}, "stderr": {}}


def _long(rows: Sequence[Row]) -> pd.DataFrame:
    return _frame(rows, [c.name for c in columns() if c.name != "samples"])


def _wide(rows: Sequence[Row]) -> pd.DataFrame:
    cells: dict[str, list[Row]] = {}
    for row in rows:
        cells.setdefault(row["key"], []).append(row)
    metrics: dict[str, None] = {}
    wide = []
    for group in cells.values():
        values = {f"{row['eval']}_status": row["status"] for row in group}
        values |= _metric_columns(group)
        metrics |= dict.fromkeys(values)
        wide.append({**_wide_fixed(group), **values})
    fixed = [*cell_columns()[:1], "sweep", "status", *cell_columns()[1:]]
    return _frame(wide, [*fixed, *metrics, *_WIDE_SUMS, *_WIDE_MAX, *_WIDE_LAST])


def _wide_fixed(group: Sequence[Row]) -> Row:
    # A measured row knows more of the cell (its counted bits) than a planned one.
    best = max(group, key=lambda r: r["total_bits"] is not None)
    statuses = {row["status"] for row in group}
    finished = [row for row in group if row["finished"] is not None]
    last: Row = max(finished, key=lambda r: r["finished"]) if finished else best
    failed = next((row for row in group if row["status"] == State.FAILED), None)
    row = {name: best[name] for name in cell_columns()}
    row["sweep"] = best["sweep"]
    row["status"] = next(s.value for s in State if s in statuses)
    row |= {name: last[name] for name in _WIDE_LAST}
    row["error_type"] = failed["error_type"] if failed else None
    row |= {name: math.fsum(r[name] or 0.0 for r in finished) if finished else None for name in _WIDE_SUMS}
    row |= {name: max((r[name] for r in finished if r[name] is not None), default=None) for name in _WIDE_MAX}
    return row


def _metric_columns(group: Sequence[Row]) -> dict[str, float]:
    values: dict[str, float] = {}
    for row in group:
        for metric, value in row["metrics"].items():
            values[f"{row['eval']}_{metric}"] = value
            if metric in row["stderr"]:
                values[f"{row['eval']}_{metric}_stderr"] = row["stderr"][metric]
        for metric, higher in (row["higher_is_better"] or {}).items():
            values[f"{row['eval']}_{metric}_higher_is_better"] = higher
    accuracies = [values.get(f"{task}_acc") for task in ZERO_SHOT]
    if all(a is not None for a in accuracies):
        errors = [values.get(f"{task}_acc_stderr", math.nan) for task in ZERO_SHOT]
        values["zero_shot_mean"] = math.fsum(a for a in accuracies if a is not None) / len(ZERO_SHOT)
        values["zero_shot_mean_stderr"] = math.hypot(*errors) / len(ZERO_SHOT)
    return values


def _frame(rows: Sequence[Row], names: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame.from_records(list(rows), columns=list(names))
    nullable = {"int64": "Int64", "bool": "boolean", "float64": "float64", "string": "str"}
    types = {c.name: nullable[c.type] for c in columns() if c.name in frame.columns and c.type in nullable}
    return frame.astype(types)
