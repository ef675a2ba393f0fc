"""A study as it goes on: what was planned is taken in once, what is stored and in flight is counted each time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from kbit.spec import axes as kbit_axes
from sweeps.launches.in_flight import InFlight
from sweeps.results.joined import state_of
from sweeps.results.state_table import NO_VALUE
from sweeps.status import State
from sweeps.store.parts import Store
from sweeps.store.schema import Row
from sweeps.study.cell import Cell, Measurement

RECENT: Final = timedelta(minutes=10)
"""The rate is that of the measurements that ended in this time."""
_COLUMNS: Final = ("measurement", "status", "error_type", "started", "finished")

Place = tuple[tuple[str, ...], str]
"""Values of the rows' axes, and of the columns' axis."""


@dataclass(kw_only=True)
class Group:
    """Cells that share values of axes: how many there are, are done, failed, and are being measured."""

    cells: int = 0
    done: int = 0
    failed: int = 0
    running: int = 0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far studies are.

    Attributes:
        groups: cells by axes.
        states: measurements by state.
        left: measurements that somebody is at, or that a launch would run.
        held: those of them that somebody is at.
        rate: measurements a second, of late; None where nothing ended of late.
        failures: failed measurements by kind of error, the most frequent first.
    """

    groups: Mapping[Place, Group]
    states: Counter[State]
    left: int
    held: int
    rate: float | None
    failures: Sequence[tuple[str, int]]

    @property
    def seconds_left(self) -> float | None:
        """Time for what is left at this rate; None where that is unknown."""
        return self.left / self.rate if self.rate else None

    @property
    def is_done(self) -> bool:
        """Whether nothing is left that a launch would run."""
        return self.left == 0


@dataclass(kw_only=True)
class Followed:
    """Planned measurements, and where each counts.

    Attributes:
        needed: what is planned now.
        more: what was planned before and may be stored, or still be measured; else it doesn't count.
        by: axes; the last makes columns.
        retry: states that a launch would run again.
    """

    needed: Iterable[Measurement]
    more: Iterable[Measurement]
    by: Sequence[str]
    retry: frozenset[State]
    _planned: dict[str, tuple[str, Place, bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = [(a, kbit_axes()[a].name_of if a in kbit_axes() else str) for a in self.by]
        places: dict[str, Place] = {}
        for measurements, is_needed in ((self.more, False), (self.needed, True)):
            for m in measurements:
                if m.cell.key not in places:
                    places[m.cell.key] = _place(m.cell, named)
                self._planned[m.key] = (m.cell.key, places[m.cell.key], is_needed)

    def progress(self, store: Store, flight: InFlight, *, now: datetime | None = None) -> Progress:
        """Count.

        Args:
            store: read after ``flight``: what ended in between is then already stored.
            flight: who is at what.
            now: None is now.
        """
        rows = {row["measurement"]: row for row in store.read(_COLUMNS).to_pylist()}
        states: Counter[State] = Counter()
        failures: Counter[str] = Counter()
        cells: dict[str, tuple[Place, set[State]]] = {}
        held = flight.held
        again = self.retry | {State.MISSING, State.RUNNING, State.QUEUED}
        for key, (cell, place, is_needed) in self._planned.items():
            row = rows.get(key)
            if row is None and not is_needed and key not in held:
                continue
            state = state_of(row, key, flight)
            states[state] += 1
            cells.setdefault(cell, (place, set()))[1].add(state)
            if row is not None and state in (State.FAILED, State.OOM):
                failures[str(row["error_type"])] += 1
        return Progress(
            groups=_grouped(cells.values()),
            states=states,
            left=sum(n for state, n in states.items() if state in again),
            held=states[State.RUNNING] + states[State.QUEUED],
            rate=_rate([row for key, row in rows.items() if key in self._planned], now or datetime.now(UTC)),
            failures=failures.most_common(),
        )


def _place(cell: Cell, named: Sequence[tuple[str, object]]) -> Place:
    chosen = cell.chosen_by()
    values = []
    for name, name_of in named:
        value = chosen[name]
        assert callable(name_of)
        values.append(NO_VALUE if value is None else str(name_of(value)))
    return tuple(values[:-1]), values[-1]


def _grouped(cells: Iterable[tuple[Place, set[State]]]) -> Mapping[Place, Group]:
    groups: dict[Place, Group] = {}
    for place, states in cells:
        group = groups.setdefault(place, Group())
        group.cells += 1
        group.done += all(state.is_final for state in states)
        group.failed += bool(states & {State.FAILED, State.OOM})
        group.running += State.RUNNING in states
    return groups


def _rate(rows: Iterable[Row], now: datetime) -> float | None:
    """Return measurements a second of those that ended of late, since the first of them began."""
    recent = [row for row in rows if now - RECENT < row["finished"] <= now + RECENT]
    if not recent:
        return None
    began: datetime = min(row["started"] for row in recent)
    return len(recent) / max(1.0, (now - began).total_seconds())
