"""The local executor: one worker process a GPU, or CPU workers that share the cores; packs go to whoever is free.

The launcher never computes. It feeds packs, watches, keeps the claim's heartbeat, and starts a worker anew that died. A
measurement whose worker died twice is recorded as failed, so that one poison cell can't hold up a study.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from sweeps.cell import Cell, Measurement
from sweeps.claims import HEARTBEAT_SECONDS, Claim, Claims
from sweeps.devices import Workers, gpus
from sweeps.plan import Pack
from sweeps.results import measurement_row
from sweeps.store import Store

MOST_CRASHES: Final = 2
STOP_SECONDS: Final = 5.0
LOG_TAIL: Final = 4000

log = logging.getLogger(__name__)

OnEvent = Callable[[Mapping[str, Any]], None]


class ExecutorError(Exception):
    """Workers can't run at all; the message ends with what they last said."""


@dataclass(kw_only=True)
class _Slot:
    """One worker's place: its process, and what it is doing."""

    number: int
    log: Path
    process: subprocess.Popen[bytes] | None = None
    events: int | None = None
    buffer: bytes = b""
    pack: Pack | None = None
    measuring: str | None = None
    cell: str | None = None
    measured: set[str] = field(default_factory=set)
    said_anything: bool = False


@dataclass(kw_only=True)
class LocalExecutor:
    """Runs packs in worker processes on this machine.

    Attributes:
        store, claims, claim: where results go; who holds them.
        workers: how many processes, on what, with how many threads.
        settings: JSON values for every worker (batch_tokens, provenance, trust_remote_code).
        logs: directory for one log a worker.
        on_event: told every worker's events, and {'event': 'crashed'} when one died.
    """

    store: Store
    claims: Claims
    claim: Claim
    workers: Workers
    settings: Mapping[str, Any]
    logs: Path
    on_event: OnEvent
    _queue: deque[Pack] = field(default_factory=deque)
    _crashes: Counter[str] = field(default_factory=Counter)
    _silent_deaths: int = 0

    def run(self, packs: Sequence[Pack]) -> None:
        """Run all packs; returns when every measurement is recorded.

        Raises:
            ExecutorError: no worker can be started.
            KeyboardInterrupt: the user stopped it; finished measurements are stored, workers are gone.
        """
        self._queue = deque(packs)
        self.logs.mkdir(parents=True, exist_ok=True)
        count = min(self.workers.count, len(packs))
        slots = [_Slot(number=i, log=self.logs / f"worker-{i}.log") for i in range(count)]
        previous = {s: signal.signal(s, _interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
        try:
            with selectors.DefaultSelector() as selector:
                for slot in slots:
                    self._start(slot, selector)
                self._loop(slots, selector)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            _stop([s.process for s in slots if s.process is not None])

    def _loop(self, slots: Sequence[_Slot], selector: selectors.BaseSelector) -> None:
        beat = 0.0
        while self._queue or any(s.pack for s in slots):
            for slot in slots:
                if slot.pack is None and self._queue:
                    self._feed(slot, selector)
            for key, _ in selector.select(timeout=1.0):
                self._receive(key.data, selector)
            if time.monotonic() - beat > HEARTBEAT_SECONDS:
                beat = time.monotonic()
                self._heartbeat([s.measuring for s in slots if s.measuring])

    def _heartbeat(self, running: Sequence[str]) -> None:
        try:
            self.claims.heartbeat(self.claim, running)
        except OSError as error:
            # Workers find out for themselves whether results can be written; a missed beat is no reason to stop them.
            log.warning("%s can't be written just now: %s", self.claims.directory, error)

    def _start(self, slot: _Slot, selector: selectors.BaseSelector) -> None:
        read, write = os.pipe()
        settings = {
            **self.settings,
            "out": str(self.store.out),
            "device": self.workers.device,
            "threads": self.workers.threads,
        }
        command = [sys.executable, "-m", "sweeps.worker", "--events", str(write), "--settings", json.dumps(settings)]
        with slot.log.open("ab") as log:
            # A session of its own: Ctrl-C reaches the launcher alone, which then stops its workers in order.
            slot.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[write],
                env=self._environment(slot.number),
                start_new_session=True,
            )
        os.close(write)
        slot.events, slot.buffer, slot.said_anything = read, b"", False
        selector.register(read, selectors.EVENT_READ, slot)

    def _environment(self, number: int) -> dict[str, str]:
        threads = str(self.workers.threads)
        project = str(Path(__file__).parent.parent)
        path = os.pathsep.join(p for p in (project, os.environ.get("PYTHONPATH")) if p)
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.workers.device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = gpus()[number]
        return environment

    def _feed(self, slot: _Slot, selector: selectors.BaseSelector) -> None:
        assert slot.process is not None
        assert slot.process.stdin is not None
        slot.pack, slot.measured, slot.measuring = self._queue.popleft(), set(), None
        try:
            slot.process.stdin.write(json.dumps(slot.pack.to_dict()).encode() + b"\n")
            slot.process.stdin.flush()
        except BrokenPipeError:
            self._died(slot, selector)

    def _receive(self, slot: _Slot, selector: selectors.BaseSelector) -> None:
        assert slot.events is not None
        data = os.read(slot.events, 1 << 16)
        if not data:
            self._died(slot, selector)
            return
        *lines, slot.buffer = (slot.buffer + data).split(b"\n")
        slot.said_anything, self._silent_deaths = True, 0
        for line in lines:
            self._take_in(slot, json.loads(line))

    def _take_in(self, slot: _Slot, event: Mapping[str, Any]) -> None:
        if event["event"] == "started":
            slot.cell, slot.measuring = event["cell"], None
        elif event["event"] == "measuring":
            slot.measuring = event["measurement"]
        elif event["event"] == "measured":
            slot.measured.add(event["row"]["measurement"])
            slot.measuring = None
        elif event["event"] == "pack_done":
            slot.pack = None
        self.on_event({**event, "worker": slot.number})

    def _died(self, slot: _Slot, selector: selectors.BaseSelector) -> None:
        """Count the crash against what was in flight, put the rest of its pack back, start the worker anew."""
        assert slot.process is not None
        assert slot.events is not None
        selector.unregister(slot.events)
        os.close(slot.events)
        how = _exit_words(slot.process.wait())
        tail = slot.log.read_text(errors="replace")[-LOG_TAIL:]
        if not slot.said_anything:
            self._silent_deaths += 1
            if self._silent_deaths > MOST_CRASHES:
                raise ExecutorError(f"workers {how} before doing anything; {slot.log} ends with:\n{tail}")
        if slot.pack is not None:
            self._put_back(slot, how, tail)
        self.on_event({"event": "crashed", "worker": slot.number, "how": how, "log": str(slot.log)})
        slot.pack = slot.measuring = slot.cell = None
        self._start(slot, selector)

    def _put_back(self, slot: _Slot, how: str, tail: str) -> None:
        assert slot.pack is not None
        left = [m for m in slot.pack.measurements() if m.key not in slot.measured]
        suspect = next((m for m in left if m.key == slot.measuring), None) or next(
            (m for m in left if m.cell.key == slot.cell), None
        )
        if suspect is not None:
            self._crashes[suspect.key] += 1
            if self._crashes[suspect.key] >= MOST_CRASHES:
                self._record_crash(slot.pack, suspect, how, tail, slot)
                left.remove(suspect)
        items: dict[Cell, list[Measurement]] = {}
        for m in left:
            items.setdefault(m.cell, []).append(m)
        if items:
            rest = tuple((cell, tuple(m.eval for m in ms)) for cell, ms in items.items())
            self._queue.appendleft(replace(slot.pack, items=rest))

    def _record_crash(self, pack: Pack, measurement: Measurement, how: str, tail: str, slot: _Slot) -> None:
        now = datetime.now(UTC)
        row = {
            **measurement_row(measurement),
            **self.settings["provenance"],
            "sweep": pack.sweep,
            "pack": pack.id,
            "status": "failed",
            "error_type": "WorkerDied",
            "error": f"the worker {how} {MOST_CRASHES} times while measuring this; {slot.log} ends with:\n{tail}",
            "started": now,
            "finished": now,
        }
        self.store.write(row)
        told = {k: v for k, v in row.items() if k not in ("error", "versions")}
        self.on_event({"event": "measured", "row": told, "worker": slot.number})


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _exit_words(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    return f"ended with exit code {code}"


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End workers: those that are idle by closing their input, the rest by SIGTERM, then SIGKILL."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()
