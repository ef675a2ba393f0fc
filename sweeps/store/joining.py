"""Join another store's results to a store: what is missing comes along, what both have and agree on does not.

A row comes as it is, with its id, so that a join which was killed goes on where it was when it is run again. Only what
counts there comes: failures that were measured again since, and what was dropped, stay where they are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from sweeps.files import list_files, write_atomically
from sweeps.status import FINAL
from sweeps.store.parts import Store
from sweeps.store.schema import Row

if TYPE_CHECKING:
    import pyarrow as pa

Side = Literal["mine", "theirs"]
SIDES: Final[tuple[Side, ...]] = ("mine", "theirs")
ROWS_PER_FILE: Final = 4_000
"""About 10 MB of rows with their samples; memory holds so many, and those of one file of the other store."""
_NUMBERS: Final = ("status", "metrics", "stderr", "samples", "n_samples", "bits_per_param", "total_bits")
"""What two rows of one measurement must have alike, to the last bit."""
_SHOWN: Final = ("measurement", "model", "label", "eval", "status", "metrics")


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """A measurement on which two stores disagree.

    Attributes:
        mine: model, label, eval, status and metrics of the row that counts here.
        theirs: the same there; None where the very row that counts here was dropped there.
    """

    mine: Row
    theirs: Row | None


@dataclass(kw_only=True)
class Joined:
    """What came of joining a store.

    Attributes:
        added: measurements that came along.
        known: those that had come before, or whose results here count before a failure there.
        equal: measured in both, with the same numbers.
        busy: left to those who are measuring them here.
        again: of the added, those whose results were dropped here once.
        conflicts: those on which both disagree; what is here stays, unless a side was preferred.
        studies: plans that came along.
    """

    added: int = 0
    known: int = 0
    equal: int = 0
    busy: int = 0
    again: int = 0
    conflicts: list[Conflict] = field(default_factory=list)
    studies: int = 0


def join(
    store: Store, other: Store, *, name: str, busy: Collection[str], prefer: Side | None, say: Callable[[str], None]
) -> Joined:
    """Bring what another store has to a store; the other is only read.

    Args:
        store: to write.
        other: to read.
        name: what people call the other.
        busy: measurements that are held by launches here: they are left alone.
        prefer: whose result counts where both disagree; 'theirs' retires what is here. None leaves what is here.
        say: told how far it is.

    Raises:
        StoreError: a file there is of a newer version, or can't be read.
    """
    ours, theirs = _current(store), _current(other)
    here = {row_id for table in store.scan(["row_id"]) for row_id in table.column("row_id").to_pylist()}
    say(f"comparing {len(theirs):,} measurements")
    # Of a version this one can't take over nothing is written.
    there = {row_id for table in other.scan(["row_id"]) for row_id in table.column("row_id").to_pylist()}
    joined, bring, compare = Joined(), set[str](), set[str]()
    for measurement, row in theirs.items():
        mine = ours.get(measurement)
        if row["row_id"] not in there:
            continue  # it vanished between two looks: the next join has it
        if row["row_id"] in here:
            joined.known += 1
        elif measurement in busy:
            joined.busy += 1
        elif mine is None or (mine["status"] not in FINAL and row["status"] in FINAL):
            bring.add(measurement)
        elif row["status"] in FINAL:
            compare.add(measurement)
        else:
            joined.known += 1
    differing = _differing(store, other, ours, theirs, compare) if compare else set()
    joined.equal = len(compare) - len(differing)
    dropped_there = other.dropped_ids()
    standing = {m for m, row in theirs.items() if row["status"] in FINAL}
    retired = {m for m, row in ours.items() if row["row_id"] in dropped_there} - standing
    joined.conflicts = list(_conflicts(store, other, differing, retired))
    joined.added, joined.again = len(bring), len(store.dropped(bring)) if bring else 0
    wanted = bring | (differing if prefer == "theirs" else set())
    if prefer == "theirs" and differing | retired:
        # Before the copy: whatever ends this in between, the next join finds them missing, and brings them.
        store.drop([ours[m]["row_id"] for m in differing | retired], why=f"mode=merge prefer=theirs from={name}")
    _copy(store, other, {theirs[m]["row_id"] for m in wanted}, say)
    joined.studies = _copy_manifests(store.out, other.out)
    return joined


def _current(store: Store) -> dict[str, Row]:
    rows = store.read(["measurement", "row_id", "status"]).to_pylist()
    return {row["measurement"]: row for row in rows}


def _differing(
    store: Store, other: Store, ours: Mapping[str, Row], theirs: Mapping[str, Row], compare: Collection[str]
) -> set[str]:
    """Return the measurements whose numbers are not alike to the last bit."""
    mine = digests(store, {ours[m]["row_id"] for m in compare})
    found = digests(other, {theirs[m]["row_id"] for m in compare})
    return {m for m in compare if mine.get(ours[m]["row_id"]) != found.get(theirs[m]["row_id"])}


def digests(store: Store, row_ids: Collection[str]) -> dict[str, bytes]:
    """Return a digest of the numbers of some rows, by row id."""
    found: dict[str, bytes] = {}
    for table in store.scan(["row_id", *_NUMBERS]):
        for row in _rows(table, row_ids).to_pylist():
            numbers = [row["status"], row["n_samples"], row["bits_per_param"], row["total_bits"]]
            numbers += [sorted(row[name] or ()) for name in ("metrics", "stderr")]
            numbers.append(sorted((s["name"], s["dtype"], s["count"], s["data"]) for s in row["samples"] or ()))
            # repr gives the shortest text that is read back as the same float, and NaN one text.
            found[row["row_id"]] = hashlib.sha256(repr(numbers).encode()).digest()
    return found


def _rows(table: pa.Table, row_ids: Collection[str]) -> pa.Table:
    import pyarrow as pa

    return table.filter(pa.array([row_id in row_ids for row_id in table.column("row_id").to_pylist()], pa.bool_()))


def _conflicts(store: Store, other: Store, differing: set[str], retired: set[str]) -> Iterator[Conflict]:
    if not differing and not retired:
        return
    mine = {r["measurement"]: r for r in store.read(_SHOWN, measurements=differing | retired).to_pylist()}
    theirs = {r["measurement"]: r for r in other.read(_SHOWN, measurements=differing).to_pylist()}
    for measurement, row in mine.items():
        yield Conflict(mine=row, theirs=theirs.get(measurement))


def _copy(store: Store, other: Store, row_ids: set[str], say: Callable[[str], None]) -> None:
    """Copy rows, each once, in files of ``ROWS_PER_FILE`` and a little more."""
    import pyarrow as pa

    left, kept, count = set(row_ids), list[pa.Table](), 0
    for table in other.scan():
        # A row that lies in a part and in its pack comes once.
        rows = _rows(table, left)
        left.difference_update(rows.column("row_id").to_pylist())
        if rows.num_rows:
            kept, count = [*kept, rows], count + rows.num_rows
        if count >= ROWS_PER_FILE or (kept and not left):
            store.add(pa.concat_tables(kept))
            kept, count = [], 0
            say(f"{len(row_ids) - len(left):,} of {len(row_ids):,} measurements joined")
    if kept:
        store.add(pa.concat_tables(kept))


def _copy_manifests(out: Path, other: Path) -> int:
    """Copy plans that aren't there, with their times, by which the newest launch of a study is known."""
    copied = 0
    for path in list_files(other / "manifests", "*.json"):
        target, modified = out / "manifests" / path.name, path.stat().st_mtime
        if not target.exists():
            write_atomically(target, path.read_bytes(), modified=modified)
            copied += 1
        elif target.stat().st_mtime < modified:
            os.utime(target, (modified, modified))
    return copied
