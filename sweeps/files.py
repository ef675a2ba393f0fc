"""Files of a results directory: read whole, written atomically, created exclusively; and the clock that stamps them."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from sweeps.errors import LinkError, StoreError


def read_json(path: Path) -> Any:
    """Read a JSON file of the store.

    Raises:
        StoreError: it is damaged; the store writes whole files, so something else did that.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}): restore it, or move it out of the results directory") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` is whole or absent, whatever happens, and on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def create_exclusively(path: Path, data: bytes) -> bool:
    """Create ``path`` with ``data``, unless it exists; of all who try, on whatever machine, exactly one is told True.

    Raises:
        LinkError: the file system can't make hard links, which exclude the others.
        OSError: it can't be written.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    write_atomically(temporary, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        # A network file system may repeat a link that had succeeded; then the file is ours, with two names.
        return temporary.stat().st_nlink == 2
    except OSError as error:
        raise LinkError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return True


def store_time(directory: Path) -> float:
    """Return now in epoch seconds, by the clock that stamps the files of ``directory``: machines' own clocks differ.

    Raises:
        OSError: the directory isn't there or can't be written.
    """
    probe = directory / f".clock-{uuid.uuid4().hex}.tmp"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
