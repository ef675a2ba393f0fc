"""Files of a results directory: read whole, written atomically, created exclusively, shared by a group; their clock.

A file system may fail once and then do well (a server that starts again, a quota that is raised): what can be done
again is, a few times.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import os
import stat
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, Final, TypeAlias, TypeVar

from sweeps.errors import LinkError, StoreError

JsonObject: TypeAlias = Mapping[str, Any]
"""What a JSON object was read as, before its values become types."""
PASSING: Final = frozenset({errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.ETIMEDOUT, errno.EREMOTEIO})
"""What a file system may say now and no more in a moment."""
PAUSES: Final = (0.05, 0.2, 1.0)
"""Seconds before it is tried again."""
_Result = TypeVar("_Result")


def patiently(action: Callable[[], _Result]) -> _Result:
    """Do what can be done again, again where it failed for a reason that may pass; return what it returns.

    Raises:
        OSError: the last one, or one that doesn't pass.
    """
    for pause in PAUSES:
        try:
            return action()
        except OSError as error:
            if error.errno not in PASSING:
                raise
        time.sleep(pause)
    return action()


def read_json(path: Path) -> Any:
    """Read a JSON file of the store.

    Raises:
        StoreError: it is damaged; the store writes whole files, so something else did that.
    """
    try:
        return json.loads(patiently(path.read_text))
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}): restore it, or move it out of the results directory") from error


def list_files(directory: Path, pattern: str = "*") -> list[Path]:
    """Return what a directory of the store holds under names that fit a pattern, sorted; nothing where it isn't there.

    Files that are being written (their names begin with a dot) are left out.

    Raises:
        PermissionError: it can't be listed: who may not look into it must not take it for empty.
        OSError: nor can it be for another reason, e.g. a stale mount.
    """
    try:
        found = list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(p for p in found if fnmatch.fnmatch(p.name, pattern) and not p.name.startswith("."))


def is_shared(directory: Path) -> bool:
    """Tell whether a directory is shared by a group: setgid, so that new files are the group's, and group-writable."""
    mode = directory.stat().st_mode
    return bool(mode & stat.S_ISGID) and bool(mode & stat.S_IWGRP)


def share_with_group(*paths: Path) -> None:
    """Give the group its owner's rights to what lies in a directory that a group shares, whatever the umask."""
    for path in paths:
        # What isn't ours, or is on a file system without modes, stays as it is: it may be readable all the same.
        with contextlib.suppress(OSError):
            if is_shared(path.parent):
                mode = stat.S_IMODE(path.stat().st_mode)
                path.chmod(mode | (mode & stat.S_IRWXU) >> 3)


def make_directory(path: Path) -> None:
    """Make a directory and those above it, where missing, on disk when this returns; a group that shares the place
    shares them.
    """
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    patiently(lambda: path.mkdir(parents=True, exist_ok=True))
    share_with_group(*reversed(missing))
    for directory in reversed(missing):
        # Without its name there, all that is in it is lost with the power. Who may not list a place can't flush it.
        with contextlib.suppress(PermissionError):
            patiently(partial(sync_directory, directory.parent))


def make_inside(path: Path) -> None:
    """Make a directory, where missing, in one that is there: one that is gone, e.g. renamed, is not made again.

    Raises:
        OSError: the one above it is gone, or can't be written.
    """
    if not path.is_dir():
        patiently(lambda: path.mkdir(exist_ok=True))
        share_with_group(path)
        with contextlib.suppress(PermissionError):
            patiently(partial(sync_directory, path.parent))


def require_directory(out: Path, witness: str = "") -> None:
    """Refuse to recreate a results directory that existed when the work began, or to take another one for it.

    Args:
        out: the directory.
        witness: a file in it, relative to it, that was there when the work began; '' is any directory.

    Raises:
        FileNotFoundError: it was renamed, removed or unmounted, or is a link that leads elsewhere now.
    """
    if not out.is_dir():
        why = "it is gone: was it renamed, or its file system unmounted? It is not recreated for results"
        raise FileNotFoundError(errno.ENOENT, why, str(out))
    if not (out / witness).exists():
        why = f"it has no {witness}, so it is not the directory in which this work began: does a link lead elsewhere?"
        raise FileNotFoundError(errno.ENOENT, f"{why} No results are written into it", str(out))


