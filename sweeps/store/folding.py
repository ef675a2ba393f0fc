"""Fold what lies in many small files into few: one process at a time, while others write and read.

Each step may be the last. A fold's file names what it replaces, so that a fold that was killed is ended by the next one
and its rows are read once. What it replaced stays until a listing that is a minute old, as network file systems give
them, no longer shows it without the fold's file. A file of records is folded when its writer has ended, died or been
silent for long; it is renamed first, which its writer finds out if it lives after all (sweeps.store.records). The lease
saves work; where two fold at once all the same, a row is in two files, which readers and the next fold know by its id.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sweeps.errors import StoreError
from sweeps.files import (
    JsonObject,
    create_exclusively,
    list_files,
    make_directory,
    read_json,
    store_time,
    write_atomically,
)
from sweeps.processes import is_running, this_process
from sweeps.store.reading import REPLACES, Reader
from sweeps.store.records import TAKEN
from sweeps.store.schema import SCHEMA_VERSION, arrow_schema

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

SILENT_SECONDS: Final = 900.0
"""A writer on another machine that stored nothing for so long may be dead, and its file is taken from it. No network
file system shows an old name for so long, so it finds out if it lives."""
GRACE_SECONDS: Final = 60.0
"""What was replaced stays for so long: network file systems show directories as they were up to a minute ago."""
LEFTOVER_SECONDS: Final = 86400.0
"""A temporary file, or an empty directory of parts, is left over after so long."""
FULL_BYTES: Final = 16 << 20
"""A fold's file is about so large; one of half the size is not folded again."""
MOST_SMALL: Final = 32
"""Folded files that are not full: when there are so many, all become fewer."""
RECORDS_SHRINK: Final = 3
"""So many bytes of records become one in a folded file: four, in studies of the paper's kind."""
ROW_GROUP: Final = 1024
"""Rows that are read together where some of them are wanted."""
_LEASE: Final = ".lease"
_NOT_ALIKE: Final = ("row_id", "measurement", "metrics", "stderr", "samples")
"""Columns in which values hardly repeat."""


