"""Packs through a pool of workers, mirrored to W&B: what a launch does on its machine, and a SLURM job on its node."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sweeps.errors import UserError
from sweeps.events import Event, Measured, OnEvent, PackDone, Started, Stopped
from sweeps.plan.pack import Pack
from sweeps.store.parts import Store
from sweeps.store.schema import Row, Scalar
from sweeps.tracking.config import TrackingConfig
from sweeps.tracking.tracker import CLOSE_SECONDS, Tracker
from sweeps.worker.devices import Workers
from sweeps.worker.pool import WorkerPool
from sweeps.worker.settings import WorkerSettings

BATCH_TOKENS: Final = {"cpu": 2048, "cuda": 16384}
"""Tokens in a batch: on a CPU what keeps activations in its caches, on a GPU what fills it."""

END_SECONDS: Final = 10.0
"""Seconds kept of the time that is left when W&B's mirror is closed: to end its processes, and for the caller."""


@dataclass(kw_only=True)
class Execution:
    """Runs packs and mirrors what they measure.

    Attributes:
        store, workers, settings, log, beat, until, pin, predict: as for ``WorkerPool``.
        on_event: told what happens, e.g. a view.
        warn: told what W&B's mirror can't do.
        ends: epoch seconds at which this process is killed; W&B's mirror gets no time beyond. None is never.
    """

    packs: Sequence[Pack]
    store: Store
    workers: Workers
    settings: WorkerSettings
    tracking: TrackingConfig
    log: Callable[[int], Path]
    beat: Callable[[Sequence[str]], None]
    on_event: OnEvent
    warn: Callable[[str], None]
    ends: float | None = None
    until: float | None = None
    pin: bool = True
    predict: Callable[[Pack, bool], Pack] = lambda pack, _: pack
    _tracker: Tracker | None = None
    _waiting: dict[str, Pack] = field(init=False)
    _pool: WorkerPool = field(init=False)

    def __post_init__(self) -> None:
        self._waiting = {pack.id: pack for pack in self.packs}
        self._pool = WorkerPool(
            store=self.store,
            workers=self.workers,
            settings=self.settings,
            log=self.log,
            on_event=self._on_event,
            beat=self.beat,
            until=self.until,
            pin=self.pin,
            predict=self.predict,
        )

    def run(self) -> str:
        """Run all packs; return and raise as ``WorkerPool.run``."""
        self._tracker = Tracker(self.tracking, warn=self.warn)
        try:
            return self._pool.run(self.packs)
        finally:
            warning = self._tracker.close(close_seconds(self.ends, time.time()))
            if warning:
                self.warn(warning)

    def stop(self, seconds: float, *, ends: float | None = None) -> None:
        """Finish the measurements in flight and no more. For a signal handler.

        Args:
            seconds: how long at most.
            ends: as for the class, where that is sooner now.
        """
        if ends is not None:
            self.ends = min(ends, self.ends or ends)
        self._pool.stop(seconds)

    def _on_event(self, event: Event, worker: int) -> None:
        assert self._tracker is not None
        self.on_event(event, worker)
        match event:
            case Started():
                # A run is opened when its pack begins: a large study has more packs than W&B likes to have open.
                pack = self._waiting.pop(event.pack, None)
                if pack is not None:
                    config = run_config(pack)
                    self._tracker.start_pack(pack.id, sweep=pack.sweep, name=run_name(pack.id, config), config=config)
            case Measured():
                self._tracker.log(event.row)
            case PackDone() | Stopped():
                self._tracker.finish_pack(event.pack)


def close_seconds(ends: float | None, now: float) -> float:
    """Return how long W&B's mirror may take to close."""
    return CLOSE_SECONDS if ends is None else min(CLOSE_SECONDS, max(0.0, ends - now - END_SECONDS))


def run_config(pack: Pack | Row) -> dict[str, Scalar]:
    """Return what a pack's W&B run says of itself, from a pack or from one of its rows."""
    if isinstance(pack, Pack):
        model = pack.model
        return {"family": model.family, "model": model.label, "params": model.params}
    return {name: pack[name] for name in ("family", "model", "params")}


def run_name(pack_id: str, config: Mapping[str, Scalar]) -> str:
    """Return what people see in W&B: the model and the first characters of the pack's id."""
    return f"{config['model']} {pack_id[:4]}"


def batch_tokens(value: object, device: str) -> int:
    """Return the tokens in a batch, from ``executor.batch_tokens``.

    Raises:
        UserError: neither auto nor a whole number of at least 1.
    """
    if value == "auto":
        return BATCH_TOKENS[device]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"executor.batch_tokens={value!r} is not valid: auto, or a whole number of at least 1")
    return value


def worker_log(directory: Path) -> Callable[[int], Path]:
    """Return where the workers of a launch on this machine write."""
    return lambda number: directory / f"worker-{number}.log"
