"""The process that talks to W&B, ``python -m sweeps.tracking.mirror``: the only place that imports wandb.

It is a process of its own so that nothing W&B does (a slow server, an outage, a crash) can block or stop a study. It
looks at the store now and then, and brings W&B up to date; one process at a time does so for a results directory. What
a run already holds is read from its summary on the server (``mirrored``: one token a measurement) before anything is
logged, so that a measurement is one step of its run's history however often, from wherever, it is mirrored. One gap is
left: a server, or this process, that dies within a request of which the history is kept but not the summary, gets the
request's measurements twice. Offline, a run's directory has all of it and takes the place of its earlier ones.

Lines in, JSON: the job (sweeps.tracking.messages), then the seconds that are left for a last look. Lines out: answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final

from sweeps.errors import RefusedError
from sweeps.files import is_shared, list_files
from sweeps.leases import lease, lease_holder
from sweeps.results.table import superseded_measurements
from sweeps.status import State
from sweeps.store.parts import ROWS_IN, Store
from sweeps.store.schema import Row
from sweeps.study.manifest import load_manifests
from sweeps.tracking.messages import Answer, Fatal, Job, Mirrored, Progress, Trouble, Uploaded, to_line
from sweeps.tracking.process import kill_with_children
from sweeps.tracking.runs import MirroredRun, divided, row_columns, settled, steps
from sweeps.tracking.server import RemoteRun, Server

TRANSMIT_SECONDS: Final = 5.0
OPEN_RUNS: Final = 4
"""Runs that are brought up to date at the same time: nearly all of it is waiting for the server."""
LINGER_SECONDS: Final = 60.0
"""How long this process may outlive a study that was killed, to finish its uploads."""
SPACING: Final = 3.0
"""Between two looks there are at least so many times the seconds that the last one took."""
LEASE_SECONDS: Final = 60.0
"""A last look waits so long for another process that mirrors the same directory."""
_NOTE: Final = "mirrored.json"
"""In a directory of wandb's that is written offline: what ``RemoteRun`` is for a server."""

Emit = Callable[[Answer], None]