@dataclass(frozen=True, kw_only=True)
class _Pack:
    """A folded file: ids of its rows, names of the files that it replaces."""

    ids: frozenset[str]
    replaces: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Folds the files of one results directory."""

    reader: Reader

    @property
    def out(self) -> Path:
        return self.reader.out

    def fold(self, least: int = 1) -> None:
        """Fold what is not folded, if it is in so many files, and what is folded in too many small ones.

        Args:
            least: files of records or parts of earlier versions.

        Raises:
            OSError, StoreError: a file can't be read or written; nothing is lost.
            VanishedError: somebody else folds too, or removes files.
        """
        packs = self.reader.packs()
        small = [path for path in packs if path.stat().st_size < FULL_BYTES // 2]
        if len(self.reader.parts()) < least and len(small) < MOST_SMALL:
            return
        with _lease(self.out / "packs") as lease:
            if lease is not None:
                self._fold(least, lease)

    def _fold(self, least: int, lease: Path) -> None:
        now = store_time(self.out)
        heads = {path: read.replaces for path in self.reader.packs() if (read := self.reader.folded(path, []))}
        self._remove_replaced(heads, now)
        replaced = {name for replaces in heads.values() for name in replaces}
        counting = [path for path in heads if self.reader.name(path) not in replaced]
        parts = [path for path in self.reader.parts() if self.reader.name(path) not in replaced]
        loose = [ready for path in parts for ready in self._ready(path, now)]
        chosen = self._chosen(loose if len(loose) >= least else [], counting)
        # Nearly always nothing is: then no rows are looked at.
        packs = {path: pack for path in counting if (pack := self._pack(path)) is not None} if chosen else {}
        for batch in _batches(chosen):
            self._merge(batch, packs)
            os.utime(lease)
        self._remove_leftovers(now)

    def _chosen(self, loose: list[Path], packs: list[Path]) -> list[Path]:
        """Return what is folded now: what is not folded, and with it folded files that are not much larger.

        So a row is written again as often as the number of rows can be doubled.
        """
        sizes = {path: _folded_size(path) for path in (*loose, *packs)}
        small = sorted((p for p in packs if sizes[p] < FULL_BYTES // 2), key=lambda p: sizes[p])
        files, total = list(loose), sum(sizes[p] for p in loose)
        for path in small:
            if len(small) >= MOST_SMALL or sizes[path] <= 2 * total:
                files.append(path)
                total += sizes[path]
        return files if loose or len(files) > 1 else []

    def _ready(self, path: Path, now: float) -> list[Path]:
        """Return the file under the name by which it can be folded, or nothing while more may come into it.

        One that is damaged, or has columns that this installation doesn't know, stays for who can read it.
        """
        if path.suffix == ".parquet":
            return [path]
        records = self.reader.records(path)
        if records.damage or records.version > SCHEMA_VERSION or records.unknown(arrow_schema()):
            return []
        if path.suffix == TAKEN or records.ended:
            return [path]
        if not _is_gone(records.writer, path, now):
            return []
        taken = path.with_suffix(TAKEN)
        path.rename(taken)
        return [taken]

    def _merge(self, files: Sequence[Path], packs: dict[Path, _Pack]) -> None:
        """Write the rows of some files, each once, into one that replaces them.

        A row is left out only where the file that is written has it already: of two copies, both that a folder knows
        of another file, two folders would each leave out the other's. So folded files with copies come in, too.

        Args:
            files: to fold; those that an earlier batch took in are no more.
            packs: the folded files that count; brought up to date.
        """
        import pyarrow as pa

        whole = {path: table for path in files if (table := self._whole(path, packs)) is not None}
        ids = {i for table in whole.values() for i in table.column("row_id").to_pylist()}
        for path in [p for p, pack in packs.items() if p not in whole and not pack.ids.isdisjoint(ids)]:
            if (table := self._whole(path, packs)) is not None:
                whole[path] = table
        if not whole or (len(whole) == 1 and packs.keys() & whole.keys()):
            return
        table = _of_one_schema(pa.concat_tables(whole.values(), promote_options="default"))
        first: dict[str, int] = {}
        for index, row_id in enumerate(table.column("row_id").to_pylist()):
            first.setdefault(row_id, index)
        of_packs = {name for p in whole if p in packs for name in packs[p].replaces if (self.out / name).exists()}
        replaces = of_packs | {self.reader.name(p) for p in whole}
        rows = table.take(pa.array(first.values(), pa.int64()))
        written = self.out / "packs" / f"{uuid.uuid4().hex}.parquet"
        write_folded(rows, written, sorted(replaces))
        for path in whole:
            packs.pop(path, None)
        packs[written] = _Pack(ids=frozenset(first), replaces=frozenset(replaces))

    def _whole(self, path: Path, packs: dict[Path, _Pack]) -> pa.Table | None:
        """Return all of a file; None where it is damaged, of a newer version, or a folded file that counts no more."""
        if path.suffix != ".parquet":
            return self.reader.records(path).table(arrow_schema(), arrow_schema().names)
        if path.parent.name == "packs" and path not in packs:
            return None
        read = self.reader.folded(path, None)
        return None if read is None or read.version > SCHEMA_VERSION else read.table

    def _pack(self, path: Path) -> _Pack | None:
        """Return what a folded file holds; None of a damaged one."""
        read = self.reader.folded(path, ["row_id"])
        if read is None:
            return None
        return _Pack(ids=frozenset(read.table.column("row_id").to_pylist()), replaces=read.replaces)

    def _remove_replaced(self, heads: Mapping[Path, frozenset[str]], now: float) -> None:
        # Ages first: of two folds, what the first one wrote may be among what the second one replaces.
        old = [path for path, replaces in heads.items() if replaces and now - path.stat().st_mtime >= GRACE_SECONDS]
        for name in (name for path in old for name in heads[path]):
            (self.out / name).unlink(missing_ok=True)

    def _remove_leftovers(self, now: float) -> None:
        """Remove what writers left that were killed long ago, and directories of parts of earlier versions."""
        parts = self.out / "parts"
        directories = [p for p in list_files(parts) if not p.suffix and p.is_dir()]
        for directory in (parts, self.out / "packs", *directories):
            with contextlib.suppress(FileNotFoundError):
                for path in directory.iterdir():
                    if path.name.startswith(".") and path.suffix == ".tmp" and _age(path, now) > LEFTOVER_SECONDS:
                        path.unlink(missing_ok=True)
        for directory in directories:
            # A writer of an earlier version may have made it just now; one that has parts can't be removed.
            if _age(directory, now) > LEFTOVER_SECONDS:
                with contextlib.suppress(OSError):
                    directory.rmdir()


def write_folded(table: pa.Table, path: Path, replaces: Sequence[str] = ()) -> None:
    """Write rows as a file.

    Args:
        table: rows.
        path: of the file.
        replaces: files whose rows it has, relative to the results directory.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = table.schema
    metadata = {**(schema.metadata or {}), REPLACES: json.dumps(list(replaces)).encode()}
    repeating = [f.name for f in schema if f.name not in _NOT_ALIKE]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata(metadata),
        sink,
        row_group_size=ROW_GROUP,
        compression="zstd",
        compression_level=6,
        use_dictionary=repeating,
        write_statistics=False,
    )
    write_atomically(path, sink.getvalue().to_pybytes())


