"""Any interleaving of launches, writers, deaths, folds, drops and merges: no measurement is lost, doubled or changed.

The real planning, claims and store; only what a worker computes is made up.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sweeps import processes
from sweeps.launches import claims as claims_module
from sweeps.launches.claimer import Claimer, Seen
from sweeps.launches.claims import Claim, Claims
from sweeps.launches.in_flight import read_flight
from sweeps.plan.packs import Packing, Plan, parse_retry, what_is_left
from sweeps.store import folding, records
from sweeps.store.joining import join
from sweeps.store.parts import Store
from sweeps.study.grid import expand
from sweeps.study.manifest import Manifest
from tests.sweeps.plan.test_packs import EVALS, MODELS
from tests.sweeps.store.test_folding import AWAY, DEAD
from tests.sweeps.store.test_parts import row

GRID = expand([{"bits": [3, 4], "dtype": "int"}, {"bits": 16}], MODELS)
WHOLE, FIRST, SECOND = (
    Manifest(sweep="s", cells=cells, evals=EVALS[:1], excluded=(), config={})
    for cells in (GRID.cells, GRID.cells[:3], GRID.cells[3:])
)
KEYS = [m.key for m in WHOLE.measurements()]
STATUSES = st.sampled_from(["done", "done", "failed", "diverged"])
STEPS = st.sampled_from([0, 0, 0, 0, *range(1, 9)])
"""By how many changes of the directory a process comes; 0 is all."""


class KilledError(BaseException):
    """The process ends here."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """End what changes the directory before one of its steps; 0 is never."""
    left = step
    with pytest.MonkeyPatch.context() as patch:

        def counted(change: Any) -> Any:
            def before(*args: Any, **more: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    raise KilledError
                return change(*args, **more)

            return before

        for owner, name in ((Path, "rename"), (Path, "unlink"), (Path, "replace"), (os, "link"), (os, "utime")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        with suppress(KilledError):
            yield


@dataclass(kw_only=True)
class Launched:
    """A launch with its one worker.

    Attributes:
        left: measurements that it has not stored.
    """

    process: dict[str, str | int]
    store: Store
    claim: Claim | None = None
    left: list[str] = field(default_factory=list)


class Interleavings(RuleBasedStateMachine):
    """Whatever happens in whatever order, what is read is what a plain list of all that was stored says."""

    def __init__(self) -> None:
        super().__init__()
        self.out = Path(tempfile.mkdtemp())
        self.patch = pytest.MonkeyPatch()
        self.process: dict[str, str | int] = DEAD
        self.alive: set[int] = set()
        for module in (records, folding, claims_module):
            self.patch.setattr(module, "this_process", lambda: self.process)
        self.patch.setattr(processes, "process_start", lambda pid: "1" if pid in self.alive else "")
        self.patch.setattr(folding, "FULL_BYTES", 40_000)
        self.patch.setattr(folding, "MOST_SMALL", 3)
        self.patch.setattr(records, "ROTATE_BYTES", 2_000)
        self.launched: list[Launched] = []
        self.other = Store(out=self.out / "other")
        self.rows: list[dict[str, Any]] = []
        self.dropped: list[set[str]] = []

    def teardown(self) -> None:
        try:
            self.whatever_is_left_runs_once()
        finally:
            self.patch.undo()
            shutil.rmtree(self.out)

    @property
    def store(self) -> Store:
        return Store(out=self.out)

    def start(self, manifest: Manifest, retry: object, step: int = 0, between: Manifest | None = None) -> Plan | None:
        """Plan and claim; another launch may be faster in between, and this one may be killed."""
        process = {**DEAD, "pid": 2**30 + 1 + len(self.launched)}
        new = Launched(process=process, store=self.store)
        self.launched.append(new)
        self.alive.add(process["pid"])  # type: ignore[arg-type]
        others = [between] if between is not None else []

        def first(plan: Plan) -> Plan:
            if others:
                self.start(others.pop(), retry)
                self.process = process
            return plan

        plan = None
        self.process = process
        with killed_at(step):
            plan, new.claim = Claimer(
                store=self.store,
                manifest=manifest,
                retry=parse_retry(retry),
                packing=Packing(workers=1),
                device="cpu",
                executor="local",
                launch=f"launch{len(self.launched)}",
            ).claim(first)
            new.left = [] if new.claim is None else list(plan.measurement_keys())
        if plan is None or new.claim is None:
            self.alive.remove(process["pid"])  # type: ignore[arg-type]
        self.process = DEAD
        return plan

    def running(self) -> list[Launched]:
        return [each for each in self.launched if each.process["pid"] in self.alive]

    def is_running(self) -> bool:
        return bool(self.running())

    def put(self, store: Store, measurement: str, status: str) -> None:
        number = len(self.rows)
        made = {"row_id": f"r{number}", **row(measurement, status, minutes=number, seconds=float(number))}
        store.write(made)
        self.rows.append(made)

    @initialize()
    def two_at_work(self) -> None:
        for manifest in (FIRST, SECOND):
            self.start(manifest, "lost")
            self.store_next(self.launched[-1], "done")

    @rule(
        manifest=st.sampled_from([FIRST, SECOND, FIRST, SECOND, WHOLE]),
        retry=st.sampled_from(["lost", "all", ["failed"]]),
        step=STEPS,
        between=st.sampled_from([None, None, FIRST, WHOLE]),
    )
    def launch(self, manifest: Manifest, retry: object, step: int, between: Manifest | None) -> None:
        self.start(manifest, retry, step, between)

    @precondition(is_running)
    @rule(data=st.data(), status=STATUSES, most=st.integers(1, 4))
    def measure(self, data: st.DataObject, status: str, most: int) -> None:
        launch = data.draw(st.sampled_from(self.running()))
        for _ in range(min(most, len(launch.left))):
            self.store_next(launch, status)

    def store_next(self, launch: Launched, status: str) -> None:
        self.process = launch.process
        assert launch.claim is not None
        Claims(out=self.out).heartbeat(launch.claim, launch.left[:1])
        self.put(launch.store, launch.left.pop(0), status)

    @precondition(is_running)
    @rule(data=st.data(), how=st.sampled_from(["ends", "killed", "killed in a record"]), step=STEPS)
    def be_over(self, data: st.DataObject, how: str, step: int) -> None:
        """What ends gives its claim back; somebody folds then."""
        launch = data.draw(st.sampled_from(self.running()))
        for writer in launch.store._writer if how == "killed in a record" else ():
            if writer._file is not None:
                os.write(writer._file, records._framed(b"never acknowledged")[:-3])
        if how == "ends":
            launch.store.close()
            assert launch.claim is not None
            Claims(out=self.out).release(launch.claim)
        self.alive.remove(launch.process["pid"])  # type: ignore[arg-type]
        self.fold(step=step, grace=60.0, seem_dead=False)

    @rule(step=STEPS, grace=st.sampled_from([60.0, -1.0]), seem_dead=st.booleans())
    def fold(self, step: int, grace: float, seem_dead: bool) -> None:
        """Files of workers that are silent for long are taken from them though they live."""
        self.process = DEAD
        self.patch.setattr(folding, "GRACE_SECONDS", grace)
        alive = self.alive
        self.alive = set() if seem_dead else alive
        with killed_at(step):
            self.store.fold()
        self.alive = alive

    @precondition(lambda self: self.rows)
    @rule(key=st.sampled_from(KEYS))
    def drop(self, key: str) -> None:
        ids = set(self.store.row_ids({key}))
        assert ids == {r["row_id"] for r in self.rows if r["measurement"] == key and r.get("here", True)}
        if ids:
            self.store.drop(ids, "wrong")
            self.dropped.append(ids)

    @precondition(lambda self: self.dropped)
    @rule()
    def undo(self) -> None:
        assert self.store.undo_drop() == (len(self.dropped.pop()), "wrong")

    @rule(key=st.sampled_from(KEYS), status=STATUSES)
    def measure_elsewhere(self, key: str, status: str) -> None:
        """On another machine, in another directory."""
        self.process = {**AWAY}
        self.put(self.other, key, status)
        self.rows[-1]["here"] = False

    @rule(step=st.sampled_from([0, 0, 1, 2]))
    def merge(self, step: int) -> None:
        self.process = DEAD
        with killed_at(step):
            busy = read_flight(self.out).held
            join(self.store, self.other, name="other", busy=busy, prefer=None, say=lambda _: None)
        here = {i for table in self.store.scan(["row_id"]) for i in table.column("row_id").to_pylist()}
        for made in self.rows:
            made["here"] = made.get("here", True) or made["row_id"] in here

    def here(self) -> list[dict[str, Any]]:
        return [made for made in self.rows if made.get("here", True)]

    @invariant()
    def reads_what_was_written(self) -> None:
        store = self.store
        history = store.history(["measurement", "status", "seconds"])
        told = {r["row_id"]: (r["measurement"], r["status"], r["seconds"]) for r in history}
        assert len(told) == len(history)
        assert told == {r["row_id"]: (r["measurement"], r["status"], r["seconds"]) for r in self.here()}
        read = {r["measurement"]: r["row_id"] for r in store.read(["measurement", "row_id"]).to_pylist()}
        assert read == {name: made["row_id"] for name, made in self.current().items()}
        assert not store.damaged

    def current(self) -> dict[str, dict[str, Any]]:
        """The row that counts of each measurement: of those that stand, results before failures, then the newest."""
        gone = set().union(*self.dropped) if self.dropped else set()
        standing = [made for made in self.here() if made["row_id"] not in gone]
        ranked = sorted(standing, key=lambda made: (made["status"] != "failed", made["seconds"]))
        return {made["measurement"]: made for made in ranked}

    @invariant()
    def nobody_does_what_another_does(self) -> None:
        claimed = [m for each in self.running() if each.claim for m in each.claim.measurements]
        assert len(claimed) == len(set(claimed))

    @invariant()
    def each_is_done_held_or_to_do(self) -> None:
        known = Seen.of(self.store).known
        counts, _ = what_is_left(WHOLE, known, retry=parse_retry("all"))
        assert sum(counts.values()) == len(KEYS)

    def whatever_is_left_runs_once(self) -> None:
        """One more launch, when all are over, measures what has no result, and no more."""
        for each in self.running():
            self.alive.remove(each.process["pid"])  # type: ignore[arg-type]
        done = {name for name, made in self.current().items() if made["status"] == "done"}
        self.start(WHOLE, "all")
        last = self.launched[-1]
        assert sorted(last.left) == sorted(set(KEYS) - done)
        for key in last.left:
            self.put(last.store, key, "done")
        self.reads_what_was_written()
        assert len(self.store.read(["measurement"])) == len(KEYS)


Interleavings.TestCase.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
TestInterleavings = Interleavings.TestCase


@pytest.mark.slow
class TestManyInterleavings(Interleavings.TestCase):  # type: ignore[misc]
    settings = settings(Interleavings.TestCase.settings, max_examples=100, stateful_step_count=50)
