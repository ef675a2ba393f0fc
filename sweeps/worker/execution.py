"""Packs through a pool of workers, beside W&B's mirror: what a launch does on its machine, a SLURM job on its node."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sweeps.errors import UserError
from sweeps.events import OnEvent
from sweeps.plan.pack import Pack
from sweeps.store.parts import Store
from sweeps.tracking.config import TrackingConfig
from sweeps.tracking.tracker import CLOSE_SECONDS, Tracker
from sweeps.worker.devices import Workers
from sweeps.worker.pool import WorkerPool
from sweeps.worker.settings import WorkerSettings

BATCH_TOKENS: Final = {"cpu": 2048, "cuda": 16384}
"""Tokens in a batch: on a CPU what keeps activations in its caches, on a GPU what fills it."""

HURRIED_SECONDS: Final = 15.0
"""W&B's mirror gets no more where a study did not end by itself: who interrupts it, or has an error to read, waits, and
a job whose walltime is near has to go back into the queue.
"""

END_SECONDS: Final = 10.0
"""Seconds kept of the time that is left when W&B's mirror is closed: to end its processes, and for the caller."""


@dataclass(kw_only=True)
class Execution:
    """Runs packs of a study, beside a mirror of it.

    Attributes:
        store, workers, settings, log, beat, until, pin, predict: as for ``WorkerPool``.
        on_event: told what happens, e.g. a view.
        warn: told what W&B's mirror can't do, and that it is waited for.
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
    _pool: WorkerPool = field(init=False)

    def __post_init__(self) -> None:
        self._pool = WorkerPool(
            store=self.store,
            workers=self.workers,
            settings=self.settings,
            log=self.log,
            on_event=self.on_event,
            beat=self.beat,
            until=self.until,
            pin=self.pin,
            predict=self.predict,
        )

    def run(self) -> str:
        """Run all packs; return and raise as ``WorkerPool.run``."""
        tracker = Tracker(self.tracking, out=self.store.out, sweep=self.packs[0].sweep, warn=self.warn)
        most = HURRIED_SECONDS
        try:
            reason = self._pool.run(self.packs)
            if reason == "finished":
                most = CLOSE_SECONDS
            return reason
        finally:
            warning = tracker.close(close_seconds(self.ends, time.time(), most), say=self.warn)
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


def close_seconds(ends: float | None, now: float, most: float = CLOSE_SECONDS) -> float:
    """Return how long W&B's mirror may take to close: no more than `most`, nor than the job has."""
    return most if ends is None else min(most, max(0.0, ends - now - END_SECONDS))


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
