"""The process that talks to W&B, ``python -m sweeps.tracking.mirror``: the only place that imports wandb.

It is a process of its own so that nothing W&B does (a slow server, an outage, a crash) can block or stop a study.
What a run already holds is read from its summary on the server (``mirrored``: one token a measurement) before
anything is logged, so logging is idempotent: however often a measurement is sent, live or from the store, it is one
step of its run's history. One gap is left: a server that dies within a request, having kept its history but not its
summary, gets the request's measurements twice.

Lines in, JSON: the configuration, then messages (sweeps.tracking.messages); the end of input finishes all runs. Lines
out: answers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

from kbit.spec import axes
from sweeps.errors import RefusedError
from sweeps.files import is_shared
from sweeps.status import State
from sweeps.store.schema import Row, Scalar
from sweeps.tracking.messages import (
    Answer,
    Artifact,
    Fatal,
    Finish,
    Finished,
    Log,
    Message,
    Start,
    Trouble,
    message,
    to_line,
)
from sweeps.tracking.process import kill_with_children
from sweeps.tracking.server import STATUSES, RemoteRun, Server

IDENTITY: Final = ("family", "model", "params")
"""A row's columns that are constant in a pack: the run's configuration, and in its table, which W&B joins over runs."""
RETRY_SECONDS: Final = 30.0
"""Least time between two tries to open a run while the server can't be reached."""
TRANSMIT_SECONDS: Final = 5.0
LINGER_SECONDS: Final = 60.0
"""How long this process may outlive a study that was killed, to finish its uploads."""


Emit = Callable[[Answer], None]


@cache
def mirrored_columns() -> tuple[str, ...]:
    """Return a row's columns that become columns of the run's history."""
    return (
        *("key", "measurement", "status", "eval", "method", *axes(), "label", "calibration", "calibration_seed"),
        *(
            "checkpoint",
            "tokens_seen",
            "bits_per_param",
            "bits_per_param_nominal",
            "total_bits",
            "total_bits_nominal",
            "seconds",
        ),
        *("peak_memory_bytes", "error_type"),
    )


