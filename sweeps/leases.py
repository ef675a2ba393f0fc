"""Leases: what one process at a time does for a directory, and files that are taken from a process that is gone."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sweeps.errors import StoreError
from sweeps.files import JsonObject, create_exclusively, make_directory, read_json, store_time
from sweeps.processes import is_running, this_machine, this_process

SILENT_SECONDS: Final = 900.0
"""A process on another machine whose file did not change for so long may be dead, and the file is taken from it. No
network file system shows an old name for so long, so it finds out if it lives."""
_LEASE: Final = ".lease"


def is_gone(process: JsonObject, path: Path, now: float) -> bool:
    """Tell whether the process that keeps a file is dead, or silent for so long that it may be.

    Args:
        process: what ``this_process`` returned there.
        path: the file, which it changes now and then.
        now: the time by the file's clock.
    """
    runs = is_running(process) if process else None
    return now - path.stat().st_mtime > SILENT_SECONDS if runs is None else not runs


@contextlib.contextmanager
def lease(directory: Path) -> Iterator[Path | None]:
    """Hold the lease of a directory, a file, which the holder touches now and then; None where another process has it.

    It saves work and is no lock: what it guards must stay right where two hold it.
    """
    make_directory(directory)
    path = directory / _LEASE
    mine = {**this_process(), "id": uuid.uuid4().hex}
    is_held = False
    with contextlib.suppress(FileNotFoundError):  # given back just now
        is_held = bool(other := lease_holder(directory)) and not is_gone(other, path, store_time(directory))
    if is_held:
        yield None
        return
    path.unlink(missing_ok=True)
    if not create_exclusively(path, json.dumps(mine).encode()):
        yield None
        return
    try:
        yield path
    finally:
        if lease_holder(directory) == mine:
            path.unlink(missing_ok=True)


def lease_holder(directory: Path) -> JsonObject:
    """Return the process that has a directory's lease; nothing where there is none, or nobody can tell."""
    try:
        found: JsonObject = read_json(directory / _LEASE)
    except (FileNotFoundError, StoreError):
        return {}
    return found


def end_lease(directory: Path, pid: int) -> None:
    """Give back the lease that a process of this machine had that was killed: another machine could not tell."""
    holder = lease_holder(directory)
    if (holder.get("machine"), holder.get("pid")) == (this_machine(), pid):
        (directory / _LEASE).unlink(missing_ok=True)
