"""SHA-256 of files. Those of large files are remembered, since hashing a model takes longer than planning a study."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

Progress = Callable[[Path, int, int], None]
"""Called with the file, the bytes hashed so far and the bytes in all."""

REMEMBERED_BYTES: Final = 16 << 20
"""Files at least this large are remembered."""
_SETTLED_SECONDS: Final = 2.0
_CHUNK: Final = 1 << 22
_SAMPLES: Final = 16
_SAMPLE_BYTES: Final = 4096
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def file_hash(path: str | Path, *, progress: Progress | None = None) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits.

    A large file's is read from the user's cache (XDG_CACHE_HOME) where path, inode, size, times and samples of its
    bytes are those that it had.

    Raises:
        OSError: the file can't be read.
    """
    path = Path(path).resolve()
    stat = path.stat()
    if stat.st_size < REMEMBERED_BYTES:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    # The time of change too: copying tools preserve modification times, and equal architectures have equal sizes.
    # Images of file systems and some network file systems have no true times at all, hence the samples.
    identity = f"{path}\0{stat.st_ino}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\0"
    identity += _samples(path, stat.st_size)
    entry = _cache_dir() / hashlib.sha256(identity.encode()).hexdigest()
    known = _read(entry)
    if known is not None:
        return known
    digest = _hash(path, stat.st_size, progress)
    after = path.stat()
    unchanged = (after.st_size, after.st_mtime_ns, after.st_ctime_ns) == (
        stat.st_size,
        stat.st_mtime_ns,
        stat.st_ctime_ns,
    )
    # A file changed a moment ago may change again within its clock's tick.
    if unchanged and time.time() - stat.st_ctime > _SETTLED_SECONDS:
        _write(entry, digest)
    return digest


def tree_hash(files: Mapping[str, bytes]) -> str:
    """SHA-256 over several files' names and contents, in the order of their names."""
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def _samples(path: Path, size: int) -> str:
    """Hash a few pieces of a file, spread over it."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for number in range(_SAMPLES):
            stream.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _hash(path: Path, size: int, progress: Progress | None) -> str:
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(path, done, size)
    return digest.hexdigest()


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kbit-sweep" / "sha256"


def _read(entry: Path) -> str | None:
    try:
        text = entry.read_text()
    except OSError:
        return None
    return text if _DIGEST.fullmatch(text) else None


def _write(entry: Path, digest: str) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=entry.parent, delete=False) as stream:
            stream.write(digest)
        Path(stream.name).replace(entry)
    except OSError as error:
        # Only speed is lost.
        log.debug("can't remember a file's hash in %s: %s", entry.parent, error)
