"""Nothing stored is ever lost, and every measurement has one row."""

from __future__ import annotations

import math
import multiprocessing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sweeps.errors import StoreError
from sweeps.store.folding import write_folded
from sweeps.store.parts import Store
from sweeps.store.samples import decode_samples, encode_samples
from sweeps.store.schema import arrow_schema, columns, markdown
from tests import ROOT

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def row(measurement: str, status: str = "done", minutes: int = 0, pack: str = "p1", **more: Any) -> dict[str, Any]:
    return {
        "key": "cell",
        "measurement": measurement,
        "status": status,
        "pack": pack,
        "finished": NOW + timedelta(minutes=minutes),
        **more,
    }


def rows_of(store: Store) -> dict[str, dict[str, Any]]:
    rows = store.read().to_pylist()
    assert len({r["measurement"] for r in rows}) == len(rows)
    return {r["measurement"]: r for r in rows}


def test_a_row_comes_back_as_it_was_written(tmp_path: Path) -> None:
    store = Store(out=tmp_path)
    metrics = {"loss": 1.25, "perplexity": math.inf}
    store.write(row("m1", metrics=metrics, bits=4, samples={"acc": np.array([True, False, True])}))
    read = rows_of(store)["m1"]
    assert dict(read["metrics"]) == metrics
    assert read["bits"] == 4
    assert read["finished"] == NOW
    (encoded,) = store.read(["samples"]).column("samples").to_pylist()
    assert decode_samples(encoded)["acc"].tolist() == [True, False, True]


def test_a_result_counts_before_a_later_failure_and_the_newest_of_equals(tmp_path: Path) -> None:
    store = Store(out=tmp_path)
    store.write(row("m1", "done", minutes=1, seconds=1.0))
    store.write(row("m1", "failed", minutes=2))
    store.write(row("m2", "failed", minutes=1))
    store.write(row("m2", "diverged", minutes=2))
    store.write(row("m3", "done", minutes=5, seconds=5.0))
    store.write(row("m3", "done", minutes=4, seconds=4.0))
    rows = rows_of(store)
    assert {k: r["status"] for k, r in rows.items()} == {"m1": "done", "m2": "diverged", "m3": "done"}
    assert rows["m3"]["seconds"] == 5.0


def test_dropped_rows_stay_on_disk_and_no_longer_count(tmp_path: Path) -> None:
    store = Store(out=tmp_path)
    store.write(row("m1"))
    (file,) = tmp_path.glob("parts/*")
    before = file.read_bytes()
    store.drop([rows_of(store)["m1"]["row_id"]], why="wrong data")
    assert rows_of(store) == {}
    assert file.read_bytes() == before
    store.write(row("m1", minutes=1))
    assert rows_of(store)["m1"]["status"] == "done"
    store.close()
    store.fold()
    assert [r["measurement"] for r in store.history(["measurement"])] == ["m1", "m1"]
    assert store.undo_drop() == (1, "wrong data")


def earlier_part(out: Path, measurement: str) -> Path:
    """A part as earlier versions stored them: a parquet file of one measurement."""
    read = [{"row_id": f"id-{measurement}", **row(measurement, pack="p1")}]
    path = out / "parts" / "p1" / f"{measurement}-0123.parquet"
    write_folded(pa.Table.from_pylist(read, schema=arrow_schema()), path)
    return path


def test_stale_temporary_and_truncated_files_do_not_stop_reading(tmp_path: Path) -> None:
    store = Store(out=tmp_path)
    earlier_part(tmp_path, "m1")
    victim = earlier_part(tmp_path, "m2")
    victim.write_bytes(victim.read_bytes()[:100])
    (tmp_path / "parts" / "p1" / ".m3.parquet.1234.tmp").write_bytes(b"half a part")
    assert sorted(rows_of(store)) == ["m1"]
    assert set(store.damaged) == {victim}
    store.fold()
    assert sorted(rows_of(store)) == ["m1"]
    assert victim.exists()