class Ending:
    """When the study ends, and until when another run may be begun; told by a thread that reads the input."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.told = threading.Event()
        self.until = float("inf")
        threading.Thread(target=self._listen, args=(lines,), daemon=True).start()

    def _listen(self, lines: Iterable[str]) -> None:
        seconds = LINGER_SECONDS  # of a study that was killed
        for line in lines:
            seconds = float(line)
        self.until = time.monotonic() + 0.8 * seconds
        self.told.set()

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.until


class Mirror:
    """Brings the W&B runs of a results directory up to date."""

    def __init__(self, job: Job, emit: Emit, ending: Ending) -> None:
        import wandb

        self._wandb: Any = wandb
        self._job, self._emit, self._ending = job, emit, ending
        self._config, self._out = job.tracking, Path(job.out)
        self._seen: object = None
        self._whole_then = Mirrored(runs=0, measurements=0, whole=0, added=0)
        self._held: dict[str, RemoteRun] = {}
        root = Path(str(self._config["dir"]))
        self._dir = root if root.name == "wandb" else root / "wandb"
        settings: dict[str, Any] = {"root_dir": str(self._dir.parent), "base_url": self._config["base_url"]}
        settings |= dict.fromkeys(("silent", "disable_code", "disable_git", "x_disable_stats", "x_disable_meta"), True)
        settings |= {"console": "off", "init_timeout": 30.0, "x_file_stream_transmit_interval": TRANSMIT_SECONDS}
        settings |= {"x_disable_machine_info": True, "x_save_requirements": False}
        self._settings = wandb.Settings(**{k: v for k, v in settings.items() if v is not None})
        known = wandb.setup(self._settings).settings
        self._server = Server(known, self._config) if self._config["mode"] == "online" else None

    def check(self) -> None:
        """So that a wrong key or an outage is told at once, not after the first measurement."""
        if self._server is not None:
            self._server.read(["no-such-run"])

    def look(self, *, last: bool) -> None:
        """Bring W&B up to date with the store, if nobody else is at it.

        Args:
            last: wait for who is at it.

        Raises:
            RefusedError: the server refuses the key.
            Exception: whatever went wrong; what is missing stays so until the next look.
        """
        until = min(self._ending.until, time.monotonic() + LEASE_SECONDS)
        place = self._out / "tracking"
        while True:
            with lease(place) as held:
                if held is not None:
                    with _touched(held):
                        self._bring_up()
                    return
            if not last:
                return
            if time.monotonic() > until:
                holder = lease_holder(place)
                raise OSError(f"process {holder.get('pid')} on {holder.get('host')} mirrors {self._out} now")
            time.sleep(0.5)

    def _bring_up(self) -> None:
        seen = self._state_of_store()
        if seen == self._seen:
            self._emit(self._whole_then)
            return
        runs = self._runs()
        # What others added since is not known here; what was there stays.
        behind = [run for run in runs if not _is_whole(run, self._held.get(run.id, RemoteRun()))]
        self._held |= self._read(behind)
        behind = [run for run in behind if not _is_whole(run, self._held[run.id])]
        added = 0
        with ThreadPoolExecutor(OPEN_RUNS) as pool:
            try:
                for number, new in enumerate(pool.map(self._mirror, behind), len(runs) - len(behind) + 1):
                    added += new
                    self._emit(Progress(done=number, total=len(runs)))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # where one fails the server is away, and each would wait for it
                raise
        whole = self._whole(runs, behind)
        measurements = sum(len(run.rows) for run in runs)
        self._emit(Mirrored(runs=len(runs), measurements=measurements, whole=whole, added=added))
        if whole == measurements:
            self._seen = seen
            self._whole_then = Mirrored(runs=len(runs), measurements=measurements, whole=whole, added=0)

    def _state_of_store(self) -> object:
        """Return what changes when the store, or what a study plans, does."""
        files = [path for part in (*ROWS_IN, "manifests") for path in list_files(self._out / part)]
        try:
            return [(path.name, (about := path.stat()).st_size, about.st_mtime_ns) for path in files]
        except FileNotFoundError:  # folded just now
            return object()

    def _runs(self) -> list[MirroredRun]:
        asked = self._config["by"]
        superseded = superseded_measurements(self._out)
        by_study: dict[str, list[Row]] = {}
        for row in Store(out=self._out).read(row_columns()).to_pylist():
            if self._job.sweep in (None, row["sweep"]):
                row |= {"metrics": dict(row["metrics"] or ()), "stderr": dict(row["stderr"] or ())}
                if row["measurement"] in superseded:
                    row["status"] = State.SUPERSEDED.value
                by_study.setdefault(row["sweep"], []).append(row)
        runs = []
        for sweep, rows in by_study.items():
            planned = (cell.axes() for manifest in load_manifests(self._out, sweep) for cell in manifest.cells)
            by = settled(self._out, sweep, list(asked) if asked else None, chain(planned, rows))
            runs += divided(sweep, rows, by)
        return runs

    def _read(self, runs: list[MirroredRun]) -> dict[str, RemoteRun]:
        if self._server is not None:
            return self._server.read([run.id for run in runs])
        notes = {run.id: sorted(self._dir.glob(f"offline-run-*-{run.id}/{_NOTE}")) for run in runs}
        return {
            name: RemoteRun.from_summary("finished", json.loads(of[-1].read_text())) if of else RemoteRun()
            for name, of in notes.items()
        }

    def _mirror(self, run: MirroredRun) -> int:
        """Log what isn't logged yet, while there is time; return how many measurements that is."""
        if self._ending.is_over:
            return 0
        remote = self._held[run.id]
        missing = [t for t in run.rows if self._server is None or t not in remote.mirrored]
        about: Any = {
            "id": run.id,
            "name": run.name,
            "group": run.sweep,
            "job_type": "cells",
            "config": dict(run.config),
        }
        there = self._init(**about)
        # A curve over sizes, as far as its cells are of several; its last cell says nothing about the others.
        there.define_metric("total_bits", summary="none")
        there.define_metric("*", step_metric="total_bits", summary="none")
        # Explicit, because a server that keeps no line count resumes at step 0. The larger is right on either.
        first = max(there.step, remote.steps if self._server else 0)
        made = steps(run.rows[t] for t in missing)
        for number, step in enumerate(made):
            there.log(step, step=first + number, commit=True)
        mirrored = tuple(dict.fromkeys([*(remote.mirrored if self._server else ()), *missing]))
        held = RemoteRun(state="finished", mirrored=mirrored, counts=run.counts, steps=first + len(made))
        there.summary.update(run.summary() | held.to_summary())
        there.finish()  # also returns when wandb gave up
        if self._server is None:
            self._replace(Path(there.dir).parent, run.id, held)
        return len(set(missing) - set(remote.mirrored))

    def _replace(self, written: Path, name: str, held: RemoteRun) -> None:
        """Remove what was written of a run offline before: the server would replace one by the other, or add them."""
        (written / _NOTE).write_text(json.dumps(held.to_summary()))
        for directory in self._dir.glob(f"offline-run-*-{name}"):
            if directory != written:
                shutil.rmtree(directory, ignore_errors=True)

    def _whole(self, runs: list[MirroredRun], touched: list[MirroredRun]) -> int:
        """Count the measurements that W&B holds, as read back from it."""
        for wait in (0.0, 1.0, 3.0):
            time.sleep(wait)
            self._held |= self._read(touched)
            touched = [run for run in touched if not _is_whole(run, self._held[run.id])]
            if not touched or self._ending.is_over:
                break
        return sum(len(run.rows.keys() & set(self._held[run.id].mirrored)) for run in runs)

    def upload(self, sweep: str, files: Iterable[str]) -> None:
        """Add a version of a study's tables, where they are not those of the last."""
        name = f"{sweep}-results"
        if self._server:
            self._server.read([name])  # where it is away this says so at once, and wandb would wait for it
        run = self._init(id=name, name=name, group=sweep, job_type="results", config={"sweep": sweep})
        artifact = self._wandb.Artifact(name, type="results", description=f"Tables of {sweep}")
        for file in files:
            artifact.add_file(file, policy="immutable")  # without a copy in the user's home
        run.log_artifact(artifact)
        run.finish()  # returns when the files are uploaded, or wandb gave up
        if self._server and self._server.read([name])[name].state != "finished":
            raise OSError(f"the server did not confirm {name}")
        self._emit(Uploaded(sweep=sweep))

    def _init(self, **about: Any) -> Any:
        """Open a run, or take it up again."""
        return self._wandb.init(
            **about,
            project=self._config["project"],
            entity=self._config["entity"],
            mode=self._config["mode"],
            resume="allow" if self._server else None,
            reinit="create_new",
            allow_val_change=True,
            settings=self._settings,
        )


