"""What is left to do: the planned measurements minus what is stored and what others are at, packed by model.

A pack is one model with many cells, because loading a model costs far more than quantizing it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kbit.evaluation.spec import EvalSpec
from sweeps.cell import Cell, Measurement, ModelRef, eval_to_dict, model_to_dict, quant_from_canonical
from sweeps.cost import CostModel, load_seconds
from sweeps.errors import UserError, did_you_mean
from sweeps.manifest import Manifest
from sweeps.store import FINISHED

RETRY: Final = ("failed", "diverged", "lost")
PACK_SECONDS: Final = (20.0, 7200.0)
"""A pack is predicted to take at least and at most this long; a cell is never split."""
PACKS_PER_WORKER: Final = 4
"""Enough packs that workers finish together, few enough that loading stays a small part."""
ROW_BYTES: Final = 30_000
"""A part with its per-sample outcomes, as measured on the demo and on full sets, on the large side."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One model and the (cell, evaluations) to run on it, in order."""

    id: str
    sweep: str
    model: ModelRef
    items: tuple[tuple[Cell, tuple[EvalSpec, ...]], ...]
    seconds: float

    def measurements(self) -> list[Measurement]:
        return [Measurement(cell=cell, eval=e) for cell, evals in self.items for e in evals]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for a worker in another process."""
        evals = list(dict.fromkeys(e for _, specs in self.items for e in specs))
        return {
            "id": self.id,
            "sweep": self.sweep,
            "model": model_to_dict(self.model),
            "evals": [eval_to_dict(e) for e in evals],
            "items": [[cell.quant.canonical(), [evals.index(e) for e in specs]] for cell, specs in self.items],
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Pack:
        model = ModelRef(**data["model"])
        evals = [EvalSpec(**e) for e in data["evals"]]
        items = tuple(
            (Cell(model=model, quant=quant_from_canonical(q)), tuple(evals[i] for i in indices))
            for q, indices in data["items"]
        )
        return cls(id=data["id"], sweep=data["sweep"], model=model, items=items, seconds=data["seconds"])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a launch would do.

    Attributes:
        counts: measurements by state: done, diverged, failed, in flight, lost, to do.
        packs: the work, longest first.
        seconds: predicted device-seconds, loading included.
    """

    counts: Mapping[str, int]
    packs: tuple[Pack, ...]
    seconds: float

    @property
    def todo(self) -> int:
        return self.counts["to do"]

    def measurement_keys(self) -> list[str]:
        return [m.key for pack in self.packs for m in pack.measurements()]


def parse_retry(value: object) -> frozenset[str]:
    """States of finished or lost measurements to run again; 'all' never includes done.

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
                f"retry={value!r} is not valid: all, none, or a list of {', '.join(RETRY)}, e.g. 'retry=[failed,lost]'."
                + did_you_mean(str(name), (*RETRY, "all", "none"))
            )
    return frozenset(names) | {"lost"}


def make_plan(
    manifest: Manifest,
    *,
    statuses: Mapping[str, str],
    in_flight: Collection[str],
    lost: Collection[str],
    retry: frozenset[str],
    cost: CostModel,
    workers: int,
) -> Plan:
    """Decide what to run.

    Args:
        statuses: stored status by measurement key.
        in_flight: measurements held by live claims.
        lost: measurements whose launch died before it recorded them.
        retry: see ``parse_retry``.
        workers: how many will share the packs.
    """
    counts: Counter[str] = Counter({"to do": 0})
    todo: dict[Cell, list[EvalSpec]] = {}
    for measurement in manifest.measurements():
        state = statuses.get(measurement.key)
        if state is None:
            state = "in flight" if measurement.key in in_flight else "lost" if measurement.key in lost else "to do"
        elif state not in FINISHED and measurement.key in in_flight:
            state = "in flight"
        if state == "to do" or (state in retry and measurement.key not in in_flight):
            counts["to do"] += 1
            todo.setdefault(measurement.cell, []).append(measurement.eval)
        else:
            counts[state] += 1
    packs = _pack(manifest.sweep, todo, cost, workers)
    loads = sum(load_seconds(p.model) for p in packs)
    return Plan(counts=counts, packs=packs, seconds=loads + sum(p.seconds for p in packs))


def _pack(sweep: str, todo: Mapping[Cell, Sequence[EvalSpec]], cost: CostModel, workers: int) -> tuple[Pack, ...]:
    seconds = {cell: sum(cost.seconds(Measurement(cell=cell, eval=e)) for e in evals) for cell, evals in todo.items()}
    least, most = PACK_SECONDS
    target = min(most, max(least, sum(seconds.values()) / (workers * PACKS_PER_WORKER)))
    by_model: dict[ModelRef, list[Cell]] = {}
    for cell in todo:
        by_model.setdefault(cell.model, []).append(cell)
    packs: list[Pack] = []
    for model, cells in by_model.items():
        chunk: list[Cell] = []
        for cell in cells:
            if chunk and sum(seconds[c] for c in chunk) + seconds[cell] > target:
                packs.append(_one_pack(sweep, model, chunk, todo, seconds))
                chunk = []
            chunk.append(cell)
        packs.append(_one_pack(sweep, model, chunk, todo, seconds))
    return tuple(sorted(packs, key=lambda p: -p.seconds))


def _one_pack(
    sweep: str,
    model: ModelRef,
    cells: Sequence[Cell],
    todo: Mapping[Cell, Sequence[EvalSpec]],
    seconds: Mapping[Cell, float],
) -> Pack:
    items = tuple((cell, tuple(todo[cell])) for cell in cells)
    keys = sorted(Measurement(cell=cell, eval=e).key for cell, evals in items for e in evals)
    pack_id = hashlib.sha256("\n".join([sweep, *keys]).encode()).hexdigest()[:12]
    return Pack(id=pack_id, sweep=sweep, model=model, items=items, seconds=sum(seconds[c] for c in cells))
