"""Files become few while others write, read and die: no row is lost, none is read twice, what was retired stays."""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sweeps import files
from sweeps.bench.synthetic import Synthetic, packs_of, results
from sweeps.processes import this_process
from sweeps.store import folding, records
from sweeps.store.folding import MOST_SMALL, write_folded
from sweeps.store.parts import Store
from sweeps.store.schema import arrow_schema
from tests.sweeps.store.test_parts import NOW, earlier_part, row, rows_of

DEAD = {**this_process(), "pid": 2**30, "pid_started": "1"}
AWAY = {"host": "another-machine", "pid": 1, "pid_started": "1"}


@pytest.fixture
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "GRACE_SECONDS", -1.0)


def ids_on_disk(out: Path) -> list[str]:
    """Row ids as they lie in files, one in several files several times."""
    return [i for table in Store(out=out)._reader.tables(["row_id"]) for i in table.column("row_id").to_pylist()]


def test_folding_changes_no_row_and_what_it_replaced_goes_when_no_listing_shows_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(out=tmp_path)
    for i in range(5):
        store.write(row(f"m{i}", seconds=float(i), pack=f"p{i % 2}", metrics={"loss": 1.5}))
    earlier_part(tmp_path, "m5")
    store.close()
    before, ids = rows_of(store), sorted(ids_on_disk(tmp_path))
    store.fold()
    assert rows_of(store) == before
    assert sorted(ids_on_disk(tmp_path)) == ids
    assert len(list(tmp_path.glob("packs/*"))) == 1
    assert len(list(tmp_path.glob("parts/*.rows"))) == 1
    monkeypatch.setattr(folding, "MOST_SMALL", 1)
    for later in ("m6", "m8", "m9"):
        store.write(row(later))
        store.close()
        store.fold()
    monkeypatch.setattr(folding, "GRACE_SECONDS", -1.0)
    # What a fold wrote and a later one replaced goes with what it had replaced itself.
    store.fold()
    assert not list(tmp_path.glob("parts/p1/*"))
    assert not caplog.records
    store.fold()
    store.write(row("m7"))
    store.close()
    store.fold()
    assert {r["measurement"] for r in store.read_pack("p1", ["measurement"])} == {
        "m1",
        "m3",
        *(f"m{n}" for n in range(5, 10)),
    }
    assert len(ids_on_disk(tmp_path)) == 10


def test_a_file_is_folded_when_its_writer_has_ended_or_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(out=tmp_path)
    store.write(row("m1"))
    store.fold()
    assert not list(tmp_path.glob("packs/*"))
    monkeypatch.setattr(records, "this_process", lambda: DEAD)
    other = Store(out=tmp_path)
    other.write(row("m2"))
    store.fold()
    (pack,) = tmp_path.glob("packs/*")
    assert pq.read_table(pack).column("measurement").to_pylist() == ["m2"]
    assert {p.suffix for p in tmp_path.glob("parts/*")} == {".rows", ".taken"}
    # A process that was taken for dead and lives finds out, and stores on.
    other.write(row("m3"))
    assert sorted(rows_of(store)) == ["m1", "m2", "m3"]
    assert len(ids_on_disk(tmp_path)) == 3


def test_a_writer_on_another_machine_is_left_alone_until_it_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "this_process", lambda: AWAY)
    store = Store(out=tmp_path)
    store.write(row("m1"))
    store.fold()
    assert not list(tmp_path.glob("packs/*"))
    (path,) = tmp_path.glob("parts/*.rows")
    long_ago = time.time() - folding.SILENT_SECONDS - 60
    os.utime(path, (long_ago, long_ago))
    store.fold()
    assert len(list(tmp_path.glob("packs/*"))) == 1


def test_a_row_that_came_as_its_file_was_taken_is_stored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_grace: None
) -> None:
    """The rename comes between a record and its writer's look: the fold may have read it, or not."""
    monkeypatch.setattr(records, "this_process", lambda: DEAD)
    store = Store(out=tmp_path)
    store.write(row("m1"))
    looks = records.Writer._has_name

    def fold_first(writer: records.Writer) -> bool:
        monkeypatch.setattr(records.Writer, "_has_name", looks)
        Store(out=tmp_path).fold()
        return looks(writer)

    monkeypatch.setattr(records.Writer, "_has_name", fold_first)
    store.write(row("m2"))
    assert len(rows_of(store)) == 2
    assert len(store.history(["measurement"])) == 2
    assert len(ids_on_disk(tmp_path)) == 3
    store.close()
    store.fold()
    assert len(ids_on_disk(tmp_path)) == 2, "and the second copy is dropped"


