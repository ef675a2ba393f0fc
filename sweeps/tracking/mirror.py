"""The process that talks to W&B, ``python -m sweeps.tracking.mirror``: the only place that imports wandb.

It is a process of its own so that nothing W&B does (a slow server, an outage, a crash) can block or stop a study. It
looks at the store now and then, and a last time when its input ends, and makes each run that is not up to date what it
is to be. A run is made of the store alone (sweeps.tracking.runs) and written whole: it does not matter who writes it,
how often, or where a process is killed. Processes that mirror one study leave the looks in between to one of them,
which only saves requests.

Lines in: the job, JSON (sweeps.tracking.messages). Lines out: answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sweeps.errors import AwayError, RefusedError
from sweeps.files import clock, is_shared, list_files, make_inside, require_directory, share_with_group
from sweeps.store.parts import ROWS_IN, Store
from sweeps.store.schema import Row, Scalar
from sweeps.study.manifest import load_manifests
from sweeps.tracking.client import Client
from sweeps.tracking.messages import Answer, Fatal, Job, Mirrored, Progress, Trouble, Uploaded, to_line
from sweeps.tracking.process import kill_with_children
from sweeps.tracking.runs import DIGEST, NEEDED, SHOWN, Division, Run, directory_id, divided, summary
from sweeps.tracking.server import RemoteRun, Server

if TYPE_CHECKING:
    import pyarrow as pa

LINGER_SECONDS: Final = 60.0
"""How long this process may outlive a study that was killed, to finish its uploads."""
SPACING: Final = 10.0
"""Between two looks there are at least so many times the seconds that the last one took, whoever makes them."""
MOST_PAUSE: Final = 600.0
"""But no more than these seconds; a look that is said to be due later is another clock's."""
_JOB_TYPE: Final = "cells"
"""By which they are told from the runs of earlier versions, 'pack'."""

Emit = Callable[[Answer], None]
Stamp = tuple[tuple[str, int, int], ...]


@dataclass(kw_only=True)
class _Tally:
    """What a look knows of runs, by ids: which are not known to be up to date, and which it brought up to date."""

    behind: set[str]
    updated: set[str] = field(default_factory=set)

    def bring(self, ids: set[str]) -> None:
        self.updated |= ids
        self.behind -= ids

    def over(self, runs: Iterable[tuple[Run, Sequence[int]]]) -> Mirrored:
        """Return what is told at the end of a look at these runs, with the places of their rows."""
        stored = {run.id: len(rows) for run, rows in runs}
        return Mirrored(
            runs=sum(1 for count in stored.values() if count),
            measurements=sum(stored.values()),
            whole=sum(count for name, count in stored.items() if name not in self.behind),
            updated=len(self.updated),
        )


