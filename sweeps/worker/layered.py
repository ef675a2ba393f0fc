"""Run a pack layer by layer: one pass over the model's blocks for all its cells, then their results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from kbit.errors import LayeredError
from kbit.evaluation.evaluators import EVALUATORS
from kbit.evaluation.spec import EvalResult, EvalSpec
from kbit.models.ways import Way
from kbit.spec import QuantSpec
from kbit.specs.base import BASELINE_BITS
from sweeps.errors import DataChangedError
from sweeps.events import BlockDone, Event, Loaded, Measuring, Started
from sweeps.files import make_directory
from sweeps.plan.pack import Pack
from sweeps.store.rows import handle_columns, result_columns, run_row
from sweeps.study.cell import Cell, Measurement
from sweeps.study.devices import check_device
from sweeps.text import counted
from sweeps.worker.batches import Batches
from sweeps.worker.devices import device_name, peak_memory, reset_peak_memory, usable_memory
from sweeps.worker.model_cache import Warm, recover
from sweeps.worker.recording import SEED, Recorder
from sweeps.worker.sharing import Brought, bringers_first

if TYPE_CHECKING:
    from kbit.evaluation.prepared import ComparingEval
    from kbit.layered.blocks import Blocks
    from kbit.layered.cells import PassCell
    from kbit.layered.hollow import Hollow
    from kbit.layered.run import LayeredPass
    from kbit.models.loadable import LoadedModel
    from kbit.models.places import Room

PASSES: Final = "passes"
"""The directory under a study's results where passes that were cut have their snapshots."""
STEPS: Final = 1
"""Raised when a snapshot of earlier code is of no use."""


@dataclass(kw_only=True)
class LayeredRun:
    """Runs one pack layer by layer.

    Attributes:
        pack: the pack.
        device, gpus: as of the worker; it computes on the first GPU.
        out: the directory of results, in which passes that are cut leave what they go on from.
        warm: keeps the model and the prepared evaluations.
        stop: tells whether the worker is asked to stop.
        emit: told what happens.
        batches: has the tokens in a batch of the held model.
        records: writes down what is measured, and what failed.
        blame_node: ends the process where a failure to load may be the node's.
        snapshot_seconds: the time between two snapshots, at least; None is ``kbit.layered.run``'s.
    """

    pack: Pack
    device: str
    gpus: int
    out: Path
    warm: Warm
    stop: Callable[[], bool]
    emit: Callable[[Event], None]
    batches: Batches
    records: Recorder
    blame_node: Callable[[Exception], None]
    snapshot_seconds: float | None = None
    _left: dict[str, Measurement] = field(default_factory=dict)
    _until: float | None = None

    def run(self, until: float | None) -> str | None:
        """Measure the pack; return why it ended before all was measured ('asked', 'walltime'), or None.

        Args:
            until: epoch seconds at which it must be done; None is never.
        """
        self._until = until
        measurements = self.pack.measurements()
        for dtype in dict.fromkeys(m.eval.compute_dtype for m in measurements):
            if self.stop():
                return "asked"
            if until is not None and time.time() >= until:
                return "walltime"
            self._left = {m.key: m for m in measurements if m.eval.compute_dtype == dtype}
            if (why := self._run_dtype(dtype)) is not None:
                return why
        return None

    def _run_dtype(self, dtype: str) -> str | None:
        """Measure what is asked for in one compute dtype."""
        started, first = datetime.now(UTC), next(iter(self._left.values()))
        cells = len({m.cell.key for m in self._left.values()})
        label = f"{self.pack.model.label}, {counted(cells, 'cell')} layer by layer"
        self.emit(Started(pack=self.pack.id, cell=first.cell.key, label=label, measurement=first.key))
        try:
            loaded, blocks = self._load(dtype)
        except DataChangedError as error:
            self.records.withhold(self.pack, list(self._left.values()), error)
            return None
        except Exception as error:
            self._fail(self._left.values(), error, started)
            return None
        while self._left:
            try:
                return _Attempt(run=self, loaded=loaded, blocks=blocks, dtype=dtype, label=label).make()
            except Exception as error:
                if not _lacks_memory(error) or not self.batches.halve(self.pack):
                    self._fail(self._left.values(), error, started)
                    return None
                recover(error, self.device)
        return None

    def _load(self, dtype: str) -> tuple[LoadedModel, Blocks]:
        is_new = self.warm.holds != (self.pack.model, dtype)
        try:
            found = self.warm.load_layered(self.pack.model, dtype)
        except Exception as error:
            self.blame_node(error)
            raise
        if is_new:
            self.emit(Loaded(model=self.pack.model.label, seconds=self.warm.load_seconds))
        return found

    def _fail(self, measurements: Iterable[Measurement], error: Exception, started: datetime) -> None:
        by_cell: dict[str, list[Measurement]] = {}
        for measurement in list(measurements):
            self._left.pop(measurement.key, None)
            by_cell.setdefault(measurement.cell.key, []).append(measurement)
        for of_cell in by_cell.values():
            self.records.failure(self.pack, of_cell, error, started)