def open_log(path: Path) -> IO[bytes]:
    """Open a log to append to it; its directory is made, and a group that shares the place shares it."""
    make_directory(path.parent)
    file = path.open("ab")
    share_with_group(path)
    return file


def write_atomically(path: Path, data: bytes, *, modified: float | None = None, lasting: bool = True) -> None:
    """Write ``data`` so that ``path`` is whole or absent, whatever happens, and on disk when this returns.

    Args:
        path: the file.
        data: what it holds.
        modified: its time in epoch seconds; None is now.
        lasting: else a loss of power may bring back what was there before, at half of the cost: for what is told again
            and again.
    """

    def write() -> None:
        _write(path, data, modified)
        if lasting:
            sync_directory(path.parent)

    make_directory(path.parent)
    # All of it again: that a flush failed is told once, and the next one may say yes to what is not on disk.
    patiently(write)


def _write(path: Path, data: bytes, modified: float | None) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        share_with_group(temporary)
        if modified is not None:
            os.utime(temporary, (modified, modified))
        temporary.replace(path)
    except BaseException:
        _remove(temporary)
        raise


def _remove(temporary: Path) -> None:
    """Remove a file that nobody misses or minds."""
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Have the names of a directory's files on disk.

    Raises:
        OSError: it is unknown whether they are; what made the names is to be done again.
    """
    directory = os.open(path, os.O_RDONLY)
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
    write_atomically(temporary, data, lasting=False)
    try:
        patiently(lambda: os.link(temporary, path))
    except FileExistsError:
        # A network file system may repeat a link that had succeeded; then the file is ours, with two names.
        if temporary.stat().st_nlink != 2:
            return False
    except OSError as error:
        raise LinkError(error.errno, error.strerror, str(path)) from error
    finally:
        _remove(temporary)
    patiently(lambda: sync_directory(path.parent))
    return True


def store_time(directory: Path) -> float:
    """Return now in epoch seconds, by the clock that stamps the files of ``directory``: machines' own clocks differ.

    Raises:
        OSError: the directory isn't there or can't be written.
    """
    probe = directory / f".clock-{uuid.uuid4().hex}.tmp"
    try:
        patiently(probe.touch)
        return probe.stat().st_mtime
    finally:
        _remove(probe)


def look_anew(directory: Path) -> None:
    """Have the next listing of a directory show what others changed in it until now, where this user may write there.

    A network file system shows a directory as it was up to a minute ago, until this machine itself changes it.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        store_time(directory)


def clock(directory: Path) -> float:
    """Return ``store_time``, or this machine's own time where the directory can't be written.

    What decides something is told by one clock. Who may only read has nothing better than the machine's.
    """
    try:
        return store_time(directory)
    except OSError:
        return time.time()


def not_allowed(error: OSError, out: Path, path: Path | None = None) -> str | None:
    """Return whose a file is that this user may not use, its mode and what its owner can do; None for another error.

    Args:
        error: what the system said.
        out: the results directory.
        path: the file, where the error doesn't name it.
    """
    path = path or (Path(os.fsdecode(error.filename)) if error.filename else None)
    if path is None or error.errno not in (errno.EACCES, errno.EPERM):
        return None
    # A directory that may not be looked into keeps to itself whose its files are.
    known = next((p for p in (path, *path.parents) if os.access(p, os.F_OK)), Path("/"))
    about = known.stat()
    mode = stat.filemode(about.st_mode)
    if about.st_uid == os.geteuid():
        is_closed = not about.st_mode & stat.S_IRUSR or (
            stat.S_ISDIR(about.st_mode) and not about.st_mode & stat.S_IXUSR
        )
        return f"{path}: {error.strerror}. {known} is your own ({mode}): chmod -R u+rwX {out}" if is_closed else None
    try:
        owner = known.owner()
    except KeyError:
        owner = str(about.st_uid)
    return (
        f"{path}: {error.strerror or error}. {known} belongs to {owner} ({mode}), who shares a results directory with "
        f"its group by chmod -R g+rwX {out} and find {out} -type d -exec chmod g+s {{}} +"
    )
