"""The W&B mirror of a study, as the study sees it: nothing waits, whatever W&B does. Never imports wandb
(``sweeps.tracking.mirror`` does).

The store is the truth and W&B mirrors it: what an outage, a wrong key or a kill kept from W&B, the next job or ``sync``
adds.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from sweeps.tracking.config import TrackingConfig
from sweeps.tracking.messages import Answer, Fatal, Job, Mirrored, Progress, Trouble
from sweeps.tracking.process import MirrorProcess

CLOSE_SECONDS: Final = 60.0
"""A study that is done waits so long, at most, for its last runs."""
EVERY_SECONDS: Final = 30.0
"""Between two looks at the store."""
STALL_SECONDS: Final = 180.0
"""A sync that hears nothing for so long gives up: the server went away in the middle."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """The outcome of ``sync``.

    Attributes:
        runs, measurements: of the store.
        whole: measurements that W&B now holds, as read back from it.
        added: of these, the ones this sync added.
        error: why W&B isn't whole, and what to do; None when it is.
    """

    runs: int
    measurements: int
    whole: int
    added: int
    error: str | None = None

    def __str__(self) -> str:
        text = f"W&B holds {self.whole} of {self.measurements} measurements in {self.runs} runs, {self.added} added now"
        return f"{text}; {self.error}" if self.error else text


class Tracker:
    """Mirrors a study from the store, now and then, until it is closed.

    No call raises, asks for a login, or waits for W&B; only ``close`` waits, for a bounded time.

    Args:
        config: where to.
        out: the results directory.
        sweep: the study's name.
        warn: called from a thread with a sentence when W&B can't be used; the default logs a warning.
        every: seconds between two looks at the store.
    """

    def __init__(
        self,
        config: TrackingConfig,
        *,
        out: Path,
        sweep: str,
        warn: Callable[[str], None] = _log.warning,
        every: float = EVERY_SECONDS,
    ) -> None:
        self._config, self._sweep, self._warn = config, sweep, warn
        self._is_whole = False
        self._reason: str | None = None
        job = Job(tracking=config.message(), out=str(out), sweep=sweep, every=every)
        self._process = MirrorProcess(job, self._on_answer) if config.mode != "disabled" else None

    def close(self, timeout: float = CLOSE_SECONDS) -> str | None:
        """Look a last time, for `timeout` seconds at most; a sentence for the user if W&B may not hold everything."""
        if not self._process:
            return None
        self._is_whole = False
        if not self._process.close(timeout):
            self._reason = self._reason or f"W&B didn't take them within {timeout:g} s"
        if self._was_whole():
            return None
        why = self._reason or f"no time was left, or see {self._process.log_file}"
        return f"W&B: not all of {self._sweep} is known to be mirrored ({why}); run the same command with mode=sync"

    def _was_whole(self) -> bool:
        return self._is_whole

    def _on_answer(self, said: Answer) -> None:
        match said:
            case Mirrored():
                self._is_whole, self._reason = said.whole == said.measurements, None
            case Fatal():
                self._reason = said.reason
                what = f"the study goes on untracked; {self._config.how_to_log_in()}, later mode=sync"
                self._warn(f"W&B: {said.reason}: {what}")
            case Trouble():
                first, self._reason = self._reason is None, said.reason
                if first:
                    self._warn(f"W&B: {said.reason}: the study goes on; mode=sync adds what W&B misses")


def sync(out: Path, config: TrackingConfig, *, progress: Callable[[int, int], None] | None = None) -> SyncReport:
    """Make W&B whole from the store: every measurement is once in its run. Runs that are whole are left alone.

    A run's history can't be taken back: rows that the store retired since stay in it, while the run's counts and
    medians become the store's.

    Args:
        out: the results directory.
        config: its mode is not looked at, a sync is online.
        progress: called with (runs done, runs) after each.
    """
    answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    process = MirrorProcess(Job(tracking=replace(config, mode="online").message(), out=str(out)), answers.put)
    done = Progress(done=0, total=0)
    while isinstance(said := _next(answers), Progress):
        done = said
        if progress:
            progress(said.done, said.total)
    process.close(CLOSE_SECONDS if isinstance(said, Mirrored) else 0)
    if not isinstance(said, Mirrored):
        remedy = config.how_to_log_in() if isinstance(said, Fatal) else "when that is over"
        reason = f"{getattr(said, 'reason', said)}: {remedy}, run mode=sync again"
        return SyncReport(runs=done.total, measurements=0, whole=0, added=0, error=reason)
    is_whole = said.whole == said.measurements
    return SyncReport(
        runs=said.runs,
        measurements=said.measurements,
        whole=said.whole,
        added=said.added,
        error=None if is_whole else "the server didn't confirm all of them: run mode=sync again",
    )


def _next(answers: queue.SimpleQueue[Answer]) -> Answer:
    try:
        return answers.get(timeout=STALL_SECONDS)
    except queue.Empty:
        return Trouble(reason=f"no answer for {STALL_SECONDS:g} s")