@dataclass(kw_only=True)
class _Attempt:
    """One pass, in batches of one size.

    Attributes:
        run: whose measurements it makes.
        loaded: the model without the weights of its blocks.
        blocks: where these come from.
        dtype: that it computes in, as evaluations name it.
        label: of the pass, for people.
    """

    run: LayeredRun
    loaded: LoadedModel
    blocks: Blocks
    dtype: str
    label: str
    _blocks_began: float = 0.0
    _said: bool = False

    def make(self) -> str | None:
        """Measure what is left; return why it ended before, or None."""
        from kbit.layered.hollow import Hollow

        run, started = self.run, datetime.now(UTC)
        reset_peak_memory(min(1, run.gpus))
        hollow = Hollow(self.blocks, name=run.pack.model.label)
        cells = self._cells(hollow, self._record(hollow))
        if not cells:
            return None
        one = self._pass(hollow, cells)
        self._blocks_began = time.monotonic()
        if not one.run(partial(self._between, one)):
            return "asked" if run.stop() else "walltime"
        began = time.perf_counter()
        self._refer(one, started)
        once = self.run.warm.load_seconds + one.wait_seconds + time.perf_counter() - began
        for cell in one.cells:
            mine = [m for m in run._left.values() if m.cell.key == cell.key]
            if mine and not self._measure(one, cell, mine, once, started):
                one.keep()
                return "asked"
        one.finish()
        return None

    def _record(self, hollow: Hollow) -> dict[EvalSpec, list[str]]:
        """Return the forward passes that each evaluation asks for; what can't be had so has failed."""
        run, asked = self.run, dict[EvalSpec, list[str]]()
        for spec in dict.fromkeys(m.eval for m in run._left.values()):
            of_spec, started = [m for m in run._left.values() if m.eval == spec], datetime.now(UTC)
            try:
                asked[spec] = self._asked(hollow, spec)
            except DataChangedError as error:
                for measurement in of_spec:
                    del run._left[measurement.key]
                run.records.withhold(run.pack, of_spec, error)
            except Exception as error:
                if _lacks_memory(error):
                    raise
                run._fail(of_spec, error, started)
        return asked

    def _asked(self, hollow: Hollow, spec: EvalSpec) -> list[str]:
        check_device(spec, self.run.device)
        if EVALUATORS[spec.kind].packed:
            raise LayeredError(
                f"{spec.name} measures a model that is held in k bits: {self.run.pack.model.label} doesn't fit this "
                "device so, and runs layer by layer"
            )
        if EVALUATORS[spec.kind].looks_inside:
            raise LayeredError(
                f"{spec.name} watches what enters the layers of a model in memory: {self.run.pack.model.label} doesn't "
                "fit this device so, and runs layer by layer. Give it more GPUs, or ones with more memory"
            )
        prepared, tokens = self.run.warm.prepare(spec, self.loaded), self.run.batches.tokens
        if EVALUATORS[spec.kind].compares:
            # The passes are those of ``run``, which wants a reference first.
            return hollow.record(lambda: cast("ComparingEval", prepared).refer(self.loaded.model, batch_tokens=tokens))
        try:
            return hollow.record(lambda: prepared.run(self.loaded.model, batch_tokens=tokens))
        except LayeredError as error:
            raise LayeredError(f"{spec.name} can't be measured layer by layer: {error}") from error

    def _cells(self, hollow: Hollow, asked: Mapping[EvalSpec, Sequence[str]]) -> list[PassCell]:
        """Return the cells of the pass, the baseline first; it takes part also where others are compared with it."""
        from kbit.layered.cells import PassCell

        found: dict[str, PassCell] = {}

        def add(cell: Cell, calls: Sequence[str]) -> None:
            known = found.setdefault(cell.key, PassCell(key=cell.key, spec=cell.quant, calls=[]))
            known.calls = list(dict.fromkeys([*known.calls, *calls]))

        for measurement in self.run._left.values():
            if self._lacks_reference(measurement.eval):
                add(Cell(model=self.run.pack.model, quant=QuantSpec(bits=BASELINE_BITS)), asked[measurement.eval])
            add(measurement.cell, asked[measurement.eval])
        for key, cell in {m.cell.key: m.cell for m in self.run._left.values()}.items():
            mine = [m for m in self.run._left.values() if m.cell.key == key]
            try:
                found[key].calibration = self._calibration(hollow, cell)
            except DataChangedError as error:
                del found[key]
                for measurement in mine:
                    del self.run._left[measurement.key]
                self.run.records.withhold(self.run.pack, mine, error)
            except Exception as error:
                if _lacks_memory(error):
                    raise
                del found[key]
                self.run._fail(mine, error, datetime.now(UTC))
        return sorted(found.values(), key=lambda cell: not cell.spec.is_baseline)

    def _calibration(self, hollow: Hollow, cell: Cell) -> Sequence[str]:
        """Return the forward passes over the windows that a cell calibrates on; none of other methods."""
        import torch

        if cell.calibration is None:
            return ()
        asked, own = cell.calibration.compute_dtype, self.loaded.model.dtype
        wanted = self.loaded.storage_dtype if asked == "storage" else getattr(torch, asked)
        if wanted != own:
            name, here = (str(d).removeprefix("torch.") for d in (wanted, own))
            raise LayeredError(
                f"calibration.compute_dtype={asked!r} is {name}, and a model that runs layer by layer computes in one "
                f"dtype, here {here}: give calibration.compute_dtype={here}, or eval.compute_dtype={name}"
            )
        return hollow.record_windows(self.run.warm.calibration(cell.calibration, self.loaded))

    def _lacks_reference(self, spec: EvalSpec) -> bool:
        return self.run.warm.lacks_reference(spec, self.loaded, batch_tokens=self.run.batches.tokens)

    def _pass(self, hollow: Hollow, cells: Sequence[PassCell]) -> LayeredPass:
        import torch

        from kbit.layered.run import SNAPSHOT_SECONDS, LayeredPass, digest_of
        from kbit.layered.snapshots import Snapshots

        run, model = self.run, self.run.pack.model
        of = digest_of(STEPS, sorted(model.identity.items()), self.dtype, device_name(run.device), torch.__version__)
        make_directory(run.out / PASSES)
        every = run.snapshot_seconds
        return LayeredPass(
            blocks=self.blocks,
            hollow=hollow,
            cells=cells,
            storage_dtype=self.loaded.storage_dtype,
            snapshots=Snapshots(directory=run.out / PASSES, of=of, pack=run.pack.id),
            snapshot_seconds=SNAPSHOT_SECONDS if every is None else every,
            host=_host(),
            failed=self._cell_failed,
        )

    def _cell_failed(self, cell: PassCell) -> None:
        assert cell.error is not None
        mine = [m for m in self.run._left.values() if m.cell.key == cell.key]
        self.run._fail(mine, cell.error, datetime.now(UTC))

    def _between(self, one: LayeredPass, done: int, count: int) -> bool:
        """Say how far the pass is; tell whether it has to stop: it is asked to, or another block would end too late."""
        run = self.run
        run.emit(BlockDone(pack=run.pack.id, label=self.label, done=done, count=count))
        if one.snapshot_error is not None and not self._said:
            self._said = True
            print(f"{self.label}: can't go on if it is cut: {one.snapshot_error}", file=sys.stderr, flush=True)
        if run.stop():
            return True
        each = (time.monotonic() - self._blocks_began) / (done - one.began_at)
        return run._until is not None and time.time() + each + one.keep_seconds > run._until

    def _refer(self, one: LayeredPass, started: datetime) -> None:
        """Take from the baseline what others are compared with."""
        run = self.run
        baseline = next((cell for cell in one.cells if cell.spec.is_baseline), None)
        for spec in dict.fromkeys(m.eval for m in run._left.values()):
            if not self._lacks_reference(spec):
                continue
            assert baseline is not None
            try:
                with one.hollow.playing(one.leaving(baseline)):
                    run.warm.refer(spec, self.loaded, batch_tokens=run.batches.tokens)
            except Exception as error:
                if _lacks_memory(error):
                    raise
                run._fail([m for m in run._left.values() if m.eval == spec], error, started)

    def _measure(
        self, one: LayeredPass, cell: PassCell, measurements: Sequence[Measurement], once: float, started: datetime
    ) -> bool:
        """Store a cell's results; tell whether that was all of them. If not, the worker was asked to stop."""
        run = self.run
        by_eval = {m.eval: m for m in measurements}
        brought, share = Brought(due=by_eval), one.seconds_of(cell) / len(by_eval)
        for spec in bringers_first(by_eval):
            if run.stop():
                return False
            run.emit(Measuring(pack=run.pack.id, measurement=by_eval[spec].key))
            try:
                result, seconds = brought.take(spec) or self._evaluate(one, cell, spec, brought)
            except Exception as error:
                if _lacks_memory(error):
                    raise
                run._fail([by_eval[spec]], error, started)
                continue
            origin = run.records.origin(run.pack)
            run.records.result(
                {
                    **run_row(by_eval[spec], origin, started),
                    **result_columns(result),
                    **handle_columns(cell.handle()),
                    "gpus": min(1, run.gpus),
                    "held": Way.LAYERED.value,
                    "compute_dtype": str(self.loaded.model.dtype).removeprefix("torch."),
                    "seconds": seconds + share,
                    "quantize_seconds": cell.quantize_seconds,
                    "load_seconds": once,
                    "peak_memory_bytes": peak_memory(min(1, run.gpus)),
                }
            )
            del run._left[by_eval[spec].key]
        return True

    def _evaluate(self, one: LayeredPass, cell: PassCell, spec: EvalSpec, brought: Brought) -> tuple[EvalResult, float]:
        """Return what an evaluation makes of what left the last block, and the seconds of that."""
        import torch

        prepared = self.run.warm.prepare(spec, self.loaded)
        torch.manual_seed(SEED)
        began = time.perf_counter()
        with one.hollow.playing(one.leaving(cell)):
            result = prepared.run(self.loaded.model, batch_tokens=self.run.batches.tokens)
        return result, brought.keep(spec, result, time.perf_counter() - began)


def _lacks_memory(error: Exception) -> bool:
    from kbit.memory import is_out_of_memory

    return is_out_of_memory(error)


def _host() -> Room:
    """Return the memory that this process may fill: the machine's, or what its control group leaves."""
    from kbit.models.places import Room, host_room

    machine, limit = host_room(0), usable_memory()
    used = peak_memory(0)
    return Room(needed=0, free=min(machine.free, max(0, limit - used)), total=min(machine.total, limit))
