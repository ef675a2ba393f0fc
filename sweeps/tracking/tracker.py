"""The W&B mirror beside a study, and ``mode=sync``. Never imports wandb (``sweeps.tracking.mirror`` does).

The store is the truth and W&B mirrors it: what an outage, a wrong key or a kill kept from W&B, the next look adds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from sweeps.tracking.config import TrackingConfig
from sweeps.tracking.messages import Answer, Fatal, Job, Mirrored, Progress, Trouble
from sweeps.tracking.process import MirrorProcess

LOOK_SECONDS: Final = 30.0
"""Between two looks at the store, at least."""
CLOSE_SECONDS: Final = 60.0
QUIET_SECONDS: Final = 3.0
"""A mirror that takes longer to close is said to be waited for."""
STALL_SECONDS: Final = 180.0
"""A sync that hears nothing for so long gives up: the server went away in the middle."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """The outcome of ``sync``.

    Attributes:
        runs, measurements: in the store.
        whole: measurements that W&B is known to hold now, as it says itself.
        updated: runs that this sync brought up to date.
        error: why W&B isn't whole, and what to do; None when it is.
    """

    runs: int
    measurements: int
    whole: int
    updated: int
    error: str | None = None

    def __str__(self) -> str:
        if self.error and not self.measurements:
            return f"What W&B holds is not known; {self.error}"
        text = (
            f"W&B {'is known to hold' if self.error else 'holds'} {self.whole} of {self.measurements} measurements "
            f"in {self.runs} runs, {self.updated} brought up to date now"
        )
        return f"{text}; {self.error}" if self.error else text


class Tracker:
    """Mirrors a study while it runs, from the store.

    No call raises, asks for a login, or waits for W&B; only ``close`` waits, for a bounded time.

    Args:
        config: where to.
        out: the results directory.
        sweep: the study.
        warn: called from a thread with a sentence when W&B can't be used; the default logs a warning.
    """

    def __init__(
        self, config: TrackingConfig, *, out: Path, sweep: str, warn: Callable[[str], None] = _log.warning
    ) -> None:
        self._config, self._warn = config, warn
        self._mirrored: Mirrored | None = None
        self._reason: str | None = None
        job = Job(tracking=config.message(), out=str(out), sweep=sweep, every=LOOK_SECONDS)
        self._process = MirrorProcess(job, self._on_answer) if config.mode != "disabled" else None

    def close(self, timeout: float = CLOSE_SECONDS, *, say: Callable[[str], None] = _log.info) -> str | None:
        """Bring W&B up to date, for `timeout` seconds at most; return a sentence where it may not hold everything.

        Args:
            timeout: how long this may take.
            say: called with a sentence where it takes longer than a moment.
        """
        if not self._process:
            return None
        self._process.finish()
        left = timeout
        if timeout > QUIET_SECONDS and not self._process.wait(QUIET_SECONDS):
            left -= QUIET_SECONDS
            say(f"W&B is being brought up to date, for up to {left:g} s more")
        if not self._process.close(left):
            self._reason = self._reason or f"W&B didn't take them within {timeout:g} s"
        said = self._mirrored
        if said is not None and said.whole == said.measurements:
            return None
        missing = "what" if said is None else f"{said.measurements - said.whole} of {said.measurements} measurements"
        rest = "was measured is" if said is None else "are"
        why = self._reason or f"see {self._process.log_file}"
        return f"W&B: {missing} {rest} not known to be mirrored ({why}); run the same command with mode=sync"

    def _on_answer(self, said: Answer) -> None:
        if isinstance(said, Mirrored):
            self._mirrored = said
        if not isinstance(said, Trouble | Fatal):
            return
        first, self._reason = self._reason is None, said.reason
        if isinstance(said, Fatal):
            what = f"the study goes on untracked; {self._config.how_to_log_in()}, later mode=sync"
            self._warn(f"W&B: {said.reason}: {what}")
        elif first:
            self._warn(f"W&B: {said.reason}: the study goes on; mode=sync adds what W&B misses")


def sync(out: Path, config: TrackingConfig, *, progress: Callable[[int, int], None] | None = None) -> SyncReport:
    """Make W&B whole from the store. Runs that are up to date are left alone.

    Args:
        out: the results directory; it may be one that this user may only read.
        config: its mode is not looked at, a sync is online.
        progress: called with (runs done, runs to bring up to date) after each.
    """
    found: list[Mirrored] = []
    reasons: list[tuple[str, str]] = []
    heard = time.monotonic()

    def on_answer(said: Answer) -> None:
        nonlocal heard
        heard = time.monotonic()
        if isinstance(said, Progress) and progress:
            progress(said.done, said.total)
        elif isinstance(said, Mirrored):
            found.append(said)
        elif isinstance(said, Trouble | Fatal):
            remedy = config.how_to_log_in() if isinstance(said, Fatal) else "when that is over"
            reasons.append((said.reason, remedy))

    process = MirrorProcess(Job(tracking=replace(config, mode="online").message(), out=str(out)), on_answer)
    process.finish()
    while not process.wait(1.0):
        if time.monotonic() - heard > STALL_SECONDS:
            reasons.append((f"no answer for {STALL_SECONDS:g} s", "when the server is back"))
            break
    process.close(0)
    done = found[0] if found else Mirrored(runs=0, measurements=0, whole=0, updated=0)
    error = None
    if not found or done.whole < done.measurements:
        reason, remedy = reasons[0] if reasons else (f"see {process.log_file}", "when that is over")
        error = f"{reason}: {remedy}, run mode=sync again"
    return SyncReport(
        runs=done.runs, measurements=done.measurements, whole=done.whole, updated=done.updated, error=error
    )