class Mirror:
    """Makes the W&B runs of a results directory what its store says."""

    def __init__(self, job: Job, emit: Emit) -> None:
        self._job, self._emit, self._out = job, emit, Path(job.out)
        self._client = Client(job.tracking)
        self._server = Server(self._client.settings, job.tracking) if job.tracking["mode"] == "online" else None
        self._divisions: dict[str, Division] = {}
        self._planned: Stamp | None = None
        self._seen: Stamp | None = None
        self._held: dict[str, RemoteRun] = {}

    def check(self) -> None:
        """So that a wrong key or an outage is told at once, not when there is something to mirror."""
        if self._server is not None:
            self._server.read(["no-such-run"])

    def look(self, *, last: bool) -> None:
        """Bring W&B up to date with the store.

        Args:
            last: whoever else is at it, and by what W&B itself says that it has; what that is, is told however this
                ends, once the store was read.

        Raises:
            RefusedError: the server refuses the key.
            AwayError: it can't be reached, or has nothing there for this key.
            FileNotFoundError: the results directory is gone, or another one.
            Exception: whatever went wrong; what is missing stays so until the next look.
        """
        if last:
            self._held = {}
        elif self._server is None or self._is_looked_after():
            return  # what is written offline nobody sees before the end
        began = time.monotonic()
        stamp = self._stamp(refresh=last)
        if not last and stamp == self._seen:
            self._touch()
            return
        runs, stored = self._runs()
        tally = _Tally(behind={run.id for run, _ in runs})
        try:
            self._held |= self._read([run.id for run, _ in runs if run.id not in self._held])
            self._touch()  # not before: where W&B didn't answer, another process's key or network may do
            self._update(runs, stored, tally)
            if last and tally.updated and (now := self._stamp(refresh=True)) != stamp:
                # What was written just now may have taken the place of what another process made of newer rows. Once:
                # who goes on measuring looks again later, and what is measured meanwhile is theirs to mirror.
                stamp = now
                again, stored = self._runs()
                self._update([(run, rows) for run, rows in again if run.id in tally.updated], stored, tally)
            self._seen = None if tally.behind else stamp
            self._touch(pause=self.pause(time.monotonic() - began))
        finally:
            if last:
                self._emit(tally.over(runs))

    def _stamp(self, *, refresh: bool) -> Stamp:
        """Return what changes when the store, or what is planned, does.

        Raises:
            FileNotFoundError: the results directory is gone, or another one.
        """
        require_directory(self._out, "manifests")
        if refresh:
            with contextlib.suppress(OSError):  # of who may only read
                Store(out=self._out).look_anew()
        return _stamp([path for part in (*ROWS_IN, "manifests") for path in list_files(self._out / part)])

    def _runs(self) -> tuple[list[tuple[Run, list[int]]], pa.Table]:
        """Return each planned run with the places of its rows, and the rows."""
        self._divide()
        stored = Store(out=self._out).read([*NEEDED, *SHOWN], encoded=True)
        measured = stored.column("measurement").to_pylist()
        found: list[tuple[Run, list[int]]] = []
        for division in self._divisions.values():
            places: list[list[int]] = [[] for _ in division.runs]
            for place, measurement in enumerate(measured):
                number = division.number.get(measurement)
                if number is not None:
                    places[number].append(place)
            found += zip(division.runs, places, strict=True)
        return found, stored

    def _divide(self) -> None:
        """Divide the studies into runs, where somebody planned more since."""
        planned = _stamp(list_files(self._out / "manifests"))
        if planned == self._planned:
            return
        of_study: dict[str, list[Any]] = {}
        for manifest in load_manifests(self._out, self._job.sweep):
            of_study.setdefault(manifest.sweep, []).append(manifest)
        # Not the entity: who names the key's own later means the same runs.
        place = f"{directory_id(self._out)} {self._job.tracking['project']}"
        self._divisions = {sweep: divided(manifests, place) for sweep, manifests in of_study.items()}
        self._planned = planned

    def _read(self, ids: Sequence[str]) -> dict[str, RemoteRun]:
        return self._server.read(ids) if self._server is not None else self._client.read(ids)

    def _update(self, runs: Sequence[tuple[Run, list[int]]], stored: pa.Table, tally: _Tally) -> None:
        """Write the runs that are not up to date, one by one, and take note of it.

        The server's answer to a write need not tell what it has now: where it doesn't, it is asked once, for all.
        """
        behind = [(run, rows, digest) for run, rows in runs if (digest := self._missing(run, rows, stored))]
        tally.behind -= {run.id for run, _ in runs}
        tally.behind |= {run.id for run, _, _ in behind}
        unlike: dict[str, str] = {}
        for number, (run, places, digest) in enumerate(behind, 1):
            rows = _taken(stored, places)
            of_study = self._divisions[run.sweep]
            told = summary(rows, of_study.old, of_study.words) | {DIGEST: digest}
            try:
                self._held[run.id] = self._write(run, told)
                if self._held[run.id].digest == digest:
                    tally.bring({run.id})
                else:
                    unlike[run.id] = digest
            except (RefusedError, AwayError):
                raise
            except Exception as error:  # whatever befalls one run is told, and the others are written
                self._emit(Trouble(reason=_first_line(error)))
            self._emit(Progress(done=number, total=len(behind)))
            self._touch()
        if unlike:
            self._held |= self._read(list(unlike))
            kept = {name for name, digest in unlike.items() if self._held[name].digest == digest}
            tally.bring(kept)
            if lost := unlike.keys() - kept:
                self._emit(Trouble(reason=f"the server did not keep what it was told of {len(lost)} runs"))

    def _missing(self, run: Run, places: Sequence[int], stored: pa.Table) -> str | None:
        """Return the digest of a run's rows where W&B has another one; None where it is up to date."""
        remote = self._held[run.id]
        if not places and remote.state == "missing":
            return None
        rows = _taken(stored.select(NEEDED), places)
        digest = self._divisions[run.sweep].digest((row["row_id"], row["measurement"]) for row in rows)
        return None if (remote.digest, remote.state) == (digest, "finished") else digest

    def _write(self, run: Run, told: Mapping[str, Scalar]) -> RemoteRun:
        if self._server is None:
            return self._client.write(run, _JOB_TYPE, told)
        # A server may add what it is told to what it has: what counts no more is said to be nothing.
        gone = {name for name in self._held[run.id].summary if not name.startswith("_")} - told.keys()
        return self._server.write(run, _JOB_TYPE, {**dict.fromkeys(gone), **told})

    def _is_looked_after(self) -> bool:
        """Tell whether another process looked just now, and W&B answered it, or the next look is not due yet."""
        with contextlib.suppress(FileNotFoundError):
            return -MOST_PAUSE <= clock(self._out) - self._looked.stat().st_mtime < 0.9 * self._job.every
        return False

    def pause(self, took: float) -> float:
        """Return the seconds from the end of a look to the next one, by those that it took."""
        return max(self._job.every, min(MOST_PAUSE, SPACING * took))

    def _touch(self, *, pause: float = 0.0) -> None:
        """Have other processes leave looks to this one for as long as one lasts; after it, for its pause."""
        with contextlib.suppress(OSError):  # of who may only read
            make_inside(self._looked.parent)
            self._looked.touch()
            share_with_group(self._looked)
            if pause > self._job.every:
                due = self._looked.stat().st_mtime + pause - self._job.every  # by the clock that stamps files there
                os.utime(self._looked, (due, due))

    @property
    def _looked(self) -> Path:
        return self._out / "tracking" / f"{self._job.sweep or 'all'}.looked"

    def upload(self, sweep: str, files: Sequence[str]) -> None:
        """Add a version of a study's tables, where they are not those of the last.

        Raises:
            FileNotFoundError: the tables are gone.
            Exception: whatever went wrong; W&B may not have them.
        """
        for file in files:
            Path(file).stat()  # wandb would make the directory again that they were in
        name = f"{sweep}-results"
        if self._server is not None:
            self._server.read([name])  # where it is away this says so at once, and wandb would wait for it
        self._client.upload(sweep, name, files)
        if self._server is not None and self._server.read([name])[name].state != "finished":
            raise OSError(f"the server did not confirm {name}")
        self._emit(Uploaded(sweep=sweep))


