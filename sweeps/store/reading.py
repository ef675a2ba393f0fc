"""Read the files of a results directory: which there are, columns of each, and the rows that count.

A fold writes its file, which names those whose rows it has, before it removes them. So unfolded files are listed first
and folded ones second, what a folded file replaces is not read, and where a file vanished since it was listed, all are
listed again: a row is never missed, and never read from two files that both have it for that reason.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from sweeps.errors import StoreError, VanishedError
from sweeps.files import list_files, not_allowed
from sweeps.status import FINAL
from sweeps.store.records import OPEN, TAKEN, Records, read_records
from sweeps.store.schema import SCHEMA_VERSION, arrow_schema

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

log = logging.getLogger(__name__)

REPLACES: Final = b"replaces"
"""In a folded file's metadata: JSON of the files, relative to the results directory, whose rows it has."""
PAUSES: Final = (0.0, 0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Seconds before files are listed again; a listing of a network file system may be seconds old."""
_OWN: Final = ("row_id", "key", "measurement", "error")
"""Text of which rows share little."""
_REPORTED: Final[set[Path]] = set()
"""Damaged files that were already said to be so in this process."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """What was read of a file.

    Attributes:
        table: its rows.
        replaces: names of files whose rows it has.
        version: of its schema.
    """

    table: pa.Table
    replaces: frozenset[str] = frozenset()
    version: int = 0


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Reads the files of one results directory.

    Attributes:
        damaged: files that were found damaged.
        encoded: text that many rows share comes as Arrow's dictionaries, of which each value is read once.
    """

    out: Path
    damaged: list[Path] = field(default_factory=list)
    encoded: bool = False

    @property
    def schema(self) -> pa.Schema:
        """The types of what is read."""
        return _encoded_schema() if self.encoded else arrow_schema()

    def parts(self) -> list[Path]:
        """Return the files that are not folded, those of earlier versions (one measurement each) too."""
        found = list_files(self.out / "parts")
        earlier = [part for p in found if not p.suffix and p.is_dir() for part in list_files(p, "*.parquet")]
        return [*earlier, *(p for p in found if p.suffix in (OPEN, TAKEN))]

    def packs(self) -> list[Path]:
        """Return the folded files."""
        return list_files(self.out / "packs", "*.parquet")

    def name(self, path: Path) -> str:
        """Return how a folded file calls a file that it replaces."""
        return path.relative_to(self.out).as_posix()

    def tables(self, columns: Sequence[str], measurements: Collection[str] | None = None) -> list[pa.Table]:
        """Return columns of every row that is stored, a table a file; killed folds may have left a row in two.

        Args:
            columns: null where a file lacks them.
            measurements: only rows of these. Of files that have none, only the keys are read.

        Raises:
            StoreError: a file can't be read, or files keep vanishing.
        """
        for pause in PAUSES:
            time.sleep(pause)
            try:
                return self._tables(columns, measurements)
            except VanishedError:
                continue
        raise StoreError(f"files of {self.out} vanish as they are read: does somebody remove them? Try again")

    def _tables(self, columns: Sequence[str], measurements: Collection[str] | None) -> list[pa.Table]:
        import pyarrow as pa

        wanted = None if measurements is None else pa.array(sorted(measurements), pa.string())
        parts, packs = self.parts(), self.packs()
        found: dict[str, pa.Table] = {}
        replaced: set[str] = set()
        for path in packs:
            read = self.folded(path, columns, wanted)
            if read is not None:
                found[self.name(path)] = read.table
                replaced |= read.replaces
        for path in parts:
            if self.name(path) not in replaced:
                read = self._either(path, columns, wanted)
                if read is not None:
                    found[self.name(path)] = read.table
        return [table for name, table in found.items() if name not in replaced]

    def scan(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield columns of every row that is stored, a file at a time; rows of files that are folded meanwhile twice.

        Raises:
            StoreError: a file is of a newer version, or can't be read.
        """
        done: set[str] = set()
        for pause in PAUSES:
            time.sleep(pause)
            try:
                parts, packs = self.parts(), self.packs()
                heads = [read for path in packs if (read := self.folded(path, [])) is not None]
                done |= {name for read in heads for name in read.replaces}
                for path in (*parts, *packs):
                    if self.name(path) in done:
                        continue
                    read = self._either(path, columns)
                    done.add(self.name(path))
                    if read is not None:
                        check_version(path, read.version)
                        yield read.table
            except VanishedError:
                continue
            return
        raise StoreError(f"files of {self.out} vanish as they are read: does somebody remove them? Try again")

    def _either(self, path: Path, columns: Sequence[str], wanted: pa.Array | None = None) -> Read | None:
        """Return columns of a file of parquet or of records; None of a damaged one of parquet."""
        if path.suffix == ".parquet":
            return self.folded(path, columns, wanted)
        records = self.records(path)
        return Read(table=records.table(self.schema, columns, wanted), version=records.version)

    def records(self, path: Path) -> Records:
        """Return what a file of records holds; what is damaged is left out, with a warning.

        Raises:
            VanishedError: it is not there any more.
        """
        with self._reading(path):
            records = read_records(path)
        if records.damage:
            self._report(path, records.damage)
        return records

    def folded(self, path: Path, columns: Sequence[str] | None, wanted: pa.Array | None = None) -> Read | None:
        """Return columns of a parquet file; None, and a warning, if it is damaged.

        Args:
            path: of the file.
            columns: null where it lacks them; None is all that it has, under whatever names.
            wanted: only rows of these measurements.

        Raises:
            VanishedError: it is not there any more.
        """
        import pyarrow as pa

        try:
            with self._reading(path), self._opened(path, columns) as file:
                metadata = file.schema_arrow.metadata or {}
                return Read(
                    table=_table(file, self.schema, columns, wanted),
                    replaces=frozenset(json.loads(metadata.get(REPLACES, b"[]"))),
                    version=int(metadata.get(b"schema_version", 0)),
                )
        except (pa.ArrowInvalid, OSError) as error:
            self._report(path, error)
            return None

    def _opened(self, path: Path, columns: Sequence[str] | None) -> pq.ParquetFile:
        """Open a parquet file so that columns come with the types of ``schema``."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        asked = self.schema.names if columns is None else columns
        encoded = [name for name in asked if pa.types.is_dictionary(self.schema.field(name).type)]
        try:
            return pq.ParquetFile(path, read_dictionary=encoded)
        except KeyError:  # an earlier version's, which lacks columns
            known = set(pq.read_schema(path).names)
            return pq.ParquetFile(path, read_dictionary=[name for name in encoded if name in known])

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        """Tell a file that vanished, and one that the system doesn't give, from a damaged one."""
        try:
            yield
        except FileNotFoundError as error:
            raise VanishedError from error
        except OSError as error:
            # What the system refuses (no permission, too many open files, a stale mount) is not damage: taking it for
            # missing would compute everything again.
            if error.errno is None:
                raise
            said = not_allowed(error, self.out, path) or f"{path} can't be read: {error.strerror}. Try again"
            raise StoreError(f"{said}. Nothing was changed") from error

    def _report(self, path: Path, error: object) -> None:
        self.damaged.append(path)
        if path not in _REPORTED:
            _REPORTED.add(path)
            log.warning("%s is damaged and left out, so its measurements count as missing: %s", path, error)


@cache
def _encoded_schema() -> pa.Schema:
    import pyarrow as pa

    shared = pa.dictionary(pa.int32(), pa.string())
    fields = [f.with_type(shared) if f.type == pa.string() and f.name not in _OWN else f for f in arrow_schema()]
    return pa.schema(fields, metadata=arrow_schema().metadata)


def _table(file: pq.ParquetFile, schema: pa.Schema, columns: Sequence[str] | None, wanted: pa.Array | None) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    known = file.schema_arrow.names
    if columns is None:
        return file.read()
    present = [name for name in columns if name in known]
    if wanted is None:
        table = file.read(columns=present)
    else:
        is_wanted = pc.is_in(file.read(columns=["measurement"]).column("measurement"), wanted).to_numpy()
        rows = np.cumsum([0, *(file.metadata.row_group(n).num_rows for n in range(file.num_row_groups))])
        groups = [n for n in range(file.num_row_groups) if is_wanted[rows[n] : rows[n + 1]].any()]
        mask = np.concatenate([is_wanted[:0], *(is_wanted[rows[n] : rows[n + 1]] for n in groups)])
        table = file.read_row_groups(groups, columns=present).filter(pa.array(mask, pa.bool_()))
    for name in columns:
        if name not in known:
            table = table.append_column(schema.field(name), pa.nulls(table.num_rows, schema.field(name).type))
    return table.select(columns)


def check_version(path: Path, version: int) -> None:
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} was written by a newer version of kbit-sweep (schema {version}; this one knows {SCHEMA_VERSION}): "
            "update, and run this again. Nothing was changed"
        )


