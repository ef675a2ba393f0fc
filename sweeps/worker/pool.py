"""The pool: worker processes on one machine; packs go to whoever is free. A launch has one, and so has a SLURM job.

Its owner never computes. It feeds packs, watches, says what is being measured, and replaces a worker that died. A
measurement whose worker died twice is recorded as failed, so that one poison cell can't hold up a study.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from kbit.evaluation.evaluators import EVALUATORS
from sweeps.errors import EXIT_IO, EXIT_LOAD, LoadError, PoolError, WriteError
from sweeps.events import (
    Crashed,
    Event,
    Listener,
    Measured,
    Measuring,
    OnEvent,
    PackDone,
    Started,
    Stopped,
    Withheld,
)
from sweeps.files import open_log, require_directory
from sweeps.plan.pack import Pack
from sweeps.provenance import import_environment
from sweeps.store.parts import Store
from sweeps.store.rows import OOM_ERROR, Origin, failed_row, told_part
from sweeps.study.cell import Measurement, ModelRef
from sweeps.worker.batches import MIN_BATCH_TOKENS
from sweeps.worker.cgroup import oom_kills
from sweeps.worker.devices import Workers, gpus
from sweeps.worker.settings import WorkerArguments, WorkerSettings

MOST_CRASHES: Final = 2
WORKER: Final = "sweeps.worker"
"""The module that a worker's process runs."""
BEAT_SECONDS: Final = 10.0
NEWS_SECONDS: Final = 1.0
"""What is begun is told at once, but no more often: a pack of cells that take a tenth of this each writes no file for
each. One that kills its job sooner is not the one named, but the next job begins with it, and tells that at once.
"""
LISTEN_SECONDS: Final = 0.05
"""Between two times of hearing workers that all have a pack: to wake up takes longer than to read what one says."""
STOP_SECONDS: Final = 5.0
LOG_TAIL: Final = 4000
OOM_WORDS: Final = "was killed because memory ran out"

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Slot:
    """One worker's place: its process, what it is doing, and the models of packs that it was given."""

    number: int
    log: Path
    process: subprocess.Popen[bytes] | None = None
    events: int | None = None
    listener: Listener = field(default_factory=Listener)
    pack: Pack | None = None
    models: set[ModelRef] = field(default_factory=set)
    measuring: str | None = None
    cell: str | None = None
    measured: set[str] = field(default_factory=set)
    said_anything: bool = False
    told_to_stop: bool = False
    oom_kills: int = 0