def _taken(stored: pa.Table, places: Sequence[int]) -> list[Row]:
    import pyarrow as pa

    rows: list[Row] = stored.take(pa.array(places, pa.int64())).to_pylist()
    return rows


def _stamp(files: Iterable[Path]) -> Stamp:
    """Return what changes when files do."""
    found = []
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # folded just now
            about = path.stat()
            found.append((str(path), about.st_size, about.st_mtime_ns))
    return tuple(found)


def _first_line(error: BaseException) -> str:
    # What our own say of the server, and requests of a connection, is a sentence.
    is_sentence = isinstance(error, OSError) and error.errno is None and bool(str(error))
    return (str(error) if is_sentence else f"{type(error).__name__}: {error}").splitlines()[0][:300]


def _serve(job: Job, ended: threading.Event, emit: Emit) -> None:
    place = Path(str(job.tracking["dir"]))
    if place.is_dir() and is_shared(place):
        # wandb makes directories there by the umask, and others' mirrors make theirs in the same ones.
        os.umask(os.umask(0o077) & ~0o070)
    mirror = Mirror(job, emit)

    def attempt(action: Callable[[], None]) -> None:
        try:
            action()
        except RefusedError:
            raise
        except Exception as error:  # is told, and the next look may do better
            emit(Trouble(reason=_first_line(error)))

    for sweep, files in job.tables.items():
        attempt(partial(mirror.upload, sweep, files))
    if job.tables:
        ended.wait()
        return
    attempt(mirror.check)
    took = 0.0
    while not ended.wait(mirror.pause(took)):
        began = time.monotonic()
        attempt(partial(mirror.look, last=False))
        took = time.monotonic() - began
    attempt(partial(mirror.look, last=True))


def _exit_when_orphaned(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(5)
    time.sleep(LINGER_SECONDS)
    kill_with_children(os.getpid())


def _await_end(lines: Iterable[str], ended: threading.Event) -> None:
    for _ in lines:
        pass
    ended.set()


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a cluster warns every process of a job; the study says when to end
    threading.Thread(target=_exit_when_orphaned, args=(os.getppid(),), daemon=True).start()
    # wandb must neither read the job (a login prompt) nor write between the answers.
    lines, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def emit(said: Answer) -> None:
        with contextlib.suppress(BrokenPipeError):
            answers.write(to_line(said))

    job, ended = Job(**json.loads(next(lines))), threading.Event()
    threading.Thread(target=_await_end, args=(lines, ended), daemon=True).start()
    try:
        _serve(job, ended, emit)
    except RefusedError as error:
        emit(Fatal(reason=str(error)))
        os._exit(0)  # without wandb's exit hooks: there is nothing to upload


if __name__ == "__main__":
    main()
