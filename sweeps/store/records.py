"""Records: measurements that are not folded yet, each appended to its writer's file. Two flushes to disk begin a file,
one stores a measurement.

    OUT/parts/NAME.rows    who writes it, then a record for each measurement, at last that the writer has ended
    OUT/parts/NAME.taken   the same of a writer that died or is silent: taken from it, to be folded

A record is a mark, its length and a checksum, then JSON of the columns that are not null and the samples' bytes,
compressed. What a crash leaves behind the last whole record was never acknowledged, and is nothing. A writer looks
after each record whether its file still has its name. Where it does, whoever takes the file later reads that record
too; where it doesn't, the record may have come too late, and is written again into a new file: readers know a row by
its id.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sweeps.files import JsonObject, make_directory, share_with_group, sync_directory
from sweeps.processes import this_process
from sweeps.store.samples import EncodedSample
from sweeps.store.schema import SCHEMA_VERSION, Row

if TYPE_CHECKING:
    import pyarrow as pa

OPEN: Final = ".rows"
TAKEN: Final = ".taken"
ROTATE_BYTES: Final = 4 << 20
"""A file that is larger is ended, so that it can be folded while its writer goes on."""
_HEADER: Final = struct.Struct("<4sIII")
_MARK: Final = b"kbr\x01"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MOST_TRIES: Final = 5


@dataclass(kw_only=True)
class Writer:
    """One process's file of records in a directory; the next one begins when it is full, taken or can't be written."""

    directory: Path
    _file: int | None = None
    _path: Path = Path()
    _size: int = 0

    def append(self, row: Row, samples: Sequence[EncodedSample]) -> None:
        """Store a row; when this returns, it is on disk.

        Raises:
            OSError: it can't be written.
        """
        record = _framed(_encoded(row, samples))
        for _ in range(_MOST_TRIES):
            self._put(record)
            if self._has_name():
                break
            self._close()
        else:
            raise OSError(f"{self._path} is taken away as soon as it is written")
        if self._size > ROTATE_BYTES:
            self.end()

    def end(self) -> None:
        """Say that no more comes into this file; a row that comes later begins another."""
        if self._file is None:
            return
        # Unsaid, it is found out when the process is gone.
        with contextlib.suppress(OSError):
            os.write(self._file, _framed(_about({"ended": True})))
        self._close()

    def _put(self, record: bytes) -> None:
        is_new = self._file is None
        if is_new:
            make_directory(self.directory)
            self._path = self.directory / f"{uuid.uuid4().hex}{OPEN}"
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
            self._size = 0
            record = _framed(_about({"writer": this_process(), "schema": SCHEMA_VERSION})) + record
        assert self._file is not None
        try:
            left = memoryview(record)
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
            if is_new:
                share_with_group(self._path)
                sync_directory(self.directory)
        except BaseException:
            # Half a record may be the last thing in a file, never in the middle.
            self._close()
            raise
        self._size += len(record)

    def _has_name(self) -> bool:
        assert self._file is not None
        try:
            return self._path.stat().st_ino == os.fstat(self._file).st_ino
        except OSError:
            return False

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                os.close(file)


@dataclass(frozen=True, kw_only=True)
class Records:
    """What a file of records holds.

    Attributes:
        writer: the process that began it; empty where not even that was written.
        version: of the schema.
        ended: the writer said that no more comes.
        damage: what is wrong with it beyond an end that was cut off; '' for nothing. Rows around it are whole.
    """

    rows: list[Row] = field(default_factory=list)
    writer: JsonObject = field(default_factory=dict)
    version: int = 0
    ended: bool = False
    damage: str = ""

    def table(self, schema: pa.Schema, names: Sequence[str], wanted: pa.Array | None = None) -> pa.Table:
        """Return some columns, of some measurements or of all."""
        import pyarrow as pa

        keys = None if wanted is None else set(wanted.to_pylist())
        rows = [row for row in self.rows if keys is None or row["measurement"] in keys]
        fields = [schema.field(name) for name in names]
        arrays = [pa.array([row.get(f.name) for row in rows], f.type) for f in fields]
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields))

    def unknown(self, schema: pa.Schema) -> set[str]:
        """Return columns that this installation doesn't know, but another one's did."""
        return {name for row in self.rows for name in row} - set(schema.names)


def read_records(path: Path) -> Records:
    """Read a file of records, as far as it is whole.

    Raises:
        OSError: it can't be read.
    """
    rows: list[Row] = []
    about: dict[str, Any] = {}
    damage = ""
    for at, content in _contents(path.read_bytes()):
        if content is None:
            damage = damage or f"the record at byte {at} is not what was written"
        elif "row" in content:
            rows.append(content["row"])
        else:
            about |= content
    return Records(
        rows=rows,
        writer=about.get("writer", {}),
        version=about.get("schema", 0),
        ended="ended" in about,
        damage=damage,
    )


def _contents(data: bytes) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield where each record is and what it says; None for what is damaged, nothing for an end that was cut off."""
    at = 0
    while at < len(data):
        size = _whole(data, at)
        if size is not None:
            yield at, _decoded(data, at)
            at += size
            continue
        following = data.find(_MARK, at + 1)
        while following >= 0 and _whole(data, following) is None:
            following = data.find(_MARK, following + 1)
        if following < 0:
            if not _is_cut_off(data, at):
                yield at, None
            return
        yield at, None
        at = following