def token(row: Row) -> str:
    """12 hex digits that stand for a measurement and its outcome: measured again with other numbers, it is another one.

    Numbers enter with 6 digits, so that a row counts the same before and after it went through the store.
    """
    metrics = {k: f"{float(v):.6g}" for k, v in row["metrics"].items() if v is not None}
    text = json.dumps([row["measurement"], row["status"], sorted(metrics.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def history_row(row: Row) -> dict[str, Scalar]:
    """Return a measurement as one step of a run: the cell's axes, '{eval}/{metric}' and '{eval}/{metric}_stderr'.

    One that is superseded has no numbers: its step says so of the one that may stand before it.
    """
    step = {k: row[k] for k in mirrored_columns() if row.get(k) is not None}
    if _is_superseded(row):
        return step
    for suffix, values in (("", row["metrics"]), ("_stderr", row["stderr"])):
        step |= {f"{row['eval']}/{k}{suffix}": v for k, v in values.items() if v is not None}
    return step


@dataclass(kw_only=True)
class _Pack:
    id: str
    sweep: str
    name: str
    config: Mapping[str, Scalar]
    whole: bool
    rows: dict[str, Row] = field(default_factory=dict)
    run: Any = None
    mirrored: dict[str, None] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    added: int = 0
    tried: float = float("-inf")

    def summary(self) -> dict[str, Scalar]:
        counts = {status: self.counts[status] for status in STATUSES}
        return {**counts, "measurements": sum(counts.values()), "mirrored": " ".join(self.mirrored)}


class Mirror:
    """Several W&B runs in one process, one per pack. A pack that is ``whole`` has all its rows sent from the store."""

    def __init__(self, config: Mapping[str, str | None], emit: Emit) -> None:
        import wandb

        self._wandb: Any = wandb
        self._config, self._emit = config, emit
        self._packs: dict[str, _Pack] = {}
        root = Path(str(config["dir"]))
        # wandb adds a folder 'wandb' of its own.
        root_dir = str(root.parent if root.name == "wandb" else root)
        settings: dict[str, Any] = {"root_dir": root_dir, "base_url": config["base_url"]}
        settings |= dict.fromkeys(("silent", "disable_code", "disable_git", "x_disable_stats", "x_disable_meta"), True)
        settings |= {"console": "off", "init_timeout": 30.0, "x_file_stream_transmit_interval": TRANSMIT_SECONDS}
        settings |= {"x_disable_machine_info": True, "x_save_requirements": False}
        self._settings = wandb.Settings(**{k: v for k, v in settings.items() if v is not None})
        known = wandb.setup(self._settings).settings
        self._server = Server(known, config) if config["mode"] == "online" else None

    def check(self) -> None:
        """So that a wrong key or an outage is told at once, not after the first measurement."""
        if self._server is not None:
            self._server.read("no-such-run")

    def handle(self, message: Message) -> None:
        """Do what a message says; see the module.

        Raises:
            RefusedError: the server refuses the key.
            Exception: whatever went wrong with this pack's run; its rows are kept for the next try.
        """
        match message:
            case Start():
                pack = _Pack(
                    id=message.pack,
                    sweep=message.sweep,
                    name=message.name,
                    config=message.config,
                    whole=message.whole,
                )
                self._advance(self._packs.setdefault(pack.id, pack))
            case Log(row=row):
                pack = self._packs[message.pack]
                pack.rows[token(row)] = row
                self._advance(pack)
            case Finish():
                self._finish(self._packs.pop(message.pack))
            case Artifact():
                self._upload(message)

    def finish_all(self) -> None:
        for pack in list(self._packs):
            _attempt(partial(self.handle, Finish(pack=pack)), self._emit)

    def _advance(self, pack: _Pack, *, last: bool = False) -> None:
        """Log what isn't logged yet, after opening the run if need be."""
        if pack.whole and not last:
            return  # whether the run must be opened at all is known when all rows have come
        if pack.run is None:
            if not last and time.monotonic() - pack.tried < RETRY_SECONDS:
                return
            try:
                self._open(pack)
            finally:
                pack.tried = time.monotonic()
        missing = [t for t in pack.rows if t not in pack.mirrored]
        for t in missing:
            # Explicit, because a server that keeps no line count resumes at step 0. The larger is right on either.
            step = max(pack.run.step, len(pack.mirrored))
            pack.run.log(history_row(pack.rows[t]), step=step, commit=True)
            pack.mirrored[t] = None
            pack.counts[pack.rows[t]["status"]] += 1
            pack.added += 1
        if missing:
            pack.run.summary.update(pack.summary())

    def _upload(self, message: Artifact) -> None:
        name = f"{message.sweep}-results"
        if self._server:
            self._server.read(name)  # where it is away this says so at once, and wandb would wait for it
        run = self._init(id=name, name=name, group=message.sweep, job_type="results", config={"sweep": message.sweep})
        artifact = self._wandb.Artifact(name, type="results", description=f"Tables of {message.sweep}")
        for file in message.files:
            artifact.add_file(file, policy="immutable")  # without a copy in the user's home
        run.log_artifact(artifact)
        run.finish()  # returns when the files are uploaded, or wandb gave up
        if self._server and self._server.read(name).state != "finished":
            raise OSError(f"the server did not confirm {name}")
        self._emit(Finished(pack=name, mirrored=len(message.files), added=len(message.files)))

    def _open(self, pack: _Pack) -> None:
        remote = self._server.read(pack.id) if self._server else RemoteRun()
        about = {"sweep": pack.sweep, **pack.config}
        pack.run = self._init(id=pack.id, name=pack.name, group=pack.sweep, job_type="pack", config=about)
        pack.run.define_metric("*", summary="none")  # a pack's last cell says nothing about the pack
        pack.mirrored, pack.counts = dict.fromkeys(remote.mirrored), Counter(remote.counts)

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

    def _finish(self, pack: _Pack) -> None:
        if pack.whole and self._server and _is_whole(pack, self._server.read(pack.id)):
            self._emit(Finished(pack=pack.id, mirrored=len(pack.rows), added=0))
            return
        self._advance(pack, last=True)
        if pack.whole:
            pack.counts = Counter(row["status"] for row in pack.rows.values())
        pack.run.summary.update(pack.summary())
        if pack.rows and (pack.whole or len(pack.rows) == len(pack.mirrored)):
            # A table is an artifact, which asks the server at once; an outage must not keep the run from its end.
            _attempt(partial(self._add_table, pack), self._emit)
        pack.run.finish()
        self._emit(Finished(pack=pack.id, mirrored=self._confirmed(pack), added=pack.added))

    def _confirmed(self, pack: _Pack) -> int:
        """Count the pack's rows that the server holds: run.finish() also returns when wandb gave up an upload."""
        if self._server is None:
            return len(pack.rows)
        held = 0
        for wait in (0.0, 1.0, 3.0):
            time.sleep(wait)
            held = len(pack.rows.keys() & set(self._server.read(pack.id).mirrored))
            if held == len(pack.rows):
                break
        return held

    def _add_table(self, pack: _Pack) -> None:
        current = [row for row in pack.rows.values() if not _is_superseded(row)]
        rows = [{k: row.get(k) for k in IDENTITY} | history_row(row) for row in current]
        columns = list(dict.fromkeys(k for row in rows for k in row))
        data = [[row.get(c) for c in columns] for row in rows]
        pack.run.summary["table"] = self._wandb.Table(columns=columns, data=data, allow_mixed_types=True)


def _is_superseded(row: Row) -> bool:
    return bool(row["status"] == State.SUPERSEDED.value)


def _is_whole(pack: _Pack, remote: RemoteRun) -> bool:
    counts = Counter(row["status"] for row in pack.rows.values())
    same = all(counts[status] == remote.counts.get(status, 0) for status in STATUSES)
    return remote.state == "finished" and same and pack.rows.keys() <= set(remote.mirrored)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _attempt(action: Callable[[], None], emit: Emit) -> None:
    try:
        action()
    except RefusedError:
        raise
    except Exception as error:  # whatever befalls one run is told, and the other runs go on
        emit(Trouble(reason=_first_line(error)))


def _serve(lines: Iterable[str], emit: Emit) -> None:
    stream = iter(lines)
    config = json.loads(next(stream))
    if is_shared(Path(str(config["dir"]))):
        # wandb makes directories there by the umask, and others' mirrors make theirs in the same ones.
        os.umask(os.umask(0o077) & ~0o070)
    mirror = Mirror(config, emit)
    _attempt(mirror.check, emit)
    for line in stream:
        _attempt(partial(mirror.handle, message(line)), emit)
    mirror.finish_all()


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
