"""Results in one file: the row of each planned measurement, and outcomes of its samples, without their directory.

``mode=keep`` writes it. ``load_results``, ``load_samples`` and ``python -m analysis`` read it in a directory's place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sweeps.errors import UserError, VanishedError, did_you_mean
from sweeps.store.folding import write_folded
from sweeps.store.parts import Store
from sweeps.store.reading import Reader, check_version
from sweeps.store.samples import EncodedSample
from sweeps.store.schema import arrow_schema

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIX: Final = ".parquet"
_SAMPLES: Final = "samples"


def is_kept(out: Path) -> bool:
    """Say whether results are a file of this kind, not a directory."""
    return out.suffix.lower() == SUFFIX and out.is_file()


def write_kept(rows: pa.Table, store: Store, to: Path, outcomes: Collection[str] | None) -> None:
    """Write rows with outcomes of their samples as a file.

    Args:
        rows: as ``sweeps.results.joined`` makes them.
        store: has their samples.
        to: the file.
        outcomes: names of those to write, e.g. 'nats'; None is all.

    Raises:
        UserError: no sample has an outcome of such a name.
    """
    import pyarrow as pa

    wanted = set(rows.column("row_id").drop_null().to_pylist())
    found: dict[str, list[EncodedSample]] = {}
    names: set[str] = set()
    for table in store.scan(["row_id", _SAMPLES]):
        for row_id, samples in zip(*(table.column(n).to_pylist() for n in ("row_id", _SAMPLES)), strict=True):
            if row_id in wanted and samples:
                names.update(sample["name"] for sample in samples)
                found[row_id] = [sample for sample in samples if outcomes is None or sample["name"] in outcomes]
    for name in sorted(set(outcomes or ()) - names):
        raise UserError(
            f"samples={name!r} is not valid: samples there have {', '.join(sorted(names)) or 'none'}, or samples=[] "
            f"for none.{did_you_mean(name, names)}"
        )
    schema = arrow_schema()
    of_rows = [found.get(row_id) for row_id in rows.column("row_id").to_pylist()]
    plain = pa.schema([schema.field(name) for name in rows.schema.names])
    table = rows.cast(plain).append_column(schema.field(_SAMPLES), pa.array(of_rows, schema.field(_SAMPLES).type))
    write_folded(table.replace_schema_metadata(schema.metadata), to)


def kept_rows(path: Path, sweep: str | None = None) -> pa.Table:
    """Return a file's rows, in the columns and types of those of a directory (``sweeps.results.joined``).

    Args:
        path: of the file.
        sweep: only this study's.

    Raises:
        UserError: it is no such file, it is damaged, or it doesn't hold the study.
        StoreError: a newer version wrote it, or it can't be read.
    """
    import pyarrow.compute as pc

    rows = _read(path, [name for name in arrow_schema().names if name != _SAMPLES])
    for name in ("status", "sweep"):  # those of a directory are not encoded
        place = rows.schema.get_field_index(name)
        rows = rows.set_column(
            place, arrow_schema().field(name), rows.column(name).cast(arrow_schema().field(name).type)
        )
    if sweep is None:
        return rows
    chosen = rows.filter(pc.equal(rows.column("sweep"), sweep))
    if not len(chosen):
        known = sorted(set(rows.column("sweep").drop_null().to_pylist()))
        raise UserError(f"{str(path)!r} holds no study named {sweep!r}; it holds {', '.join(known)}")
    return chosen


def kept_samples(path: Path, measurements: Iterable[str]) -> Mapping[str, list[EncodedSample]]:
    """Return the encoded outcomes of measurements, by their keys (``load_samples`` decodes them)."""
    import pyarrow as pa

    wanted = pa.array(sorted(set(measurements)), pa.string())
    table = _read(path, ["measurement", _SAMPLES], wanted)
    return dict(zip(*(table.column(n).to_pylist() for n in ("measurement", _SAMPLES)), strict=True))


def _read(path: Path, columns: list[str], wanted: pa.Array | None = None) -> pa.Table:
    try:
        read = Reader(out=path.parent, encoded=True).folded(path, columns, wanted)
    except VanishedError as error:
        raise UserError(f"{str(path)!r} is not there") from error
    if read is None:
        raise UserError(f"{str(path)!r} is damaged, or no parquet file: fetch it again, or give a results directory")
    if not read.version:
        raise UserError(
            f"{str(path)!r} is no file of results: mode=keep writes one (mode=table writes tables for other programs)"
        )
    check_version(path, read.version)
    return read.table
