"""A worker runs packs: load a model once; for each cell quantize, measure; record every measurement at once.

``python -m sweeps.worker`` is the process around it (``sweeps.worker.__main__``). Only functions that compute import
torch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from kbit.evaluation.evaluators import EVALUATORS
from kbit.evaluation.spec import EvalResult, EvalSpec
from kbit.models.ways import Way
from sweeps.errors import EXIT_IO, EXIT_LOAD, DataChangedError, NotYetError, StoreError
from sweeps.events import Event, Loaded, Measured, Measuring, PackDone, SmallerBatch, Started, Stopped, Withheld
from sweeps.plan.cost import load_seconds
from sweeps.plan.packs import Pack
from sweeps.store.parts import LOOSE, Store
from sweeps.store.rows import (
    Origin,
    error_text,
    error_type,
    failed_row,
    handle_columns,
    result_columns,
    run_row,
    told_part,
)
from sweeps.store.schema import Row, Scalar
from sweeps.study.cell import Cell, Measurement, ModelRef
from sweeps.study.devices import check_device
from sweeps.worker.devices import device_name, peak_memory, reset_peak_memory
from sweeps.worker.first import KnownFirst
from sweeps.worker.model_cache import Warm, check_unchanged, is_lost, recover
from sweeps.worker.sharing import Brought, bringers_first
from sweeps.worker.time_budget import Pace
from sweeps.worker.ways import by_way, way_of

if TYPE_CHECKING:
    from kbit.models.loading import LoadedModel
    from kbit.models.quantize import QuantHandle
    from sweeps.worker.layered import LayeredRun

SEED: Final = 0
MIN_BATCH_TOKENS: Final = 256
"""A batch is not halved below this when memory runs out: one sequence takes about as much."""

Emit = Callable[[Event], None]
T = TypeVar("T")


@dataclass(kw_only=True)
class Stop:
    """A request to stop after the measurement in flight."""

    _asked: bool = False

    def ask(self, *_: object) -> None:
        """Take note that a stop is asked for, and no more: it is a signal handler."""
        self._asked = True

    def asked(self) -> bool:
        return self._asked


@dataclass(kw_only=True)
class Worker:
    """Runs packs on one device, keeping the model and the prepared evaluations between them.

    Attributes:
        store: where measurements go.
        device: 'cpu' or 'cuda'.
        batch_tokens: tokens in a batch, where memory allows.
        provenance: columns that every row gets (commit, versions, launch, job, ...).
        emit: told what happens.
        gpus: over how many GPUs a model is spread; 0 on a CPU, whatever is given.
        trust_remote_code: run code that a checkpoint brings; only when the user asked for it by name.
        load_again: a model that can't be loaded, where nothing was measured before, ends the process with ``EXIT_LOAD``
            and leaves no record: it may be the node's fault, and another node may do better.
        stop: looked at before each measurement.
    """

    store: Store
    device: str
    batch_tokens: int
    provenance: Mapping[str, Scalar]
    emit: Emit
    gpus: int = 1
    trust_remote_code: bool = False
    load_again: bool = False
    stop: Stop = field(default_factory=Stop)
    _warm: Warm = field(init=False)
    _has_measured: bool = False
    _predicted: float | None = None
    _smaller_batches: dict[tuple[ModelRef, str], int] = field(default_factory=dict)
    _brought: Brought = field(default_factory=Brought)
    _first: KnownFirst = field(init=False)

    def __post_init__(self) -> None:
        if self.device == "cpu":
            self.gpus = 0
        self._first = KnownFirst(store=self.store)
        self._warm = Warm(device=self.device, gpus=max(1, self.gpus), trust_remote_code=self.trust_remote_code)

    def run_pack(self, pack: Pack, *, until: float | None = None) -> None:
        """Measure everything in a pack; a failure is recorded and the rest goes on.

        It ends early, after a whole measurement, when it is asked to stop ('asked'), or before a cell that would not
        end by ``until``, in epoch seconds ('walltime'). What was not measured is the caller's to give to another.
        """
        in_memory, layered = by_way(pack, device=self.device, gpus=self.gpus, batch_tokens=self._batch)
        why = None if in_memory is None else self._run_items(in_memory, until)
        if why is None and layered is not None:
            why = self._layered(layered).run(until)
        self._storing(lambda: self.store.fold(LOOSE))
        self.emit(PackDone(pack=pack.id) if why is None else Stopped(pack=pack.id, reason=why))

    def _run_items(self, pack: Pack, until: float | None) -> str | None:
        """Measure a pack's items; return why it ended before the last one, or None."""
        pace = Pace(until=until, predicted=pack.item_seconds)
        for number, (cell, evals) in enumerate(pack.items):
            # One compute dtype per model load: cells whose evaluations ask for another load the model again. And one
            # form of the quantized layers: packed ones are put in place apart.
            forms = list(dict.fromkeys(_form(e) for e in evals))
            to_load = load_seconds(cell.model) if self._warm.holds != (cell.model, forms[0][0]) else 0.0
            now = time.time()
            # The first is begun when there is any time: else a cell that is predicted to take too long would never be.
            if (number or pace.over(now)) and not pace.fits(number, now=now, load_seconds=to_load):
                return "walltime"
            began, loading = time.monotonic(), self._warm.total_seconds
            self._predicted = pack.item_seconds[number] / len(evals) if pack.item_seconds else None
            for form in forms:
                if not self._run_cell(pack, cell, [e for e in evals if _form(e) == form], form):
                    return "asked"
            # Predictions are without loading.
            pace.took(number, time.monotonic() - began - (self._warm.total_seconds - loading))
        return None

    def _layered(self, pack: Pack) -> LayeredRun:
        """Return what runs a pack layer by layer."""
        from sweeps.worker.layered import LayeredRun

        return LayeredRun(
            pack=pack,
            device=self.device,
            gpus=self.gpus,
            out=self.store.out,
            warm=self._warm,
            stop=self.stop.asked,
            emit=self.emit,
            batch=lambda: self._batch,
            halve_batch=partial(self._halve_batch, pack),
            origin=partial(self._origin, pack),
            record=self._record_result,
            fail=partial(self._record_failure, pack),
            withhold=partial(self._withhold, pack),
            blame_node=partial(self._blame_node, pack.model),
        )

    @property
    def _batch(self) -> int:
        """Return the tokens in a batch of the loaded model."""
        held = self._warm.holds
        return self.batch_tokens if held is None else self._smaller_batches.get(held, self.batch_tokens)

    def _run_cell(self, pack: Pack, cell: Cell, evals: list[EvalSpec], form: tuple[str, bool]) -> bool:
        """Measure a cell; tell whether all of it was measured. If not, the worker was asked to stop."""
        if self.stop.asked():
            return False
        measurements = [Measurement(cell=cell, eval=spec) for spec in bringers_first(evals)]
        self._brought = Brought(due=evals)
        # Where loading or quantizing kills the process, its first measurement is the suspect.
        first = measurements[0].key
        self.emit(Started(pack=pack.id, cell=cell.key, label=cell.label, measurement=first))
        started = datetime.now(UTC)
        try:
            dtype, packed = form
            slopes = self._first.slopes(cell)
            loaded = self._load(cell, dtype)
            measurements = self._refer(pack, measurements, loaded)
            if not measurements:
                return True
            began = time.perf_counter()
            handle = self._quantize(loaded, cell, packed=packed, slopes=slopes)
        except (DataChangedError, NotYetError) as error:
            self._withhold(pack, measurements, error)
            return True
        except Exception as error:
            self._record_failure(pack, measurements, error, started)
            return True
        quantize_seconds = 0.0 if cell.quant.is_baseline else time.perf_counter() - began
        # The model stays as it is: the next cell begins from its kept originals.
        for measurement in measurements:
            if self.stop.asked():
                return False
            self._measure(pack, measurement, loaded, handle, quantize_seconds)
        return True

    def _refer(self, pack: Pack, measurements: list[Measurement], loaded: LoadedModel) -> list[Measurement]:
        """Take what the cell is compared with from the model in its 16-bit form, once for all its cells.

        Return the measurements that are left: where that fails, those that need it have failed.
        """
        left = []
        for measurement in measurements:
            spec, started = measurement.eval, datetime.now(UTC)
            try:
                if self._warm.lacks_reference(spec, loaded, batch_tokens=self._batch):
                    self.emit(Measuring(pack=pack.id, measurement=measurement.key))
                    self._within_memory(pack, partial(self._make_reference, spec, loaded))
                left.append(measurement)
            except DataChangedError as error:
                self._withhold(pack, [measurement], error)
            except Exception as error:
                self._record_failure(pack, [measurement], error, started)
        return left

    def _make_reference(self, spec: EvalSpec, loaded: LoadedModel) -> None:
        self._warm.refer(spec, loaded, batch_tokens=self._batch)

    def _measure(
        self, pack: Pack, measurement: Measurement, loaded: LoadedModel, handle: QuantHandle, quantize_seconds: float
    ) -> None:
        started = datetime.now(UTC)
        self.emit(Measuring(pack=pack.id, measurement=measurement.key))
        try:
            check_device(measurement.eval, self.device)
            result, seconds = self._brought.take(measurement.eval) or self._evaluate(pack, measurement, loaded)
        except DataChangedError as error:
            self._withhold(pack, [measurement], error)
            return
        except Exception as error:
            self._record_failure(pack, [measurement], error, started)
            return
        row = {
            **run_row(measurement, self._origin(pack), started),
            **result_columns(result),
            **handle_columns(handle),
            "held": self._held(measurement.eval).value,
            "compute_dtype": str(loaded.model.dtype).removeprefix("torch."),
            "seconds": seconds,
            "quantize_seconds": quantize_seconds,
            "load_seconds": self._warm.load_seconds,
            "predicted_seconds": self._predicted,
            "peak_memory_bytes": peak_memory(self.gpus) - self._warm.kept_gpu_bytes,
        }
        self._record_result(row)

    def _record_result(self, row: Row) -> None:
        self._record(row)
        self._has_measured = True

    def _evaluate(self, pack: Pack, measurement: Measurement, loaded: LoadedModel) -> tuple[EvalResult, float]:
        """Evaluate; return the result and the seconds it took, or its share of them where others came with it."""
        import torch

        spec = measurement.eval

        def run() -> tuple[EvalResult, float]:
            if measurement.cell.quant.is_baseline:
                # Again where the batch was halved since: in equal batches the baseline differs from itself in no bit.
                self._make_reference(spec, loaded)
            prepared = self._warm.prepare(spec, loaded)
            reset_peak_memory(self.gpus)
            torch.manual_seed(SEED)
            began = time.perf_counter()
            result = prepared.run(loaded.model, batch_tokens=self._batch)
            return result, time.perf_counter() - began

        halve = not EVALUATORS[spec.kind].own_batches
        result, seconds = self._within_memory(pack, run, halve=halve)
        return result, self._brought.keep(spec, result, seconds)

    def _within_memory(self, pack: Pack, run: Callable[[], T], *, halve: bool = True) -> T:
        """Return what ``run`` does.

        Where memory runs out, try again: first with the model's originals off the GPU, then with half the batch, where
        ``halve`` says that it counts. Either stays so for the model.
        """
        from kbit.memory import is_out_of_memory

        while True:
            try:
                return run()
            except Exception as error:
                held = self._warm.holds
                if held is None or not is_out_of_memory(error):
                    raise
                if self._has_made_room(error):
                    continue
                if not halve or self._batch <= MIN_BATCH_TOKENS:
                    raise
                recover(error, self.device)
            self._halve_batch(pack)

    def _halve_batch(self, pack: Pack) -> bool:
        """Have batches of half as many tokens for the model that is held; tell whether that was possible."""
        held = self._warm.holds
        if held is None or self._batch <= MIN_BATCH_TOKENS:
            return False
        self._smaller_batches[held] = max(MIN_BATCH_TOKENS, self._batch // 2)
        self.emit(SmallerBatch(pack=pack.id, batch_tokens=self._batch))
        return True

    def _load(self, cell: Cell, dtype: str) -> LoadedModel:
        """Return a cell's model, without its weights where it will be quantized as they are read."""
        model = cell.model
        is_new = self._warm.holds != (model, dtype)
        way = way_of(cell, dtype, device=self.device, gpus=self.gpus, batch_tokens=self.batch_tokens)
        try:
            packing = self._warm.load_packed(model, dtype) if way is Way.PACKED else None
            loaded = packing.streamed.loaded if packing is not None else self._warm.load(model, dtype)
        except Exception as error:
            self._blame_node(model, error)
            raise
        if is_new:
            self.emit(Loaded(model=model.label, seconds=self._warm.load_seconds))
        return loaded

    def _blame_node(self, model: ModelRef, error: Exception) -> None:
        """End the process where a failure to load may be the node's: out-of-memory and later failures are not."""
        from kbit.memory import is_out_of_memory

        if not self.load_again or self._has_measured or is_out_of_memory(error) or _is_the_models(error, model):
            return
        what = " ".join(str(error).split())
        print(
            f"{model.label} can't be loaded on this node: {type(error).__name__}: {what}", file=sys.stderr, flush=True
        )
        sys.exit(EXIT_LOAD)

    def _origin(self, pack: Pack) -> Origin:
        here: dict[str, Scalar] = {
            "device": device_name(self.device),
            "gpus": self.gpus,
            "kernel": self._kernel(),
            "seed": SEED,
            "batch_tokens": self._batch,
        }
        return Origin(sweep=pack.sweep, pack=pack.id, rung=pack.rung, provenance={**self.provenance, **here})

    def _held(self, spec: EvalSpec) -> Way:
        """Return how the model is held while it is measured."""
        if EVALUATORS[spec.kind].packed or self._warm.packing is not None:
            return Way.PACKED
        return Way.SPREAD if self.gpus > 1 else Way.WHOLE

    def _kernel(self) -> str:
        """Return the name of the implementation that quantizes here."""
        import torch

        from kbit.kernels.availability import choose_blockwise

        return choose_blockwise("auto", torch.device(self.device))

    def _record_failure(
        self, pack: Pack, measurements: Sequence[Measurement], error: Exception, started: datetime
    ) -> None:
        # Memory first: writing needs some.
        recover(error, self.device)
        kind, text = error_type(error), error_text(error)
        names = ", ".join(m.eval.name for m in measurements)
        print(f"{measurements[0].cell.label} on {names} failed:\n{text}", file=sys.stderr, flush=True)
        origin = self._origin(pack)
        for measurement in measurements:
            self._record(failed_row(measurement, origin, error_type=kind, error=text, started=started))
        if is_lost(error):
            # A new worker goes on with the rest.
            sys.exit(f"the device is lost to this process: {error}")

    def _withhold(self, pack: Pack, measurements: Sequence[Measurement], error: DataChangedError | NotYetError) -> None:
        """Leave no record of what was not measured: with what it lacks there, the same command measures it."""
        print(f"{measurements[0].cell.label}: not measured: {error}", file=sys.stderr, flush=True)
        for measurement in measurements:
            self.emit(Withheld(pack=pack.id, measurement=measurement.key, why=str(error)))

    def _record(self, row: Row) -> None:
        self._storing(lambda: self.store.write(row))
        self.emit(Measured(row=told_part(row)))

    def _quantize(
        self, loaded: LoadedModel, cell: Cell, *, packed: bool, slopes: Sequence[float] | None
    ) -> QuantHandle:
        import torch

        from kbit.memory import is_out_of_memory
        from kbit.models.quantize import Calibrated, quantize_model

        if self._warm.packing is not None:
            return self._warm.packing.quantize(cell.quant)
        calibrated = None
        if cell.calibration is not None:
            dtype = cell.calibration.compute_dtype
            calibrated = Calibrated(
                tokens=self._warm.calibration(cell.calibration, loaded),
                dtype=loaded.storage_dtype if dtype == "storage" else getattr(torch, dtype),
                slopes=slopes,
            )
        while True:
            try:
                return quantize_model(
                    loaded.model,
                    cell.quant,
                    storage_dtype=loaded.storage_dtype,
                    packed=packed,
                    calibration=calibrated,
                    originals=self._warm.originals(loaded),
                )
            except Exception as error:
                if not is_out_of_memory(error) or not self._has_made_room(error):
                    raise

    def _has_made_room(self, error: Exception) -> bool:
        """Where GPU memory ran out, move the model's originals off it; tell whether there were any."""
        if self.device != "cuda":
            return False
        recover(error, self.device)
        return self._warm.make_room()

    def _storing(self, write: Callable[[], None]) -> None:
        """Do what writes to the store; that it can't be written is no cell's failure, and ends the process."""
        try:
            try:
                write()
            except MemoryError as error:
                # A measurement at the limit of memory: what it left behind is given back, and the result is kept.
                recover(error, self.device)
                write()
        except (OSError, StoreError, MemoryError) as error:
            print(f"results can't be written to {self.store.out} any more: {error}", file=sys.stderr, flush=True)
            sys.exit(EXIT_IO)


def _form(spec: EvalSpec) -> tuple[str, bool]:
    """Return what an evaluation needs of the model: its compute dtype, and whether its layers are packed."""
    return spec.compute_dtype, EVALUATORS[spec.kind].packed


def _is_the_models(error: Exception, model: ModelRef) -> bool:
    """Tell whether a failure to load is the model's own: its files are as they were at launch, and no GPU is named."""
    if model.path is None or "cuda" in str(error).lower():
        return False
    try:
        check_unchanged(model)
    except Exception:
        return False
    return True