def test_a_damaged_file_is_reported_and_an_unreadable_one_is_not_taken_for_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(out=tmp_path)
    path = earlier_part(tmp_path, "m1")
    path.write_bytes(b"garbage")
    assert rows_of(store) == {}
    assert str(path) in caplog.text
    store.write(row("m2"))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for where in ("pyarrow.parquet.ParquetFile", "sweeps.store.reading.read_records"):
        with monkeypatch.context() as patch:
            patch.setattr(where, refuse)
            with pytest.raises(StoreError, match="Permission denied"):
                store.read()


def test_dropping_retires_older_rows_too(tmp_path: Path) -> None:
    store = Store(out=tmp_path)
    store.write(row("m1", "failed", minutes=1))
    store.write(row("m1", "done", minutes=2))
    store.write(row("m2"))
    store.drop(store.row_ids({"m1"}), why="wrong")
    assert sorted(rows_of(store)) == ["m2"]


def test_a_damaged_record_of_the_store_is_named(tmp_path: Path) -> None:
    store = Store(out=tmp_path)
    store.drop(["x"], why="")
    (path,) = tmp_path.glob("dropped/*")
    path.write_text('{"row_ids": [')
    with pytest.raises(StoreError, match=path.name):
        store.read()


def test_a_part_of_an_older_schema_is_read(tmp_path: Path) -> None:
    path = earlier_part(tmp_path, "m1")
    pq.write_table(pq.read_table(path).drop_columns(["seed", "host"]), path)
    store = Store(out=tmp_path)
    assert rows_of(store)["m1"]["host"] is None
    store.fold()
    assert rows_of(store)["m1"]["host"] is None
    assert pq.read_schema(next(tmp_path.glob("packs/*"))).names == arrow_schema().names


@pytest.mark.parametrize("wrong", [{"speed": 1}, {"bits": "four"}, {"metrics": {"loss": "low"}}])
def test_an_unknown_column_or_type_is_a_mistake_and_nothing_is_stored(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises((ValueError, pa.ArrowException), match=r"speed|four|low"):
        Store(out=tmp_path).write(row("m1", **wrong))
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can't be written"):
        Store(out=tmp_path / "file" / "out").check_writable()


def _write_many(out: Path, worker: int) -> None:
    store = Store(out=out)
    for i in range(10):
        store.write(row(f"w{worker}-{i}", pack=f"pack{worker}"))
        if i % 3 == 2:
            store.close()
            store.fold()
    store.close()
    store.fold()


def test_readers_see_a_growing_set_while_others_write_and_compact(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(tmp_path, n)) for n in range(2)]
    for writer in writers:
        writer.start()
    seen: set[str] = set()
    while any(w.is_alive() for w in writers):
        now = set(rows_of(Store(out=tmp_path)))
        assert seen <= now
        seen = now
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(rows_of(Store(out=tmp_path))) == 20


arrays = st.one_of(
    hnp.arrays(np.bool_, st.integers(0, 40)),
    hnp.arrays(np.int32, st.integers(0, 40)),
    hnp.arrays(np.float32, st.integers(0, 40)),
)


@given(st.dictionaries(st.text(min_size=1, max_size=8), arrays, max_size=3))
def test_samples_survive_encoding(samples: dict[str, Any]) -> None:
    decoded = decode_samples(encode_samples(samples))
    assert decoded.keys() == samples.keys()
    for name, values in samples.items():
        np.testing.assert_array_equal(decoded[name], values)


def test_every_column_is_documented() -> None:
    assert [f.name for f in arrow_schema()] == [c.name for c in columns()]
    assert all(c.doc for c in columns())
    written = (ROOT / "sweeps" / "store" / "SCHEMA.md").read_text()
    assert markdown() in written, "run python -m sweeps.store.schema and put its output into sweeps/store/SCHEMA.md"