def test_what_killed_writers_and_launchers_of_earlier_versions_left_is_folded_and_removed(
    tmp_path: Path, no_grace: None
) -> None:
    for i in range(6):
        earlier_part(tmp_path, f"m{i}")
    names = [tmp_path / "parts" / ".m.parquet.1.tmp", tmp_path / "parts" / "p1" / ".m.parquet.1.tmp"]
    for path in names:
        path.write_bytes(b"PAR1")
    store = Store(out=tmp_path)
    store.fold()
    assert [p.suffix for p in tmp_path.glob("packs/*")] == [".parquet"]
    assert all(p.exists() for p in names), "their writers may be at it"
    for path in (*names, tmp_path / "parts" / "p1"):
        os.utime(path, (0, 0))
    for i in range(2):  # what was replaced first, then the directory that is empty by that
        store.write(row(f"n{i}"))
        store.close()
        store.fold()
        if (tmp_path / "parts" / "p1").exists():
            os.utime(tmp_path / "parts" / "p1", (0, 0))
    assert not (tmp_path / "parts" / "p1").exists()
    assert not [p for p in names if p.exists()]
    assert len(rows_of(store)) == 8


def test_many_small_files_become_few_and_full_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "FULL_BYTES", 600_000)
    full = tmp_path / "packs" / "full.parquet"
    write_folded(pa.Table.from_pylist([full_row(n) for n in range(60)], arrow_schema()), full)
    assert full.stat().st_size > 300_000
    for n in range(MOST_SMALL):
        one = pa.Table.from_pylist([{"row_id": f"{n}", **row(f"m{n}")}], arrow_schema())
        write_folded(one, full.with_stem(f"m{n}"))
    Store(out=tmp_path).fold()
    monkeypatch.setattr(folding, "GRACE_SECONDS", -1.0)
    earlier_part(tmp_path, "last")
    Store(out=tmp_path).fold()
    left = list(tmp_path.glob("packs/*"))
    assert full in left
    assert len(left) < 6
    assert len(rows_of(Store(out=tmp_path))) == 60 + MOST_SMALL + 1


def test_a_fold_of_records_makes_full_files_which_no_later_one_takes_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "FULL_BYTES", 500_000)
    monkeypatch.setattr(folding, "MOST_SMALL", 2)
    # Rows as wide as a study's, and as alike, in several writers' files.
    packs = itertools.islice(packs_of(Synthetic(out=tmp_path, measurements=2000).manifest()), 10)
    for number, (pack, measurements) in enumerate(packs):
        store = Store(out=tmp_path)
        for made in results(pack, measurements, seed=number):
            store.write(made)
        store.close()
    Store(out=tmp_path).fold()
    written = {path.name: path.stat().st_size for path in tmp_path.glob("packs/*")}
    assert len(written) > 1
    assert sorted(written.values())[1] >= 250_000  # all but the last
    Store(out=tmp_path).fold()
    assert {path.name for path in tmp_path.glob("packs/*")} == set(written)


def full_row(n: int) -> dict[str, Any]:
    data = random.Random(n).randbytes(6000)
    return {"row_id": f"f{n}", **row(f"f{n}"), "samples": [{"name": "x", "dtype": "bits", "count": 1, "data": data}]}


