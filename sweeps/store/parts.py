"""The store: one results directory. A row, once written, stays in it as it is, so nothing is ever lost.

    OUT/parts/*.rows           measurements as workers store them, a file per worker (sweeps.store.records)
    OUT/packs/*.parquet        the same, folded into few files (sweeps.store.folding)
    OUT/parts/PACK/*.parquet   of earlier versions: a file per measurement, folded like the others
    OUT/dropped/*.json         row ids that `mode=drop` retired, but for NAME.undone beside it; the rows stay on disk
    OUT/manifests/*.json       what each study planned (sweeps.study.manifest);  OUT/claims: who is at it
    (sweeps.launches.claims)

Readers tolerate files that vanish under them (folds) and files that are damaged (reported, never fatal), and keep one
row a measurement: a result before a failure, then the newest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from sweeps.errors import StoreError, VanishedError
from sweeps.files import (
    list_files,
    look_anew,
    make_directory,
    patiently,
    read_json,
    require_directory,
    store_time,
    write_atomically,
)
from sweeps.store.folding import Folder, write_folded
from sweeps.store.reading import Reader, current_rows, joined
from sweeps.store.records import Writer
from sweeps.store.samples import encode_samples
from sweeps.store.schema import Row, arrow_schema

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

ROWS_IN: Final = ("parts", "packs", "dropped")
"""Where rows lie, and what says which count, in the order in which readers look."""
LOOSE: Final = 32
"""Files that are not folded, in a directory where others work: when there are so many, whoever comes by folds them."""


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
    _writer: list[Writer] = field(default_factory=list, init=False, compare=False, repr=False)

    @property
    def _reader(self) -> Reader:
        return Reader(out=self.out, damaged=self.damaged)

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
        import pyarrow as pa

        schema = arrow_schema()
        unknown = row.keys() - set(schema.names)
        if unknown:
            raise ValueError(f"columns that the schema does not have: {', '.join(sorted(unknown))}")
        if self.made:
            require_directory(self.out, self.witness)
        samples = encode_samples(row.get("samples") or {})
        named = {"row_id": uuid.uuid4().hex, **{name: value for name, value in row.items() if name != "samples"}}
        # What could not be folded is not stored.
        pa.Table.from_pylist([{**named, "samples": samples}], schema=schema)
        if not self._writer:
            self._writer.append(Writer(directory=self.out / "parts"))
        # Under the same id: where a try that failed is on disk all the same, it is the same row.
        patiently(lambda: self._writer[0].append(named, samples))

    def look_anew(self) -> None:
        """Have what is read next be all that was stored until now, on whatever machine (``sweeps.files.look_anew``)."""
        for name in ROWS_IN:
            look_anew(self.out / name)

    def close(self) -> None:
        """Say that this process stores no more for now: what it stored can be folded."""
        for writer in self._writer:
            writer.end()

    def fold(self, least: int = 1) -> None:
        """Fold small files into few, where this user may write and nobody else is at it; nothing depends on it.

        Args:
            least: leave it where fewer files are not folded.
        """
        if not os.access(self.out, os.W_OK):
            return
        try:
            Folder(reader=self._reader).fold(least)
        except (OSError, StoreError, VanishedError) as error:
            log.warning("%s: its files stay as many as they are; nothing is lost: %s", self.out, error)

    def read(
        self,
        columns: Sequence[str] | None = None,
        *,
        measurements: Collection[str] | None = None,
        encoded: bool = False,
    ) -> pa.Table:
        """Return the current row of every measurement: results before failures, then the newest; dropped rows left out.

        Args:
            columns: which to read; None is all but the samples.
            measurements: which to read; None is all. What is not wanted is dropped file by file.
            encoded: text that rows share comes as Arrow's dictionaries: of all columns, in a third of time and memory.
        """
        import pyarrow as pa

        wanted = [name for name in arrow_schema().names if name != "samples"] if columns is None else list(columns)
        needed = list(dict.fromkeys([*wanted, "row_id", "measurement", "status", "finished"]))
        reader = replace(self._reader, encoded=encoded)
        table = joined(reader.tables(needed, measurements), needed, reader.schema)
        dropped = self.dropped_ids()
        if not table.num_rows:
            return table.select(wanted)
        rows = current_rows(table, dropped)
        # Nearly always all rows count, in their order.
        is_all = np.array_equal(rows, np.arange(table.num_rows))
        return (table if is_all else table.take(pa.array(rows))).select(wanted)

    def read_pack(self, pack: str, columns: Sequence[str]) -> list[Row]:
        """Return every stored row of one pack; dropped rows left out."""
        import pyarrow.compute as pc

        needed = list(dict.fromkeys([*columns, "row_id", "pack"]))
        tables = [table.filter(pc.equal(table.column("pack"), pack)) for table in self._reader.tables(needed)]
        dropped = self.dropped_ids()
        return [row for table in tables for row in table.to_pylist() if row["row_id"] not in dropped]

    def drop(self, row_ids: Iterable[str], why: str) -> None:
        """Retire rows: they stay on disk and no longer count, so that their measurements run again."""
        record = {"row_ids": sorted(set(row_ids)), "why": why, "at": store_time(self.out)}
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
        tables = self._reader.tables(["row_id", "measurement"], measurements)
        return {row["measurement"] for table in tables for row in table.to_pylist() if row["row_id"] in ids}

    def _drops(self) -> list[Path]:
        """Return the drops that stand."""
        found = list_files(self.out / "dropped", "*")
        undone = {path.stem for path in found if path.suffix == ".undone"}
        return [path for path in found if path.suffix == ".json" and path.stem not in undone]

    def dropped_ids(self) -> set[str]:
        return {row_id for path in self._drops() for row_id in read_json(path)["row_ids"]}

    def row_ids(self, measurements: Collection[str]) -> list[str]:
        """Return every stored row of some measurements, those that don't count included."""
        ids = joined(self._reader.tables(["row_id"], measurements), ["row_id"]).column("row_id").to_pylist()
        return list(dict.fromkeys(ids))

    def keys(self) -> frozenset[str]:
        """Return every measurement that has a row, one that doesn't count included."""
        tables = self._reader.tables(["measurement"])
        return frozenset(joined(tables, ["measurement"]).column("measurement").to_pylist())

    def history(self, columns: Sequence[str]) -> list[Row]:
        """Return every row that was ever stored, once, dropped and superseded ones too: what was computed."""
        needed = list(dict.fromkeys([*columns, "row_id"]))
        table = joined(self._reader.tables(needed), needed)
        return list({row["row_id"]: row for row in table.to_pylist()}.values())

    def scan(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield all that is stored, file by file, so that memory holds one: dropped and superseded rows too, and some
        rows twice where files are folded meanwhile.

        Args:
            columns: which to read; None is all.

        Raises:
            StoreError: a file is of a newer version, whose columns this one would lose.
        """
        return self._reader.scan(arrow_schema().names if columns is None else columns)

    def add(self, table: pa.Table) -> None:
        """Store rows of another store as they are, in one file; when this returns, they are on disk.

        Args:
            table: rows with all columns, as ``scan`` yields them.
        """
        if self.made:
            require_directory(self.out, self.witness)
        ids = "\n".join(sorted(table.column("row_id").to_pylist()))
        name = f"merged-{hashlib.sha256(ids.encode()).hexdigest()[:16]}.parquet"
        write_folded(table, self.out / "packs" / name)