def _of_one_schema(table: pa.Table) -> pa.Table:
    """Return a table with every column of the schema, null where it is missing, and those of other installations."""
    import pyarrow as pa

    schema = arrow_schema()
    others = [field for field in table.schema if field.name not in schema.names]
    arrays = [
        table.column(f.name) if f.name in table.schema.names else pa.nulls(table.num_rows, f.type) for f in schema
    ]
    fields = pa.schema([*schema, *others], metadata=schema.metadata)
    return pa.Table.from_arrays([*arrays, *(table.column(f.name) for f in others)], schema=fields)


def _batches(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield files in their order, as many at a time as make a full one."""
    batch: list[Path] = []
    size = 0
    for path in files:
        batch.append(path)
        size += _folded_size(path)
        if size >= FULL_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _folded_size(path: Path) -> int:
    """Return about how many bytes a file's rows have in a folded file."""
    size = path.stat().st_size
    return size if path.suffix == ".parquet" else size // RECORDS_SHRINK


def _is_gone(process: JsonObject, path: Path, now: float) -> bool:
    """Tell whether the process that keeps a file is dead, or silent for so long that it may be."""
    runs = is_running(process) if process else None
    return _age(path, now) > SILENT_SECONDS if runs is None else not runs


def _age(path: Path, now: float) -> float:
    return now - path.stat().st_mtime


@contextlib.contextmanager
def _lease(directory: Path) -> Iterator[Path | None]:
    """Hold the lease of a directory's folds, a file; None where another process has it."""
    make_directory(directory)
    path = directory / _LEASE
    mine = {**this_process(), "id": uuid.uuid4().hex}
    if _holder(path) and not _is_gone(_holder(path), path, store_time(directory)):
        yield None
        return
    path.unlink(missing_ok=True)
    if not create_exclusively(path, json.dumps(mine).encode()):
        yield None
        return
    try:
        yield path
    finally:
        if _holder(path) == mine:
            path.unlink(missing_ok=True)


def _holder(path: Path) -> JsonObject:
    """Return the process that has a lease; nothing where there is none, or nobody can tell."""
    try:
        found: JsonObject = read_json(path)
    except (FileNotFoundError, StoreError):
        return {}
    return found