def test_one_process_folds_at_a_time_and_a_dead_ones_lease_is_void(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(out=tmp_path)
    store.write(row("m1"))
    store.close()
    lease = tmp_path / "packs" / ".lease"
    lease.parent.mkdir()
    lease.write_text(json.dumps(this_process()))
    store.fold()
    assert not list(tmp_path.glob("packs/*.parquet"))
    lease.write_text(json.dumps(DEAD))
    store.fold()
    assert len(list(tmp_path.glob("packs/*.parquet"))) == 1
    assert not lease.exists()


def test_columns_of_another_installation_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package's own axis, or a later version's column: whoever folds without it loses nothing."""
    path = earlier_part(tmp_path, "m1")
    table = pq.read_table(path)
    pq.write_table(table.append_column("new_axis", pa.array([7])), path)
    store = Store(out=tmp_path)
    store.write(row("m2"))
    store.close()
    store.fold()
    (pack,) = tmp_path.glob("packs/*")
    assert sorted(pq.read_table(pack).column("new_axis").to_pylist(), key=str) == [7, None]
    with monkeypatch.context() as patch:
        more = arrow_schema().append(pa.field("new_axis", pa.int64()))
        patch.setattr("sweeps.store.parts.arrow_schema", lambda: more)
        store.write(row("m3", new_axis=8))
        store.close()
    store.fold()
    assert sorted(rows_of(store)) == ["m1", "m2", "m3"]
    (waiting,) = (p for p in tmp_path.glob("parts/*.rows") if b"m3" in str(records.read_records(p).rows).encode())
    assert records.read_records(waiting).rows[0]["new_axis"] == 8


@pytest.mark.parametrize("cut", [1, 5, 15, 17, 100])
def test_a_record_that_was_cut_off_is_nothing_and_those_before_it_are_whole(tmp_path: Path, cut: int) -> None:
    store = Store(out=tmp_path)
    store.write(row("m1"))
    (path,) = tmp_path.glob("parts/*")
    whole = path.stat().st_size
    store.write(row("m2"))
    data = path.read_bytes()
    path.write_bytes(data[: whole + cut])
    assert sorted(rows_of(store)) == ["m1"]
    path.write_bytes(data[:whole] + bytes(cut))
    assert sorted(rows_of(store)) == ["m1"]
    assert not store.damaged


def test_a_damaged_record_is_reported_and_those_around_it_count_and_stay(tmp_path: Path) -> None:
    store = Store(out=tmp_path)
    ends = []
    for n in range(3):
        store.write(row(f"m{n}"))
        (path,) = tmp_path.glob("parts/*")
        ends.append(path.stat().st_size)
    store.close()
    data = bytearray(path.read_bytes())
    data[ends[0] + 60] ^= 1
    path.write_bytes(data)
    assert sorted(rows_of(store)) == ["m0", "m2"]
    assert store.damaged == [path]
    store.fold()
    assert path.exists()
    assert not list(tmp_path.glob("packs/*.parquet"))


def test_a_writer_whose_disk_is_full_begins_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(out=tmp_path)
    store.write(row("m1"))
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0))
    write, left = os.write, 3

    def half(file: int, data: memoryview) -> int:
        nonlocal left
        if not left:
            return write(file, data)
        left -= 1
        write(file, data[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "write", half)
    with pytest.raises(OSError, match="No space"):
        store.write(row("m2"))
    store.write(row("m3"))
    left = 2
    store.write(row("m4"))  # there is room again before it gives up
    store.close()
    assert sorted(rows_of(store)) == ["m1", "m3", "m4"]
    assert not store.damaged


def _work(out: Path, name: str, told: Connection) -> None:
    """Store and fold until killed, saying what is stored."""
    store, rest = Store(out=out), 0
    while True:
        store.write(row(f"{name}-{rest}", finished=NOW + timedelta(seconds=rest)))
        told.send(f"{name}-{rest}")
        rest += 1
        if rest % 3 == 0:
            store.close()
            store.fold()


def kill(out: Path, times: int, seed: int) -> set[str]:
    """Kill two writers that also fold, so often, at random moments; return what they said was stored."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.sweeps.store.test_folding", "pyarrow.parquet"])
    choose, stored = random.Random(seed), set[str]()
    for n in range(times):
        here, there = context.Pipe(duplex=False)
        workers = [context.Process(target=_work, args=(out, f"w{n}-{i}", there)) for i in range(2)]
        for worker in workers:
            worker.start()
        there.close()
        stored.add(here.recv())
        time.sleep(choose.uniform(0.0, 0.15))
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()
        while True:
            try:
                stored.add(here.recv())
            except (EOFError, OSError):
                break
    return stored


def _all_is_there_once(out: Path, stored: set[str]) -> None:
    read = Store(out=out).read(["measurement"]).column("measurement").to_pylist()
    assert len(read) == len(set(read))
    assert stored <= set(read)
    assert len(Store(out=out).history([])) == len(read)


def test_what_was_acknowledged_is_read_whenever_writers_and_folds_are_killed(tmp_path: Path, no_grace: None) -> None:
    stored = kill(tmp_path, 10, seed=0)
    _all_is_there_once(tmp_path, stored)
    for _ in range(2):
        Store(out=tmp_path).fold()
    # A writer that was killed before it wrote its name has stored nothing; nobody can tell that it is dead.
    assert not [path for path in tmp_path.glob("parts/*") if records.read_records(path).writer]
    _all_is_there_once(tmp_path, stored)


@pytest.mark.slow
def test_the_same_of_two_hundred_kills(tmp_path: Path) -> None:
    stored = kill(tmp_path, 100, seed=1)
    assert len(stored) > 200
    Store(out=tmp_path).fold()
    _all_is_there_once(tmp_path, stored)
