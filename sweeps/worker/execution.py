"""Packs through a pool of workers, mirrored to W&B: what a launch does on its machine, and a SLURM job on its node."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sweeps.errors import UserError
from sweeps.plan.packs import Pack
from sweeps.store.parts import Store
from sweeps.tracking.tracker import CLOSE_SECONDS, Tracker, TrackingConfig
from sweeps.worker.devices import Workers
from sweeps.worker.pool import WorkerPool

BATCH_TOKENS: Final = {"cpu": 2048, "cuda": 16384}
"""Tokens in a batch: on a CPU what keeps activations in its caches, on a GPU what fills it."""

END_SECONDS: Final = 10.0
"""What is kept of the time that is left, when W&B's mirror is closed: to end its processes, and for the caller."""


class Execution:
    """Runs packs and mirrors what they measure.

    Args:
        on_event: told what happens, e.g. a view.
        warn: told what W&B's mirror can't do.
        ends: epoch seconds at which this process is killed; W&B's mirror gets no time beyond. None is never.
        pool: options of ``WorkerPool`` beside those given here (log, beat, until, pin).
    """

    def __init__(
        self,
        packs: Sequence[Pack],
        *,
        store: Store,
        workers: Workers,
        settings: Mapping[str, Any],
        tracking: TrackingConfig,
        on_event: Callable[[Mapping[str, Any]], None],
        warn: Callable[[str], None],
        ends: float | None = None,
        **pool: Any,
    ) -> None:
        self._packs = packs
        self._waiting = {pack.id: pack for pack in packs}
        self._tracking, self._warn, self._tell = tracking, warn, on_event
        self._ends = ends
        self._tracker: Tracker | None = None
        self._pool = WorkerPool(store=store, workers=workers, settings=settings, on_event=self._on_event, **pool)

    def run(self) -> str:
        """Run all packs; returns and raises as ``WorkerPool.run``."""
        self._tracker = Tracker(self._tracking, warn=self._warn)
        try:
            return self._pool.run(self._packs)
        finally:
            warning = self._tracker.close(close_seconds(self._ends, time.time()))
            if warning:
                self._warn(warning)

    def stop(self, seconds: float, *, ends: float | None = None) -> None:
        """Finish the measurements in flight, for so many seconds at most, and no more. For a signal handler.

        Args:
            ends: as for the class, where that is sooner now.
        """
        if ends is not None:
            self._ends = min(ends, self._ends or ends)
        self._pool.stop(seconds)

    def _on_event(self, event: Mapping[str, Any]) -> None:
        assert self._tracker is not None
        self._tell(event)
        # A run is opened when its pack begins: a large study has more packs than W&B likes to have open.
        pack = self._waiting.pop(event["pack"], None) if event["event"] == "started" else None
        if pack is not None:
            config = run_config(pack)
            self._tracker.start_pack(pack.id, sweep=pack.sweep, name=run_name(pack.id, config), config=config)
        if event["event"] == "measured":
            self._tracker.log(event["row"])
        elif event["event"] in ("pack_done", "stopped"):
            self._tracker.finish_pack(event["pack"])


def close_seconds(ends: float | None, now: float) -> float:
    """How long W&B's mirror may take to close."""
    return CLOSE_SECONDS if ends is None else min(CLOSE_SECONDS, max(0.0, ends - now - END_SECONDS))


def run_config(pack: Pack | Mapping[str, Any]) -> dict[str, Any]:
    """What a pack's W&B run says of itself, from a pack or from one of its rows."""
    if isinstance(pack, Pack):
        model = pack.model
        return {"family": model.family, "model": model.label, "params": model.params}
    return {name: pack[name] for name in ("family", "model", "params")}


def run_name(pack_id: str, config: Mapping[str, Any]) -> str:
    """What people see in W&B: the model and the first characters of the pack's id."""
    return f"{config['model']} {pack_id[:4]}"


def batch_tokens(value: object, device: str) -> int:
    """Tokens in a batch, from ``executor.batch_tokens``.

    Raises:
        UserError: neither auto nor a whole number of at least 1.
    """
    if value == "auto":
        return BATCH_TOKENS[device]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"executor.batch_tokens={value!r} is not valid: auto, or a whole number of at least 1")
    return value


def worker_log(directory: Path) -> Callable[[int], Path]:
    """Where the workers of a launch on this machine write."""
    return lambda number: directory / f"worker-{number}.log"
