"""The store: immutable parquet parts under one results directory. Nothing is ever rewritten, so nothing is ever lost.

    OUT/parts/PACK/*.parquet   one part per measurement, one directory per pack
    OUT/packs/*.parquet        the parts of a finished pack, compacted into one
    OUT/dropped/*.json         row ids that `mode=drop` retired, but for NAME.undone beside it; the rows stay on disk
    OUT/manifests/*.json       what each study planned (sweeps.study.manifest);  OUT/claims: who is at it
    (sweeps.launches.claims)

A part is written under a unique temporary name, flushed to disk and renamed. Readers skip temporary files, tolerate
files that vanish under them (compaction) and files that are damaged (reported, never fatal), and keep one row a
measurement: a result before a failure, then the newest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypedDict

import numpy as np
from numpy.typing import NDArray

from sweeps.errors import StoreError
from sweeps.files import (
    list_files,
    make_directory,
    not_allowed,
    read_json,
    require_directory,
    store_time,
    write_atomically,
)
from sweeps.status import FINAL
from sweeps.store.schema import SCHEMA_VERSION, Row, arrow_schema

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

Outcomes = NDArray[np.bool_] | NDArray[np.float32] | NDArray[np.int32]
Samples = dict[str, Outcomes]
"""Per-sample outcomes by name: bool for right or wrong, float32 nats and means, int32 tokens."""


class EncodedSample(TypedDict):
    """One item of the column ``samples``."""

    name: str
    dtype: str
    count: int
    data: bytes


ROWS_IN: Final = ("parts", "packs", "dropped")
"""Where rows lie, and what says which count, in the order in which readers look."""
_REPORTED: Final[set[Path]] = set()
"""Damaged files that were already said to be so in this process."""


@dataclass(frozen=True, kw_only=True)
class Store:
    """One results directory.

    Attributes:
        out: the directory; made on first write.
        made: it existed when the work began. If it is gone since then, e.g. renamed, it is not recreated.
        witness: a file in it that was there then; without it, it is another directory, and not written.
    """

    out: Path
    made: bool = False
    witness: str = ""
    damaged: list[Path] = field(default_factory=list, compare=False)

    def check_writable(self) -> None:
        """Make the directory and write a file in it.

        Raises:
            StoreError: it can't be made or written.
        """
        probe = self.out / f".write-test-{uuid.uuid4().hex}"
        try:
            make_directory(self.out)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise StoreError(
                f"out={str(self.out)!r} can't be written: {error.strerror or error}. "
                "Give a directory that you may write, e.g. out=results"
            ) from error

    def check_may_write(self) -> None:
        """Refuse a directory that can't be written or made, without making it.

        Raises:
            StoreError: names what is in the way.
        """
        there = next(path for path in (self.out, *self.out.parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            is_read_only = os.statvfs(there).f_flag & os.ST_RDONLY
            number = errno.ENOTDIR if not there.is_dir() else errno.EROFS if is_read_only else errno.EACCES
            why = os.strerror(number)
            raise StoreError(
                f"out={str(self.out)!r} can't be written: {why}: {there}. "
                "Give a directory that you may write, e.g. out=results"
            )

    def write(self, row: Row) -> None:
        """Store one measurement; when this returns, it is on disk.

        Args:
            row: a value by column name; missing columns are null, ``samples`` is a mapping of arrays.
        """
        directory = self.out / "parts" / str(row["pack"])
        self._write_rows([row], directory / f"{str(row['measurement'])[:16]}-{uuid.uuid4().hex[:12]}.parquet")

    def compact(self, pack: str) -> None:
        """Merge the parts of a finished pack into one file, then remove them."""
        import pyarrow as pa

        read = {path: self._read(path, None) for path in self._parts(pack)}
        mine = {path: table for path, table in read.items() if table is not None}
        if not mine:
            return
        target = self.out / "packs" / f"{pack}-{uuid.uuid4().hex[:12]}.parquet"
        self._write_table(pa.concat_tables(mine.values()), target)
        # The directory stays: removing it would race with readers that list it and writers that just made it.
        for path in mine:
            path.unlink(missing_ok=True)

    def read(self, columns: Sequence[str] | None = None, *, measurements: Collection[str] | None = None) -> pa.Table:
        """Return the current row of every measurement: results before failures, then the newest; dropped rows left out.

        Args:
            columns: which to read; None is all but the samples.
            measurements: which to read; None is all. What is not wanted is dropped file by file.
        """
        import pyarrow as pa

        schema = arrow_schema()
        wanted = [name for name in schema.names if name != "samples"] if columns is None else list(columns)
        needed = list(dict.fromkeys([*wanted, "row_id", "measurement", "status", "finished"]))
        table = self._read_all(needed, measurements)
        keep = _current_rows(table, self.dropped_ids())
        return table.take(pa.array(keep, pa.int64())).select(wanted)

    def read_pack(self, pack: str, columns: Sequence[str]) -> list[Row]:
        """Return every stored row of one pack, without reading any other; dropped rows left out."""
        wanted = list(dict.fromkeys([*columns, "row_id"]))
        files = [*self._parts(pack), *self._packs(pack)]
        tables = [table for path in files if (table := self._read(path, wanted)) is not None]
        dropped = self.dropped_ids()
        return [row for table in tables for row in table.to_pylist() if row["row_id"] not in dropped]

    def drop(self, row_ids: Iterable[str], why: str) -> None:
        """Retire rows: they stay on disk and no longer count, so that their measurements run again."""
        record = {"row_ids": sorted(row_ids), "why": why, "at": store_time(self.out)}
        write_atomically(self.out / "dropped" / f"{uuid.uuid4().hex}.json", json.dumps(record).encode())

    def undo_drop(self) -> tuple[int, str] | None:
        """Take the last drop back that stands; return how many rows count again and why they were dropped."""
        drops = {path: read_json(path) for path in self._drops()}
        if not drops:
            return None
        last = max(drops, key=lambda p: (drops[p].get("at", p.stat().st_mtime), p.name))
        write_atomically(last.with_suffix(".undone"), b"")
        return len(drops[last]["row_ids"]), drops[last]["why"]

    def dropped(self, measurements: Collection[str]) -> set[str]:
        """Return which of some measurements have a row that was dropped."""
        ids = self.dropped_ids()
        if not ids:
            return set()
        table = self._read_all(["row_id", "measurement"], measurements)
        return {row["measurement"] for row in table.to_pylist() if row["row_id"] in ids}

    def _drops(self) -> list[Path]:
        """Return the drops that stand."""
        found = list_files(self.out / "dropped", "*")
        undone = {path.stem for path in found if path.suffix == ".undone"}
        return [path for path in found if path.suffix == ".json" and path.stem not in undone]

    def dropped_ids(self) -> set[str]:
        """Return the ids of the rows that were dropped."""
        return {row_id for path in self._drops() for row_id in read_json(path)["row_ids"]}

    def row_ids(self, measurements: Collection[str]) -> list[str]:
        """Return every stored row of some measurements, those that don't count included."""
        ids: list[str] = self._read_all(["row_id", "measurement"], measurements).column("row_id").to_pylist()
        return ids

    def history(self, columns: Sequence[str]) -> list[Row]:
        """Return every row that was ever stored, once, dropped and superseded ones too: what was computed."""
        table = self._read_all(list(dict.fromkeys([*columns, "row_id"])), None)
        # While a pack is compacted, its rows lie both in parts and in the pack's file.
        return list({row["row_id"]: row for row in table.to_pylist()}.values())

    def scan(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield all that is stored, file by file, so that memory holds one: dropped and superseded rows too, and some
        rows twice where a compaction is under way.

        Args:
            columns: which to read; None is all.

        Raises:
            StoreError: a file is of a newer version, whose columns this one would lose.
        """
        for files in (self._parts, self._packs):
            for path in files():
                table = self._read(path, None if columns is None else list(columns), newer=False)
                if table is not None:
                    yield table

    def add(self, table: pa.Table) -> None:
        """Store rows of another store as they are, in one file; when this returns, they are on disk.

        Args:
            table: rows with all columns, as ``scan`` yields them.
        """
        ids = "\n".join(sorted(table.column("row_id").to_pylist()))
        name = f"merged-{hashlib.sha256(ids.encode()).hexdigest()[:16]}.parquet"
        self._write_table(table, self.out / "packs" / name)

    def _parts(self, pack: str = "*") -> list[Path]:
        directories = list_files(self.out / "parts", pack)
        return [part for directory in directories for part in list_files(directory, "*.parquet")]

    def _packs(self, pack: str = "*") -> list[Path]:
        return list_files(self.out / "packs", f"{pack}-*.parquet")

    def _read_all(self, columns: list[str], measurements: Collection[str] | None) -> pa.Table:
        import pyarrow as pa
        import pyarrow.compute as pc

        # Compaction adds the pack's file before it removes the parts: parts first, packs second, misses nothing.
        schema = arrow_schema()
        wanted = None if measurements is None else pa.array(sorted(measurements), pa.string())
        tables = [
            table if wanted is None else table.filter(pc.is_in(table.column("measurement"), wanted))
            for files in (self._parts, self._packs)
            for path in files()
            if (table := self._read(path, columns)) is not None
        ]
        if not tables:
            return pa.schema([schema.field(c) for c in columns]).empty_table()
        return pa.concat_tables(tables, promote_options="default")

    def _read(self, path: Path, columns: list[str] | None, *, newer: bool = True) -> pa.Table | None:
        """Return one file, with columns it lacks filled with null; None when it vanished or is damaged.

        Files of newer versions are read without the columns that this one doesn't know, or refused (``newer``).
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = arrow_schema()
        names = schema.names if columns is None else columns
        try:
            with pq.ParquetFile(path) as file:
                known = set(file.schema_arrow.names)
                if not newer:
                    _check_version(path, file.schema_arrow)
                present = [name for name in names if name in known]
                table = file.read(columns=present)
        except FileNotFoundError:
            return None
        except (pa.ArrowInvalid, OSError) as error:
            # What the system refuses (no permission, too many open files, a stale mount) is not damage: taking it for
            # missing would compute everything again.
            if isinstance(error, OSError) and error.errno is not None:
                said = not_allowed(error, self.out, path) or f"{path} can't be read: {error.strerror}. Try again"
                raise StoreError(f"{said}. Nothing was changed") from error
            self._report_damage(path, error)
            return None
        for name in names:
            if name not in present:
                table = table.append_column(schema.field(name), pa.nulls(table.num_rows, schema.field(name).type))
        return table.select(names)

    def _report_damage(self, path: Path, error: Exception) -> None:
        self.damaged.append(path)
        if path not in _REPORTED:
            _REPORTED.add(path)
            log.warning("%s is damaged and left out, so its measurements count as missing: %s", path, error)

    def _write_rows(self, rows: Sequence[Row], path: Path) -> None:
        import pyarrow as pa

        schema = arrow_schema()
        unknown = {name for row in rows for name in row} - set(schema.names)
        if unknown:
            raise ValueError(f"columns that the schema does not have: {', '.join(sorted(unknown))}")
        encoded = [
            {"row_id": uuid.uuid4().hex, **row, "samples": encode_samples(row.get("samples") or {})} for row in rows
        ]
        self._write_table(pa.Table.from_pylist(encoded, schema=schema), path)

    def _write_table(self, table: pa.Table, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.made:
            require_directory(self.out, self.witness)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        write_atomically(path, sink.getvalue().to_pybytes())


def _check_version(path: Path, schema: pa.Schema) -> None:
    version = int((schema.metadata or {}).get(b"schema_version", 0))
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} was written by a newer version of kbit-sweep (schema {version}; this one knows {SCHEMA_VERSION}): "
            "update, and run this again. Nothing was changed"
        )


