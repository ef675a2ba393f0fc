"""The W&B mirror of a study: calls return at once, whatever W&B does. Never imports wandb (``sweeps.tracking.mirror``
does).

The store is the truth and W&B mirrors it: what an outage, a wrong key or a kill kept from W&B, ``sync`` adds later.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from sweeps.store.schema import Row, Scalar
from sweeps.tracking.config import TrackingConfig
from sweeps.tracking.messages import Answer, Fatal, Finish, Finished, Log, Start, Trouble
from sweeps.tracking.mirror import IDENTITY, mirrored_columns
from sweeps.tracking.process import MirrorProcess

CLOSE_SECONDS: Final = 15.0
STALL_SECONDS: Final = 180.0
"""A sync that hears nothing for so long gives up: the server went away in the middle."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrackedPack:
    """A pack and its rows from the store; id, sweep, name and config as given to ``Tracker.start_pack``."""

    id: str
    sweep: str
    name: str
    config: Mapping[str, Scalar] = field(default_factory=dict)
    rows: Sequence[Row]


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """The outcome of ``sync``.

    Attributes:
        packs, measurements: in the store.
        whole: measurements that W&B now holds, as read back from it.
        added: of these, the ones this sync added.
        error: why W&B isn't whole, and what to do; None when it is.
    """

    packs: int
    measurements: int
    whole: int
    added: int
    error: str | None = None

    def __str__(self) -> str:
        text = (
            f"W&B holds {self.whole} of {self.measurements} measurements in {self.packs} packs, {self.added} added now"
        )
        return f"{text}; {self.error}" if self.error else text


class Tracker:
    """Mirrors packs, several at a time, as their measurements finish.

    No call raises, asks for a login, or waits for W&B; only ``close`` waits, for a bounded time.

    Args:
        warn: called from a thread with a sentence when W&B can't be used; the default logs a warning.
    """

    def __init__(self, config: TrackingConfig, *, warn: Callable[[str], None] = _log.warning) -> None:
        self._config, self._warn = config, warn
        self._logged: dict[str, set[str]] = {}
        self._mirrored: dict[str, int] = {}
        self._reason: str | None = None
        enabled = config.mode != "disabled"
        self._process = MirrorProcess(config.message(), self._on_answer) if enabled else None

    def start_pack(self, pack_id: str, *, sweep: str, name: str, config: Mapping[str, Scalar]) -> None:
        """Open the W&B run with the pack's id, resuming it if it exists."""
        if self._process:
            self._process.send(Start(pack=pack_id, sweep=sweep, name=name, config=_plain_dict(config), whole=False))

    def log(self, row: Row) -> None:
        """Mirror one measurement, as the store's row has it, of a pack (row['pack']) that was started."""
        if self._process:
            self._logged.setdefault(row["pack"], set()).add(row["measurement"])
            self._process.send(Log(pack=row["pack"], row=_mirrored_part(row)))

    def finish_pack(self, pack_id: str) -> None:
        """No more measurements of this pack will come."""
        if self._process:
            self._process.send(Finish(pack=pack_id))

    def close(self, timeout: float = CLOSE_SECONDS) -> str | None:
        """Finish all runs, for `timeout` seconds at most; a sentence for the user if W&B may not hold everything."""
        if not self._process:
            return None
        if not self._process.close(timeout):
            self._reason = self._reason or f"W&B didn't take them within {timeout:g} s"
        lost = sum(max(0, len(keys) - self._mirrored.get(pack, 0)) for pack, keys in self._logged.items())
        if not lost:
            return None
        total = sum(map(len, self._logged.values()))
        why = self._reason or f"see {self._process.log_file}"
        return (
            f"W&B: {lost} of {total} measurements not known to be mirrored ({why}); run the same command with mode=sync"
        )

    def _on_answer(self, said: Answer) -> None:
        if isinstance(said, Finished):
            self._mirrored[said.pack] = self._mirrored.get(said.pack, 0) + said.mirrored
            return
        first, self._reason = self._reason is None, said.reason
        if isinstance(said, Fatal):
            what = f"the study goes on untracked; {self._config.how_to_log_in()}, later mode=sync"
            self._warn(f"W&B: {said.reason}: {what}")
        elif first:
            self._warn(f"W&B: {said.reason}: the study goes on; mode=sync adds what W&B misses")


def sync(
    packs: Iterable[TrackedPack], config: TrackingConfig, *, progress: Callable[[int, int], None] | None = None
) -> SyncReport:
    """Make W&B whole from the store: every measurement is once in its pack's run. Runs that are whole are left alone.

    A run's history can't be taken back: rows that the store retired since stay in it, while the run's counts and table
    become the store's. Rows with the status 'superseded' are counted as such and left out of the table. Not for packs
    that are running: this would add what their own mirror is about to add.

    Args:
        packs: every pack of the store, with all its rows.
        config: its mode is not looked at, a sync is online.
        progress: called with (packs done, packs) after each.
    """
    todo = list(packs)
    answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    process = MirrorProcess(replace(config, mode="online").message(), answers.put)
    whole = added = 0
    error: str | None = None
    for done, pack in enumerate(todo, 1):
        about = _plain_dict(pack.config)
        process.send(Start(pack=pack.id, sweep=pack.sweep, name=pack.name, config=about, whole=True))
        for row in pack.rows:
            process.send(Log(pack=pack.id, row=_mirrored_part(row)))
        process.send(Finish(pack=pack.id))
        said = _next(answers)
        if not isinstance(said, Finished):
            remedy = config.how_to_log_in() if isinstance(said, Fatal) else "when the server is back"
            error = f"{said.reason}: {remedy}, run mode=sync again"
            break
        whole += said.mirrored
        added += said.added
        if said.mirrored < len(pack.rows):
            error = "the server didn't confirm all of them: run mode=sync again"
        if progress:
            progress(done, len(todo))
    process.close(CLOSE_SECONDS if error is None else 0)
    measurements = sum(len(pack.rows) for pack in todo)
    return SyncReport(packs=len(todo), measurements=measurements, whole=whole, added=added, error=error)


def _next(answers: queue.SimpleQueue[Answer]) -> Answer:
    try:
        return answers.get(timeout=STALL_SECONDS)
    except queue.Empty:
        return Trouble(reason=f"no answer for {STALL_SECONDS:g} s")


def _plain_dict(values: Mapping[str, Scalar]) -> dict[str, Scalar]:
    return {name: _plain(value) for name, value in values.items()}


def _mirrored_part(row: Row) -> Row:
    """Return what W&B gets of a row: no samples, tracebacks or machine names."""
    part = {k: _plain(row.get(k)) for k in (*IDENTITY, *mirrored_columns())}
    part = {k: v for k, v in part.items() if v == v}  # pandas' other way to say that a value is missing
    return part | {k: _plain(dict(row.get(k) or {})) for k in ("metrics", "stderr")}


def _plain(value: Any) -> Any:
    """Convert a value of a row or a configuration to JSON's types: numpy and pandas scalars too, missing as None."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    return _plain(value.item()) if hasattr(value, "item") else str(value)