def joined(tables: Sequence[pa.Table], columns: Sequence[str], schema: pa.Schema | None = None) -> pa.Table:
    """Return tables as one, with columns as the schema has them: the store's, or a reader's."""
    import pyarrow as pa

    schema = arrow_schema() if schema is None else schema
    if not tables:
        # Schema.empty_table imports pandas, which takes longer than planning a study of which nothing is stored.
        fields = [schema.field(name) for name in columns]
        return pa.Table.from_arrays([pa.nulls(0, field.type) for field in fields], schema=pa.schema(fields))
    return pa.concat_tables(tables, promote_options="default").unify_dictionaries()


def damaged_files(out: Path) -> list[Path]:
    """Return the files of a directory that were found damaged since this process began to read it."""
    return sorted(path for path in _REPORTED if out.absolute() in path.absolute().parents and path.exists())


def current_rows(table: pa.Table, dropped: Collection[str]) -> NDArray[np.int64]:
    """Return the indices of the row that counts for each measurement, in order of the measurements' first rows.

    A result comes before a failure, then the newest counts, then the first.

    Args:
        table: columns row_id, measurement, status, finished.
        dropped: row ids that don't count.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    counts = pc.invert(pc.is_in(table.column("row_id"), pa.array(sorted(dropped), pa.string())))
    rows = np.flatnonzero(counts.to_numpy())
    measurements = table.column("measurement").combine_chunks().dictionary_encode()
    if len(measurements.dictionary) == len(rows) == table.num_rows:
        return np.asarray(rows, dtype=np.int64)
    codes = measurements.indices.to_numpy()[rows]
    is_final = pc.is_in(table.column("status"), pa.array([str(s) for s in FINAL])).to_numpy()[rows]
    finished = pc.fill_null(table.column("finished").cast(pa.int64()), 0).to_numpy()[rows]
    order = np.lexsort((rows, -finished, ~is_final, codes))
    _, first = np.unique(codes[order], return_index=True)
    # Codes are in order of first rows, dropped ones included.
    best, begins = order[first], np.unique(codes, return_index=True)[1]
    return np.asarray(rows[best[np.argsort(begins)]], dtype=np.int64)
