"""Start a launch, wherever it runs: check the request, freeze the study, plan what is left, claim it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self

from sweeps.errors import ClaimTakenError
from sweeps.launches.claims import Claim, Claims
from sweeps.launches.in_flight import InFlight, read_flight
from sweeps.plan import cost
from sweeps.plan.cost import CostModel
from sweeps.plan.packs import TO_DO, Known, Packing, Plan, make_plan
from sweeps.provenance import code_provenance
from sweeps.status import State
from sweeps.store.parts import Store
from sweeps.store.rows import recorded_states
from sweeps.store.schema import Row, Scalar
from sweeps.study.manifest import Manifest

if TYPE_CHECKING:
    import pyarrow as pa

_STATE = ("measurement", "status", "error_type", "oom_rung")


def new_launch() -> str:
    return uuid.uuid4().hex[:12]


def launch_provenance(launch: str, manifest: str) -> dict[str, Scalar]:
    """Return the columns that every row of a launch has."""
    return {**code_provenance(), "launch": f"{launch} ({manifest})"}


def rows_to_learn_from(store: Store) -> list[Row]:
    """Return of each stored measurement what predictions are made from."""
    rows: list[Row] = store.read(cost.COLUMNS).to_pylist()
    return rows


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a plan is made from: the claims on a results directory, and then its rows.

    In that order: a launch that ends in between has then already stored what it did.

    Attributes:
        known: the state of each measurement that is stored, held or ended without a record.
        learn: asked, where something is left, for what predictions are made from.
    """

    known: Known
    learn: Callable[[], Sequence[Row]]

    @classmethod
    def of(cls, store: Store) -> Self:
        """Look at a results directory."""
        return cls.after(read_flight(store.out), store)

    @classmethod
    def after(cls, flight: InFlight, store: Store) -> Self:
        """Look at the rows of a results directory whose claims were looked at before."""
        return cls(known=_known(flight, store.read(_STATE)), learn=partial(rows_to_learn_from, store))


def _known(flight: InFlight, stored: pa.Table) -> Known:
    keys = stored.column("measurement").to_pylist()
    states = dict(zip(keys, recorded_states(stored), strict=True))
    rungs = {
        key: (rung or 0) + 1
        for key, rung in zip(keys, stored.column("oom_rung").to_pylist(), strict=True)
        if states[key] is State.OOM
    }
    return Known(
        statuses=states,
        in_flight=flight.held,
        ended=flight.ended,
        rungs={key: max(rungs.get(key, 0), flight.rungs.get(key, 0)) for key in {*rungs, *flight.rungs}},
    )


def plan_study(manifest: Manifest, seen: Seen, *, retry: frozenset[str], packing: Packing, device: str) -> Plan:
    """Return what is left of a study, in packs."""
    return make_plan(
        manifest,
        seen.known,
        retry=retry,
        cost=lambda: CostModel.from_rows(seen.learn(), device),
        packing=packing,
    )


@dataclass(frozen=True, kw_only=True)
class Claimer:
    """Plans what is left of a study and claims it; again if another launch was faster.

    Attributes:
        prepare: told what is about to be claimed; may shorten it, and writes down what a claim must find on disk.
    """

    store: Store
    manifest: Manifest
    retry: frozenset[str]
    packing: Packing
    device: str
    executor: str
    launch: str

    def claim(self, prepare: Callable[[Plan], Plan] = lambda plan: plan) -> tuple[Plan, Claim | None]:
        """(plan, claim); no claim where nothing is left to do."""
        claims = Claims(out=self.store.out)
        while True:
            number = claims.last_number() + 1
            # What a launch on another machine stored before it ended is not measured again.
            self.store.look_anew()
            plan = plan_study(
                self.manifest, Seen.of(self.store), retry=self.retry, packing=self.packing, device=self.device
            )
            if plan.todo == 0:
                return plan, None
            plan = prepare(plan)
            packs: Mapping[str, list[str]] = {p.id: [m.key for m in p.measurements()] for p in plan.packs}
            if not packs:
                return plan, None
            try:
                claim = claims.create(
                    number, launch=self.launch, sweep=self.manifest.sweep, packs=packs, executor=self.executor
                )
            except ClaimTakenError:
                continue
            return plan, claim


def counts_text(plan: Plan) -> str:
    """Return the states of what a launch leaves alone, in words."""
    known = [f"{n} {state}" for state, n in plan.counts.items() if n and state != TO_DO]
    return ("Of the rest: " if plan.todo else "") + ", ".join(known) + "." if known else ""
