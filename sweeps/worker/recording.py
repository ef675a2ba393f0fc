"""What a worker writes down of its measurements: results, failures, and nothing of what it has to leave."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sweeps.errors import EXIT_IO, DataChangedError, NotYetError, StoreError
from sweeps.events import Event, Measured, Withheld
from sweeps.plan.pack import Pack
from sweeps.store.parts import Store
from sweeps.store.rows import Origin, error_text, error_type, failed_row, told_part
from sweeps.store.schema import Row, Scalar
from sweeps.study.cell import Measurement
from sweeps.worker.batches import Batches
from sweeps.worker.devices import device_name
from sweeps.worker.model_cache import is_lost, recover

SEED: Final = 0
"""Of whatever draws at random while it measures."""


@dataclass(kw_only=True)
class Recorder:
    """Writes rows, and tells of them.

    Attributes:
        store: where rows go.
        device, gpus: that rows are measured on.
        provenance: columns that every row gets.
        emit: told what happens.
        batches: has the size of those that are run.
        has_results: whether a result was written yet.
    """

    store: Store
    device: str
    gpus: int
    provenance: Mapping[str, Scalar]
    emit: Callable[[Event], None]
    batches: Batches
    has_results: bool = False

    def origin(self, pack: Pack) -> Origin:
        """Return where a pack's rows come from, as things are now."""
        here: dict[str, Scalar] = {
            "device": device_name(self.device),
            "gpus": self.gpus,
            "kernel": self._kernel(),
            "seed": SEED,
            "batch_tokens": self.batches.tokens,
        }
        return Origin(sweep=pack.sweep, pack=pack.id, rung=pack.rung, provenance={**self.provenance, **here})

    def _kernel(self) -> str:
        """Return the name of the implementation that quantizes here."""
        import torch

        from kbit.kernels.availability import choose_blockwise

        return choose_blockwise("auto", torch.device(self.device))

    def result(self, row: Row) -> None:
        """Store a result's row."""
        self._record(row)
        self.has_results = True

    def failure(self, pack: Pack, measurements: Sequence[Measurement], error: Exception, started: datetime) -> None:
        """Store failures of a cell's measurements, which began at ``started``; exits where the device is lost by it."""
        # Memory first: writing needs some.
        recover(error, self.device)
        kind, text = error_type(error), error_text(error)
        names = ", ".join(m.eval.name for m in measurements)
        print(f"{measurements[0].cell.label} on {names} failed:\n{text}", file=sys.stderr, flush=True)
        origin = self.origin(pack)
        for measurement in measurements:
            self._record(failed_row(measurement, origin, error_type=kind, error=text, started=started))
        if is_lost(error):
            # A new worker goes on with the rest.
            sys.exit(f"the device is lost to this process: {error}")

    def withhold(self, pack: Pack, measurements: Sequence[Measurement], error: DataChangedError | NotYetError) -> None:
        """Leave no record of what was not measured: with what it lacks there, the same command measures it."""
        print(f"{measurements[0].cell.label}: not measured: {error}", file=sys.stderr, flush=True)
        for measurement in measurements:
            self.emit(Withheld(pack=pack.id, measurement=measurement.key, why=str(error)))

    def _record(self, row: Row) -> None:
        self.storing(lambda: self.store.write(row))
        self.emit(Measured(row=told_part(row)))

    def storing(self, write: Callable[[], None]) -> None:
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