def _is_whole(run: MirroredRun, remote: RemoteRun) -> bool:
    return remote.state == "finished" and run.counts == remote.counts and run.rows.keys() <= set(remote.mirrored)


@contextlib.contextmanager
def _touched(lease: Path) -> Iterator[None]:
    """Keep a lease alive: the server may be away for longer than a silent process is taken for alive."""
    done = threading.Event()

    def touch() -> None:
        while not done.wait(60.0):
            with contextlib.suppress(OSError):
                os.utime(lease)

    threading.Thread(target=touch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _attempt(action: Callable[[], None], emit: Emit) -> None:
    try:
        action()
    except RefusedError:
        raise
    except Exception as error:  # whatever it is, it is told, and the mirror goes on
        emit(Trouble(reason=f"{type(error).__name__}: {error}".splitlines()[0][:300]))


def _serve(lines: Iterable[str], emit: Emit) -> None:
    stream = iter(lines)
    job = Job(**json.loads(next(stream)))
    if is_shared(Path(str(job.tracking["dir"]))):
        # wandb makes directories there by the umask, and others' mirrors make theirs in the same ones.
        os.umask(os.umask(0o077) & ~0o070)
    ending = Ending(stream)
    mirror = Mirror(job, emit, ending)
    for sweep, files in job.tables.items():
        _attempt(partial(mirror.upload, sweep, files), emit)
    if job.tables:
        return
    if job.every is None:
        _attempt(partial(mirror.look, last=True), emit)
        return
    _attempt(mirror.check, emit)
    wait = job.every
    while not ending.told.wait(wait):
        began = time.monotonic()
        _attempt(partial(mirror.look, last=False), emit)
        wait = max(job.every, SPACING * (time.monotonic() - began))
    _attempt(partial(mirror.look, last=True), emit)


def _exit_when_orphaned(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(5)
    time.sleep(LINGER_SECONDS)
    kill_with_children(os.getpid())


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a cluster warns every process of a job; the study says when to end
    threading.Thread(target=_exit_when_orphaned, args=(os.getppid(),), daemon=True).start()
    # wandb must neither read the messages (a login prompt) nor write between the answers.
    lines, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def emit(said: Answer) -> None:
        with contextlib.suppress(BrokenPipeError):
            answers.write(to_line(said))

    try:
        _serve(lines, emit)
    except RefusedError as error:
        emit(Fatal(reason=str(error)))
        os._exit(0)  # without wandb's exit hooks: there is nothing to upload


if __name__ == "__main__":
    main()
