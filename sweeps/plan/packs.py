"""Plan what is left: planned measurements that are neither stored nor in flight, packed by model.

A pack is one model with many cells, because loading a model costs far more than quantizing it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

from kbit.evaluation.evaluators import EVALUATORS
from kbit.evaluation.spec import EvalSpec
from sweeps.errors import UserError, did_you_mean
from sweeps.plan.cost import CostModel
from sweeps.plan.order import CHEAPEST, is_baseline, order_items, order_packs
from sweeps.plan.pack import Item, Pack
from sweeps.status import RETRY, UNRECORDED, State
from sweeps.study.cell import (
    Cell,
    Measurement,
    ModelRef,
)
from sweeps.study.manifest import Manifest

PACK_SECONDS: Final = (20.0, 7200.0)
"""A pack is predicted to take at least and at most this long; a cell is never split."""
PACKS_PER_WORKER: Final = 4
"""Enough packs that workers finish together, few enough that loading stays a small part."""
TO_DO: Final = "to do"
IN_FLIGHT: Final = "in flight"
WAITING: Final = "waiting for what is in flight"
"""States that only a plan has: the last of cells whose table (``Cell.first``) another launch measures."""
ROW_BYTES: Final = 6_000
"""A measurement with its per-sample outcomes before it is folded, on the large side; folded it is a third of that."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Settings for cutting work into packs.

    Attributes:
        workers: how many share the packs: packs are made small enough that they finish together; None leaves that out.
        seconds: a pack is predicted to take at most this long; a cell is never split.
        cells: exactly so many cells a pack; None packs by predicted time.
        baseline_apart: a model's baseline gets a pack of its own.
        order: in which cells run (sweeps.plan.order).
    """

    workers: int | None = None
    seconds: float = PACK_SECONDS[1]
    cells: int | None = None
    baseline_apart: bool = False
    order: str = CHEAPEST


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a launch.

    Attributes:
        counts: measurements by state: done, diverged, failed, oom, timeout, ..., lost, ``IN_FLIGHT``, ``WAITING``,
            ``TO_DO``.
        packs: the work, in its order.
        seconds: predicted device-seconds, loading included.
    """

    counts: Mapping[str, int]
    packs: tuple[Pack, ...]
    seconds: float

    @property
    def todo(self) -> int:
        return self.counts[TO_DO]

    def measurement_keys(self) -> list[str]:
        return [m.key for pack in self.packs for m in pack.measurements()]


def parse_retry(value: object) -> frozenset[State]:
    """Return the states of measurements to run again: the named ones and those that ended without a record.

    'none' names no state, 'all' every state but done.

    Raises:
        UserError: a state that can't be retried.
    """
    names = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    if names == ["all"]:
        return frozenset(RETRY)
    if names == ["none"]:
        return frozenset()
    for name in names:
        if name not in RETRY:
            raise UserError(
                f"retry={value!r} is not valid: all, none, or a list of {', '.join(RETRY)}, e.g. 'retry=[failed,oom]'."
                + did_you_mean(str(name), (*RETRY, "all", "none"))
            )
    return frozenset(state for state in RETRY if state in names) | frozenset(UNRECORDED)


@dataclass(frozen=True, kw_only=True)
class Known:
    """The state of measurements by their keys, as the store and the claims have it.

    Attributes:
        statuses: stored status; a failure due to too little memory is 'oom'.
        in_flight: measurements held by live claims.
        ended: how work that a launch held ended without a record: 'lost', 'timeout', ...
        rungs: step of the out-of-memory ladder, where it isn't the first.
    """

    statuses: Mapping[str, str] = field(default_factory=dict)
    in_flight: Collection[str] = ()
    ended: Mapping[str, str] = field(default_factory=dict)
    rungs: Mapping[str, int] = field(default_factory=dict)

    def state(self, key: str) -> str:
        """Return the state of a measurement, in a plan's words."""
        state = self.statuses.get(key) or self.ended.get(key, TO_DO)
        return IN_FLIGHT if state != State.DONE and key in self.in_flight else state


def make_plan(
    manifest: Manifest, known: Known, *, retry: Collection[str], cost: Callable[[], CostModel], packing: Packing
) -> Plan:
    """Decide what to run.

    Args:
        manifest: the study.
        known: of its measurements.
        retry: see ``parse_retry``.
        cost: asked, where something is left, for what predicts a measurement's seconds.
        packing: how measurements are put together.
    """
    counts, todo = what_is_left(manifest, known, retry=retry)
    if not todo:
        return Plan(counts=counts, packs=(), seconds=0.0)
    predicting = cost()
    packs = _pack(manifest.sweep, todo, predicting, packing)
    loads = sum(predicting.load(p.model) for p in packs)
    return Plan(counts=counts, packs=packs, seconds=loads + sum(p.seconds for p in packs))


