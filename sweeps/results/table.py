"""Read a study: ``load_results`` joins what was planned, what is stored and what is in flight into one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sweeps.errors import StoreError, UserError
from sweeps.launches.in_flight import InFlight, read_flight
from sweeps.results.frames import long_frame, state_columns, state_frame, wide_columns, wide_frame
from sweeps.results.joined import decided, joined, planned
from sweeps.results.kept import is_kept, kept_rows, kept_samples
from sweeps.results.superseded import newest_launches
from sweeps.status import FINAL, State
from sweeps.store.parts import Store
from sweeps.store.rows import recorded_states
from sweeps.store.samples import Samples, decode_samples
from sweeps.study.cell import ModelRef
from sweeps.study.manifest import Manifest, load_manifests
from sweeps.study.reading import superseded
from sweeps.text import counted

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


def load_results(out: str | Path, long: bool = False, *, sweep: str | None = None) -> pd.DataFrame:
    """Read the results of a directory as a table.

    Args:
        out: the results directory, or a file that ``mode=keep`` wrote.
        long: one row per measurement; else one row per planned cell, with a column ``{eval}_{metric}`` and
            ``{eval}_{metric}_stderr`` for each metric, ``{eval}_{metric}_higher_is_better`` where only the task's
            definition says it, ``{eval}_status``, and ``zero_shot_mean`` where the paper's four tasks are there. Where
            launches planned an evaluation with different settings, the newest launch's count. What was measured of an
            earlier reading of a model's weights is left out (``sweeps.study.reading``).
        sweep: only the cells that this study planned.

    Raises:
        UserError: no study was ever planned there.
    """
    rows = rows_of(Path(out), sweep, None if long else wide_columns())
    return long_frame(rows) if long else wide_frame(rows)


def load_planned(out: Path, manifest: Manifest) -> pd.DataFrame:
    """Read the results of exactly what a launch planned: a row per cell, as ``load_results`` has them."""
    return wide_frame(_rows(out, [manifest], wide_columns()))


def load_tables(
    outs: Sequence[Path], *, sweep: str | None = None, manifest: Manifest | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read (wide, long) tables of one or several directories, each once.

    A measurement that several directories planned is the one that is done; of several, the first.

    Args:
        outs: results directories, or files that ``mode=keep`` wrote.
        sweep: only what this study planned, in those that hold it.
        manifest: exactly what this launch planned.

    Raises:
        UserError: no study was ever planned there, or none of that name.
    """
    import pyarrow as pa

    tables: list[pa.Table] = []
    problems: list[UserError] = []
    for out in outs:
        try:
            tables.append(rows_of(out, sweep) if manifest is None else _rows(out, [manifest]))
        except StoreError:
            raise
        except UserError as problem:
            problems.append(problem)
    if not tables:
        raise problems[0]
    rows = tables[0] if len(tables) == 1 else _each_once(pa.concat_tables(tables))
    return wide_frame(rows), long_frame(rows)


def _each_once(rows: pa.Table) -> pa.Table:
    """Return the row of each planned measurement that is done; of several, or of none, the first."""
    import pyarrow as pa

    found: dict[tuple[str, str], int] = {}
    statuses = rows.column("status").to_pylist()
    wheres = zip(rows.column("key").to_pylist(), rows.column("eval").to_pylist(), strict=True)
    for index, where in enumerate(wheres):
        known = found.get(where)
        if known is None or (statuses[index] in FINAL and statuses[known] not in FINAL):
            found[where] = index
    return rows.take(pa.array(found.values(), pa.int64()))


def load_states(
    out: Path, columns: Collection[str], *, by_study: bool, sweep: str | None = None, flight: InFlight | None = None
) -> pd.DataFrame:
    """Read the states of cells (``state_frame``), without what was measured: of a large study a fifth of the memory.

    Args:
        out: the results directory.
        columns: of cells, that the table has beside its own.
        by_study: a cell that several studies planned has a row for each, by the state of what that one planned.
        sweep: only this study.
        flight: who is at what, where that was looked at just now.

    Raises:
        UserError: no study was ever planned there.
    """
    import pandas as pd

    manifests = planned_there(out, sweep)
    flight = read_flight(out) if flight is None else flight
    stored = Store(out=out).read(state_columns(columns), encoded=True)
    names = newest_launches(manifests)
    studies = [[m for m in manifests if m.sweep == name] for name in names] if by_study else [manifests]
    frames = [state_frame(joined(of_study, lambda: stored, flight), columns) for of_study in studies]
    return frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)


def left_out(out: Path, sweep: str | None = None) -> list[str]:
    """Say, per model, which cells ``load_results`` leaves out because they are of an earlier reading, and why."""
    manifests = load_manifests(out, sweep)
    earlier = superseded(_models(manifests))
    cells = {m.cell.key: m.cell.model for _, m in planned(manifests).values()} if earlier else {}
    counts = Counter(model for model in cells.values() if model in earlier)
    return [f"{counted(n, 'cell')} of {model.label} left out: {earlier[model]}" for model, n in counts.items()]


def load_samples(out: str | Path, measurements: Iterable[str]) -> dict[str, Samples]:
    """Per-sample outcomes by measurement key and name: bool for right or wrong, float32 nats, int32 tokens."""
    if is_kept(Path(out)):
        return {key: decode_samples(samples or []) for key, samples in kept_samples(Path(out), measurements).items()}
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
    return (model for manifest in manifests for model in manifest.models)


def rows_of(out: Path, sweep: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the row of each planned measurement of a directory, or of a file that ``mode=keep`` wrote, as Arrow.

    Args:
        out: the directory, or the file.
        sweep: only what this study planned.
        columns: some of the schema; None is all but the samples.

    Raises:
        UserError: no study was ever planned there, or none of that name.
    """
    return kept_rows(out, sweep) if is_kept(out) else _rows(out, planned_there(out, sweep), columns)


def _rows(out: Path, manifests: Sequence[Manifest], columns: Sequence[str] | None = None) -> pa.Table:
    """Return the row of each planned measurement, with some columns or all but the samples."""
    # Who is at it first: what ends in between has then already been stored.
    flight = read_flight(out)
    return joined(manifests, lambda: Store(out=out).read(columns, encoded=True), flight)


@dataclass(frozen=True, kw_only=True)
class States:
    """The state of each measurement of a results directory, which is looked at once, when it is first asked for.

    Attributes:
        out: the directory.
        flight: who is at what; None looks.
    """

    out: Path
    flight: InFlight | None = None

    @cached_property
    def _seen(self) -> tuple[InFlight, dict[str, State]]:
        # Who is at it first: what ends in between has then already been stored.
        flight = read_flight(self.out) if self.flight is None else self.flight
        rows = Store(out=self.out).read(["measurement", "status", "error_type"])
        return flight, dict(zip(rows.column("measurement").to_pylist(), recorded_states(rows), strict=True))

    def of(self, key: str) -> State:
        """Return the state of a measurement."""
        flight, stored = self._seen
        return decided(stored.get(key), key, flight)


def measurement_states(out: Path, manifest: Manifest, flight: InFlight) -> dict[str, State]:
    """Return the state of each measurement that a launch of a study may run: all of them, unless some were chosen."""
    states = States(out=out, flight=flight)
    return {m.key: states.of(m.key) for m in manifest.wanted()}
