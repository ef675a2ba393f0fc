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
from typing import TYPE_CHECKING

from kbit.evaluation.evaluators import EVALUATORS
from kbit.evaluation.spec import EvalResult, EvalSpec
from kbit.models.ways import Way
from sweeps.errors import EXIT_LOAD, DataChangedError, NotYetError
from sweeps.events import Event, Loaded, Measuring, PackDone, Started, Stopped
from sweeps.plan.cost import load_seconds
from sweeps.plan.pack import Pack
from sweeps.store.parts import LOOSE, Store
from sweeps.store.rows import handle_columns, result_columns, run_row
from sweeps.store.schema import Scalar
from sweeps.study.cell import Cell, Measurement, ModelRef
from sweeps.study.devices import check_device
from sweeps.worker.batches import Batches
from sweeps.worker.devices import peak_memory, reset_peak_memory
from sweeps.worker.first import KnownFirst
from sweeps.worker.model_cache import Warm, check_unchanged
from sweeps.worker.recording import SEED, Recorder
from sweeps.worker.sharing import Brought, bringers_first
from sweeps.worker.time_budget import Pace
from sweeps.worker.ways import by_way, way_of

if TYPE_CHECKING:
    from kbit.models.loadable import LoadedModel
    from kbit.models.quantize import QuantHandle
    from sweeps.worker.layered import LayeredRun

Emit = Callable[[Event], None]


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
    _batches: Batches = field(init=False)
    _records: Recorder = field(init=False)
    _predicted: float | None = None
    _brought: Brought = field(default_factory=Brought)
    _first: KnownFirst = field(init=False)

    def __post_init__(self) -> None:
        if self.device == "cpu":
            self.gpus = 0
        self._first = KnownFirst(store=self.store)
        self._warm = Warm(device=self.device, gpus=max(1, self.gpus), trust_remote_code=self.trust_remote_code)
        self._batches = Batches(most=self.batch_tokens, warm=self._warm, emit=self.emit)
        self._records = Recorder(
            store=self.store,
            device=self.device,
            gpus=self.gpus,
            provenance=self.provenance,
            emit=self.emit,
            batches=self._batches,
        )

    def run_pack(self, pack: Pack, *, until: float | None = None) -> None:
        """Measure everything in a pack; a failure is recorded and the rest goes on.

        It ends early, after a whole measurement, when it is asked to stop ('asked'), or before a cell that would not
        end by ``until``, in epoch seconds ('walltime'). What was not measured is the caller's to give to another.
        """
        in_memory, layered = by_way(pack, device=self.device, gpus=self.gpus, batch_tokens=self.batch_tokens)
        why = None if in_memory is None else self._run_items(in_memory, until)
        if why is None and layered is not None:
            why = self._layered(layered).run(until)
        self._records.storing(lambda: self.store.fold(LOOSE))
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
            batches=self._batches,
            records=self._records,
            blame_node=partial(self._blame_node, pack.model),
        )

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
            self._records.withhold(pack, measurements, error)
            return True
        except Exception as error:
            self._records.failure(pack, measurements, error, started)
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
                if self._warm.lacks_reference(spec, loaded, batch_tokens=self._batches.tokens):
                    self.emit(Measuring(pack=pack.id, measurement=measurement.key))
                    self._batches.within_memory(pack, partial(self._make_reference, spec, loaded))
                left.append(measurement)
            except DataChangedError as error:
                self._records.withhold(pack, [measurement], error)
            except Exception as error:
                self._records.failure(pack, [measurement], error, started)
        return left

    def _make_reference(self, spec: EvalSpec, loaded: LoadedModel) -> None:
        self._warm.refer(spec, loaded, batch_tokens=self._batches.tokens)

    def _measure(
        self, pack: Pack, measurement: Measurement, loaded: LoadedModel, handle: QuantHandle, quantize_seconds: float
    ) -> None:
        started = datetime.now(UTC)
        self.emit(Measuring(pack=pack.id, measurement=measurement.key))
        try:
            check_device(measurement.eval, self.device)
            result, seconds = self._brought.take(measurement.eval) or self._evaluate(pack, measurement, loaded)
        except DataChangedError as error:
            self._records.withhold(pack, [measurement], error)
            return
        except Exception as error:
            self._records.failure(pack, [measurement], error, started)
            return
        row = {
            **run_row(measurement, self._records.origin(pack), started),
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
        self._records.result(row)

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
            result = prepared.run(loaded.model, batch_tokens=self._batches.tokens)
            return result, time.perf_counter() - began

        halve = not EVALUATORS[spec.kind].own_batches
        result, seconds = self._batches.within_memory(pack, run, halve=halve)
        return result, self._brought.keep(spec, result, seconds)

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

        if not self.load_again or self._records.has_results or is_out_of_memory(error) or _is_the_models(error, model):
            return
        what = " ".join(str(error).split())
        print(
            f"{model.label} can't be loaded on this node: {type(error).__name__}: {what}", file=sys.stderr, flush=True
        )
        sys.exit(EXIT_LOAD)

    def _held(self, spec: EvalSpec) -> Way:
        """Return how the model is held while it is measured."""
        if EVALUATORS[spec.kind].packed or self._warm.packing is not None:
            return Way.PACKED
        return Way.SPREAD if self.gpus > 1 else Way.WHOLE

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
                if not is_out_of_memory(error) or not self._batches.has_made_room(error):
                    raise


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
