"""The container: metadata, names and places of tensors, and their bytes (GGUF specification, version 3).

Little-endian throughout. Imports no torch, so that a plan can look into a file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from kbit.errors import CheckpointError
from kbit.ggml.formats import FORMATS, Format

MAGIC: Final = b"GGUF"
VERSION: Final = 3
ALIGNMENT: Final = 32
"""Bytes that each tensor begins at a multiple of, unless general.alignment says otherwise."""
QUANTIZATION_VERSION: Final = 2
_SCALARS: Final = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
"""Numbers of a value's types to how ``struct`` reads them; 8 is a string and 9 an array."""
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_BY_NUMBER: Final = {f.number: f for f in FORMATS.values()}
Metadata = Mapping[str, Any]
"""Keys to bool, int (uint32), float (float32), str, or a list of str, int (int32) or float."""


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """A tensor's name in a file, the format of its values, and its shape: rows first, as numpy has it."""

    name: str
    format: Format
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.format.row_bytes(self.shape[-1])


@dataclass(frozen=True, kw_only=True)
class Entry(_Tensor):
    """A tensor that is to be written: ``data`` gives its bytes when their turn comes."""

    data: Callable[[], NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Stored(_Tensor):
    """A tensor of a file, and where its bytes begin in the file."""

    offset: int


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """What a file says of itself."""

    path: Path
    metadata: Metadata
    tensors: Mapping[str, Stored]

    def read(self, name: str) -> NDArray[np.uint8]:
        """Return the bytes of a tensor, [rows, bytes of a row]; those of one dimension are a row."""
        stored = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(stored.offset)
            data = np.fromfile(file, np.uint8, stored.nbytes)
        if len(data) < stored.nbytes:
            raise CheckpointError(f"{self.path} ends within {name}: it is cut off, copy it again")
        return data.reshape(prod(stored.shape[:-1]), -1)


def write_file(path: Path, metadata: Metadata, entries: Sequence[Entry]) -> int:
    """Write a file under a temporary name, and give it its own at the end. Returns its bytes.

    Raises:
        OSError: it can't be written; nothing of it stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(MAGIC + struct.pack("<IQQ", VERSION, len(entries), len(metadata)))
            for key, value in metadata.items():
                file.write(_string(key) + _value(value))
            offset = 0
            for entry in entries:
                dims = struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *reversed(entry.shape))
                file.write(_string(entry.name) + dims + struct.pack("<IQ", entry.format.number, offset))
                offset += -(-entry.nbytes // ALIGNMENT) * ALIGNMENT
            for entry in entries:
                file.write(bytes(-file.tell() % ALIGNMENT))
                data = np.ascontiguousarray(entry.data())
                assert data.nbytes == entry.nbytes, entry.name
                file.write(data.tobytes())
            file.write(bytes(-file.tell() % ALIGNMENT))
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return size


def read_file(path: Path) -> GgufFile:
    """Read what a file says of itself; of its tensors nothing but names, shapes and places.

    Raises:
        CheckpointError: no GGUF file, one of another version, damaged, or with a format that isn't known here.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except (struct.error, UnicodeDecodeError, MemoryError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: its header can't be read ({error}); copy it again") from error


def _read(path: Path, file: BinaryIO) -> GgufFile:
    if file.read(4) != MAGIC:
        raise CheckpointError(f"{path} is no GGUF file: it does not begin with 'GGUF'")
    version, tensors, pairs = struct.unpack("<IQQ", file.read(20))
    if version not in (2, 3):
        raise CheckpointError(f"{path} is GGUF of version {version}: 2 and 3 are read")
    metadata = {}
    for _ in range(pairs):
        key = _read_string(file)
        metadata[key] = _read_value(file, _number(file, "<I"))
    found = [_read_tensor(path, file) for _ in range(tensors)]
    alignment = int(metadata.get("general.alignment", ALIGNMENT))
    begin = -(-file.tell() // alignment) * alignment
    size = path.stat().st_size
    placed = {}
    for name, layout, shape, offset in found:
        stored = Stored(name=name, format=layout, shape=shape, offset=begin + offset)
        if stored.offset + stored.nbytes > size:
            raise CheckpointError(f"{path} ends within {name}: it is cut off, copy it again")
        placed[name] = stored
    return GgufFile(path=path, metadata=metadata, tensors=placed)


def _read_tensor(path: Path, file: BinaryIO) -> tuple[str, Format, tuple[int, ...], int]:
    name, count = _read_string(file), _number(file, "<I")
    shape = tuple(reversed(struct.unpack(f"<{count}Q", file.read(8 * count))))
    number, offset = struct.unpack("<IQ", file.read(12))
    if number not in _BY_NUMBER:
        known = ", ".join(FORMATS)
        raise CheckpointError(f"{path}: {name} has a format that isn't known here (number {number}): {known} are")
    return name, _BY_NUMBER[number], shape, offset


def _read_value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _read_string(file)
    if kind == _ARRAY:
        of, count = struct.unpack("<IQ", file.read(12))
        if of in _SCALARS:
            size = struct.calcsize(_SCALARS[of])
            return np.frombuffer(file.read(size * count), np.dtype(_SCALARS[of])).tolist()
        return [_read_value(file, of) for _ in range(count)]
    if kind not in _SCALARS:
        raise ValueError(f"a value of type {kind}")
    return _number(file, _SCALARS[kind])


def _number(file: BinaryIO, how: str) -> Any:
    return struct.unpack(how, file.read(struct.calcsize(how)))[0]


def _read_string(file: BinaryIO) -> str:
    length = _number(file, "<Q")
    return file.read(length).decode("utf-8")


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """Return a value with its type before it."""
    if isinstance(value, list):
        kind, parts = _kind(value[0]) if value else _STRING, list(_bare(value))
        kind = _INT32 if kind == _UINT32 else kind
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(parts)
    packed = next(iter(_bare([value], "<I")))
    return struct.pack("<I", _kind(value)) + packed


def _bare(values: Sequence[Any], whole: str = "<i") -> Iterator[bytes]:
    for value in values:
        match value:
            case bool():
                yield struct.pack("?", value)
            case int():
                yield struct.pack(whole, value)
            case float():
                yield struct.pack("<f", value)
            case _:
                yield _string(value)


def _kind(value: Any) -> int:
    kinds = {bool: _BOOL, int: _UINT32, float: _FLOAT32, str: _STRING}
    return kinds[type(value)]