def what_is_left(
    manifest: Manifest, known: Known, *, retry: Collection[str]
) -> tuple[Counter[str], dict[int, list[Measurement]]]:
    """Return how many measurements are in which state, and those to do by their step of the out-of-memory ladder."""
    left: dict[str, Measurement] = {}
    others: dict[str, str] = {}
    for measurement in manifest.wanted():
        state = known.state(measurement.key)
        if state == TO_DO or state in retry:
            left[measurement.key] = measurement
        else:
            others[measurement.key] = state
    rungs = {key: known.rungs.get(key, 0) for key in left}
    for first, keys in _by_first(left.values()).items():
        if known.state(first.key) == IN_FLIGHT:
            for key in keys:
                del left[key]
            others.update(dict.fromkeys(keys, WAITING))
        elif first.key in left:
            # In one job, at the highest of their steps. Where it failed, and is not to run again, they fail by it.
            rungs.update(dict.fromkeys((first.key, *keys), max(rungs[key] for key in (first.key, *keys))))
    counts = Counter({TO_DO: len(left)})
    counts.update(others.values())
    todo: dict[int, list[Measurement]] = {}
    for key, measurement in left.items():
        todo.setdefault(rungs[key], []).append(measurement)
    return counts, todo


def _by_first(measurements: Iterable[Measurement]) -> dict[Measurement, list[str]]:
    """Return the keys of measurements by what their cells need first (``Cell.first``); most cells need nothing."""
    found: dict[Measurement, list[str]] = {}
    for measurement in measurements:
        if measurement.cell.first is not None:
            found.setdefault(measurement.cell.first, []).append(measurement.key)
    return found


def _pack(sweep: str, todo: Mapping[int, Sequence[Measurement]], cost: CostModel, packing: Packing) -> tuple[Pack, ...]:
    """Put measurements, by their step of the ladder, into packs."""
    groups: dict[tuple[int, ModelRef, bool], list[Item]] = {}
    seconds: dict[Item, float] = {}
    for rung, measurements in todo.items():
        for item in _items(measurements):
            cell, evals = item
            seconds[item] = cost.cell_seconds(cell, evals)
            apart = packing.baseline_apart and is_baseline(item)
            groups.setdefault((rung, cell.model, apart), []).append(item)
    target = packing.seconds
    if packing.workers is not None:
        share = sum(seconds[item] for items in groups.values() for item in items) / (packing.workers * PACKS_PER_WORKER)
        target = min(target, max(PACK_SECONDS[0], share))
    packs: list[Pack] = []
    for (rung, model, _), items in groups.items():
        units = _units(order_items(items, seconds.__getitem__, packing.order))
        chunks = _cut(units, seconds, target, packing.cells)
        packs += [_one_pack(sweep, model, tuple(c), tuple(seconds[i] for i in c), rung) for c in chunks]
    return order_packs(packs, packing.order)


def _items(measurements: Iterable[Measurement]) -> list[Item]:
    """Return measurements by cell, in their order; what methods need first by itself."""
    found: dict[tuple[Cell, str | None], list[EvalSpec]] = {}
    for m in measurements:
        found.setdefault((m.cell, m.key if EVALUATORS[m.eval.kind].of_methods else None), []).append(m.eval)
    return [(cell, tuple(evals)) for (cell, _), evals in found.items()]


def _units(items: Sequence[Item]) -> list[list[Item]]:
    """Return what must not be cut: single items, and what cells need first with those cells, at the first one's place.

    So it is measured once and by nobody else, and is there when they are quantized.
    """
    heads: dict[Measurement | None, Item] = {
        Measurement(cell=cell, eval=spec): (cell, (spec,))
        for cell, (spec, *_) in items
        if EVALUATORS[spec.kind].of_methods
    }
    units: dict[Item, list[Item]] = {}
    for item in items:
        cell, (spec, *_) = item
        head = heads.get(cell.first, heads.get(Measurement(cell=cell, eval=spec)))
        unit = units.setdefault(head or item, [head] if head else [])
        if item != head:
            unit.append(item)
    return list(units.values())


def first_items(pack: Pack, seconds: float) -> Pack | None:
    """Return a pack of the first items of another that are predicted to end in time; None where not one does."""
    ends = list(accumulate(pack.item_seconds))
    count = sum(end <= seconds for end in ends)
    if count in (0, len(ends)):
        return pack if count else None
    return _one_pack(pack.sweep, pack.model, pack.items[:count], pack.item_seconds[:count], pack.rung)


def _cut(
    units: Sequence[Sequence[Item]], seconds: Mapping[Item, float], target: float, most: int | None
) -> Iterator[list[Item]]:
    """Yield items in order, in chunks of ``most``, or of about ``target`` seconds; a unit is never cut."""
    chunk: list[Item] = []
    length = 0.0
    for unit in units:
        added = sum(seconds[i] for i in unit)
        full = len(chunk) >= most if most else length + added > target
        if chunk and full:
            yield chunk
            chunk, length = [], 0.0
        chunk += unit
        length += added
    yield chunk


def _one_pack(
    sweep: str,
    model: ModelRef,
    items: tuple[Item, ...],
    seconds: tuple[float, ...],
    rung: int,
) -> Pack:
    keys = sorted(Measurement(cell=cell, eval=e).key for cell, evals in items for e in evals)
    pack_id = hashlib.sha256("\n".join([sweep, *keys]).encode()).hexdigest()[:12]
    return Pack(
        id=pack_id, sweep=sweep, model=model, items=items, seconds=sum(seconds), item_seconds=seconds, rung=rung
    )