def damaged_files(out: Path) -> list[Path]:
    """Return the files of a directory that were found damaged since this process began to read it."""
    return sorted(path for path in _REPORTED if out.absolute() in path.absolute().parents and path.exists())


def encode_samples(samples: Mapping[str, Outcomes]) -> list[EncodedSample]:
    """Arrays by name as the ``samples`` column: bool as packed bits, the rest as little-endian float32 or int32."""
    encoded: list[EncodedSample] = []
    for name, values in samples.items():
        array = np.asarray(values)
        if array.dtype == np.bool_:
            dtype, data = "bits", np.packbits(array.astype(np.bool_), bitorder="little").tobytes()
        elif np.issubdtype(array.dtype, np.integer):
            dtype, data = "int32", array.astype("<i4").tobytes()
        else:
            dtype, data = "float32", array.astype("<f4").tobytes()
        encoded.append(EncodedSample(name=name, dtype=dtype, count=len(array), data=data))
    return encoded


def decode_samples(encoded: Iterable[EncodedSample]) -> Samples:
    """Return the inverse of ``encode_samples``."""
    samples: Samples = {}
    for item in encoded:
        if item["dtype"] == "bits":
            bits = np.unpackbits(np.frombuffer(item["data"], np.uint8), count=item["count"], bitorder="little")
            samples[item["name"]] = bits.astype(np.bool_)
        else:
            samples[item["name"]] = np.frombuffer(item["data"], "<i4" if item["dtype"] == "int32" else "<f4")
    return samples


def _current_rows(table: pa.Table, dropped: set[str]) -> list[int]:
    """Indices of the row that counts for each measurement, in order of the measurements' first rows."""
    import pyarrow as pa
    import pyarrow.compute as pc

    finished = pc.fill_null(table.column("finished").cast(pa.int64()), 0).to_pylist()
    best: dict[str, tuple[tuple[bool, int], int]] = {}
    rows = zip(
        table.column("row_id").to_pylist(),
        table.column("measurement").to_pylist(),
        table.column("status").to_pylist(),
        finished,
        strict=True,
    )
    for index, (row_id, measurement, status, time) in enumerate(rows):
        if row_id in dropped:
            continue
        rank = (status in FINAL, time)
        if measurement not in best or rank > best[measurement][0]:
            best[measurement] = (rank, index)
    return [index for _, index in best.values()]