def _whole(data: bytes, at: int) -> int | None:
    """Return the size of the record that begins at a place, or None where none does."""
    if len(data) < at + _HEADER.size:
        return None
    mark, length, _, checksum = _HEADER.unpack_from(data, at)
    end = at + _HEADER.size + length
    if mark != _MARK or end > len(data) or zlib.crc32(data[at + _HEADER.size : end]) != checksum:
        return None
    return int(end - at)


def _is_cut_off(data: bytes, at: int) -> bool:
    """Tell whether the end of a file is what a crash leaves: the beginning of a record, or zeros."""
    if not any(data[at:]) or len(data) < at + _HEADER.size:
        return True
    mark, length, _, _ = _HEADER.unpack_from(data, at)
    body = data[at + _HEADER.size :]
    return mark == _MARK and (length > len(body) or not any(body[-512:]))


def _framed(content: bytes) -> bytes:
    import pyarrow as pa

    payload: bytes = pa.compress(content, codec="zstd", asbytes=True)
    return _HEADER.pack(_MARK, len(payload), len(content), zlib.crc32(payload)) + payload


def _about(what: Mapping[str, object]) -> bytes:
    text = json.dumps(what).encode()
    return struct.pack("<I", len(text)) + text


def _encoded(row: Row, samples: Sequence[EncodedSample]) -> bytes:
    kept = {name: value for name, value in row.items() if value is not None}
    about = [[item["name"], item["dtype"], item["count"], len(item["data"])] for item in samples]
    text = json.dumps({"row": kept, "samples": about}, default=_plain, separators=(",", ":")).encode()
    return struct.pack("<I", len(text)) + text + b"".join(item["data"] for item in samples)


def _plain(value: datetime | np.generic) -> object:
    """A time as microseconds since 1970; a NumPy scalar as Python's."""
    return (value - _EPOCH) // timedelta(microseconds=1) if isinstance(value, datetime) else value.item()


def _decoded(data: bytes, at: int) -> dict[str, Any]:
    import pyarrow as pa

    _, length, raw, _ = _HEADER.unpack_from(data, at)
    begin = at + _HEADER.size
    content = memoryview(pa.decompress(data[begin : begin + length], decompressed_size=raw, codec="zstd"))
    (size,) = struct.unpack_from("<I", content)
    found: dict[str, Any] = json.loads(bytes(content[4 : 4 + size]))
    if "row" in found:
        samples, place = [], 4 + size
        for name, dtype, count, width in found.pop("samples"):
            samples.append(
                EncodedSample(name=name, dtype=dtype, count=count, data=bytes(content[place : place + width]))
            )
            place += width
        found["row"]["samples"] = samples
    return found