@dataclass(kw_only=True)
class WorkerPool:
    """Runs packs in worker processes on this machine.

    Attributes:
        store: where results go.
        workers: how many processes, on what, with how many threads.
        settings: how every worker measures.
        log: path of a worker's log, by its number.
        on_event: told every worker's events, and when one died.
        beat: told what is being measured, now and then and when something is begun.
        until: epoch seconds; a cell that is predicted to end later is not begun.
        pin: give each worker a GPU of its own; else each sees all.
        predict: gives a pack that a worker is about to begin what is predicted for it by then; told whether the worker
            has run a pack of its model before.
    """

    store: Store
    workers: Workers
    settings: WorkerSettings
    log: Callable[[int], Path]
    on_event: OnEvent
    beat: Callable[[Sequence[str]], None]
    until: float | None = None
    pin: bool = True
    predict: Callable[[Pack, bool], Pack] = lambda pack, _: pack
    _queue: deque[Pack] = field(default_factory=deque)
    _crashes: Counter[str] = field(default_factory=Counter)
    _silent_deaths: int = 0
    _stop_by: float | None = None
    _stopped: str | None = None
    _batch_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self._batch_tokens = self.settings.batch_tokens

    def run(self, packs: Sequence[Pack]) -> str:
        """Run all packs.

        Returns 'finished' when every measurement is recorded, 'walltime' when the next cell would end after ``until``,
        'asked' when ``stop`` was called.

        Raises:
            PoolError: no worker can be started.
            LoadError: with the setting load_again, a first model can't be loaded.
            WriteError: results can't be written.
            KeyboardInterrupt: the user stopped it; finished measurements are stored, workers are gone.
        """
        self.store = replace(self.store, made=True, witness=self.settings.witness)
        self._queue = deque(packs)
        slots = [_Slot(number=i, log=self.log(i)) for i in range(min(self.workers.count, len(packs)))]
        try:
            with selectors.DefaultSelector() as selector:
                for slot in slots:
                    self._start(slot, selector)
                self._loop(slots, selector)
        finally:
            self.store.close()
            # Workers that leave SIGTERM to their owner have been given their time before.
            patience = 1.0 if self.settings.ignore_sigterm else STOP_SECONDS
            _stop([s.process for s in slots if s.process is not None], patience)
        return self._stopped or "finished"

    def stop(self, seconds: float) -> None:
        """Finish the measurements in flight, for so many seconds at most, and no more. For a signal handler."""
        self._stopped = "asked"
        self._stop_by = min(time.monotonic() + seconds, self._stop_by or float("inf"))

    def _loop(self, slots: Sequence[_Slot], selector: selectors.BaseSelector) -> None:
        beaten = news = -math.inf
        told = frozenset[str]()
        while self._queue or any(s.pack for s in slots):
            if self._stopped is not None and not self._wind_down(slots):
                return
            for slot in slots:
                if slot.pack is None and self._queue and self._stopped is None:
                    self._feed(slot, selector)
            for key, _ in selector.select(timeout=0.5):
                self._receive(key.data, selector)
            if all(s.pack for s in slots):
                time.sleep(LISTEN_SECONDS)
            running = [s.measuring for s in slots if s.measuring]
            now = time.monotonic()
            # What has ended since needs no word of its own: it is stored.
            is_news = not told.issuperset(running)
            if now - beaten > BEAT_SECONDS or (is_news and now - news > NEWS_SECONDS):
                beaten, told = now, frozenset(running)
                news = now if is_news else news
                self._beat(running)

    def _wind_down(self, slots: Sequence[_Slot]) -> bool:
        """Tell workers to stop, once each; return False when all have stopped or the time is up."""
        for slot in slots:
            if slot.pack is not None and not slot.told_to_stop and slot.process is not None:
                slot.told_to_stop = True
                slot.process.send_signal(signal.SIGUSR1)
        if self._stop_by is not None and time.monotonic() > self._stop_by:
            return False
        return any(slot.pack is not None for slot in slots)

    def _beat(self, running: Sequence[str]) -> None:
        try:
            self.beat(running)
        except OSError as error:
            # Workers find out for themselves whether results can be written; a missed beat is no reason to stop them.
            log.warning("what is running can't be written down just now: %s", error)

    def _start(self, slot: _Slot, selector: selectors.BaseSelector) -> None:
        read, write = os.pipe()
        arguments = WorkerArguments(
            out=str(self.store.out),
            device=self.workers.device,
            threads=self.workers.threads,
            settings=replace(self.settings, batch_tokens=self._batch_tokens),
        )
        command = [
            sys.executable,
            "-m",
            WORKER,
            "--events",
            str(write),
            "--settings",
            arguments.to_json(),
        ]
        require_directory(self.store.out, self.store.witness)
        with open_log(slot.log) as log:
            # A worker hears no signal before it is ready for them: SLURM sends them to every process of a job.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM})
            try:
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
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(write)
        slot.events, slot.listener, slot.said_anything, slot.told_to_stop = read, Listener(), False, False
        slot.oom_kills, slot.models = oom_kills() or 0, set()
        selector.register(read, selectors.EVENT_READ, slot)

    def _environment(self, number: int) -> dict[str, str]:
        threads = str(self.workers.threads)
        environment = {
            **os.environ,
            **import_environment(),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            # A worker has as many threads for encoding, and forks into nothing that would encode.
            "RAYON_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "true" if self.workers.threads > 1 else "false",
        }
        if self.workers.device == "cuda" and self.pin:
            environment["CUDA_VISIBLE_DEVICES"] = gpus()[number]
        return environment

    def _feed(self, slot: _Slot, selector: selectors.BaseSelector) -> None:
        assert slot.process is not None
        assert slot.process.stdin is not None
        pack = self._queue.popleft()
        slot.pack, slot.measured, slot.measuring = self.predict(pack, pack.model in slot.models), set(), None
        slot.models.add(pack.model)
        try:
            message = {**slot.pack.to_dict(), "until": self.until}
            slot.process.stdin.write(json.dumps(message).encode() + b"\n")
            slot.process.stdin.flush()
        except BrokenPipeError:
            self._died(slot, selector)

    def _receive(self, slot: _Slot, selector: selectors.BaseSelector) -> None:
        assert slot.events is not None
        data = os.read(slot.events, 1 << 16)
        if not data:
            self._died(slot, selector)
            return
        slot.said_anything, self._silent_deaths = True, 0
        for event in slot.listener.events(data):
            self._take_in(slot, event)

    def _take_in(self, slot: _Slot, event: Event) -> None:
        match event:
            case Measuring():
                slot.measuring = event.measurement
            case Measured():
                slot.measured.add(event.row["measurement"])
                slot.measuring = None
            case Started():
                slot.cell, slot.measuring = event.cell, event.measurement
            case Withheld():
                slot.measured.add(event.measurement)
                slot.measuring = None
            case PackDone():
                slot.pack = None
            case Stopped():
                slot.pack = slot.measuring = None
                # All workers share the clock: nobody else begins another pack either.
                self._stopped = self._stopped or event.reason
        self.on_event(event, slot.number)

    def _died(self, slot: _Slot, selector: selectors.BaseSelector) -> None:
        """Count the crash against what was in flight, put the rest of its pack back, start another worker."""
        assert slot.process is not None
        assert slot.events is not None
        selector.unregister(slot.events)
        os.close(slot.events)
        code = slot.process.wait()
        how = _exit_words(code)
        tail = slot.log.read_text(errors="replace")[-LOG_TAIL:]
        if code == EXIT_IO:
            raise WriteError(f"results can't be written: {tail.strip().splitlines()[-1] if tail.strip() else how}")
        if self._stopped is not None:
            slot.pack = slot.measuring = slot.cell = None
            return
        if code == EXIT_LOAD:
            raise LoadError(f"a model can't be loaded; {slot.log} ends with:\n{tail}")
        if code == -signal.SIGKILL and (oom_kills() or 0) > slot.oom_kills:
            how = OOM_WORDS
        if not slot.said_anything:
            self._silent_deaths += 1
            if self._silent_deaths > MOST_CRASHES:
                raise PoolError(f"workers {how} before doing anything; {slot.log} ends with:\n{tail}")
        if slot.pack is not None:
            self._put_back(slot, how, tail)
        self.on_event(Crashed(how=how, log=str(slot.log)), slot.number)
        slot.pack = slot.measuring = slot.cell = None
        self._start(slot, selector)

    def _put_back(self, slot: _Slot, how: str, tail: str) -> None:
        assert slot.pack is not None
        # What was stored just before the end may not have been announced.
        slot.measured |= self._stored(slot.pack)
        left = [m for m in slot.pack.measurements() if m.key not in slot.measured]
        suspect = next((m for m in left if m.key == slot.measuring), None) or next(
            (m for m in left if m.cell.key == slot.cell), None
        )
        if suspect is not None:
            self._crashes[suspect.key] += 1
            if how == OOM_WORDS and not EVALUATORS[suspect.eval.kind].own_batches and self._halve_batch():
                self._crashes[suspect.key] = 0
            elif how == OOM_WORDS or self._crashes[suspect.key] >= MOST_CRASHES:
                self._record_crash(slot.pack, suspect, how, tail, slot)
                slot.measured.add(suspect.key)
        rest = slot.pack.without(slot.measured)
        if rest is not None:
            self._queue.appendleft(rest)

    def _stored(self, pack: Pack) -> set[str]:
        """Return measurements of a pack that are stored, and not to be done again."""
        launch = self.settings.provenance.get("launch")
        rows = self.store.read_pack(pack.id, ["measurement", "status", "launch"])
        # A launch may be told to measure again what failed or diverged in an earlier one, under the same pack's id.
        return {r["measurement"] for r in rows if r["status"] == "done" or r["launch"] == launch}

    def _halve_batch(self) -> bool:
        """Start workers with half the batch from now on; False when it is as small as it gets."""
        if self._batch_tokens <= MIN_BATCH_TOKENS:
            return False
        self._batch_tokens = max(MIN_BATCH_TOKENS, self._batch_tokens // 2)
        return True

    def _record_crash(self, pack: Pack, measurement: Measurement, how: str, tail: str, slot: _Slot) -> None:
        times = "" if how == OOM_WORDS else f" {MOST_CRASHES} times"
        row = failed_row(
            measurement,
            Origin(sweep=pack.sweep, pack=pack.id, rung=pack.rung, provenance=self.settings.provenance),
            error_type=OOM_ERROR if how == OOM_WORDS else "WorkerDied",
            error=f"the worker {how}{times} while measuring this; {slot.log} ends with:\n{tail}",
        )
        self.store.write(row)
        self.on_event(Measured(row=told_part(row)), slot.number)


def _exit_words(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    return f"ended with exit code {code}"


def _stop(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """End workers: those that are idle by closing their input, the rest by SIGTERM, then SIGKILL."""
    for process in processes:
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        process.terminate()
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
