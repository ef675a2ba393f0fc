"""A study's W&B runs: which cells share one, what it is called, and what it says of itself and of each cell.

A run is a group of cells that are alike in some axes (``by``), which are its configuration, so that people group runs
by them. Its steps are its cells. Neither packs, launches nor machines make a difference: a run's id is the hash of the
study's name and of these axes' values.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Final

from kbit.spec import axes
from sweeps.errors import UserError
from sweeps.files import create_exclusively, make_directory, read_json
from sweeps.status import RECORDED, State
from sweeps.store.schema import Row, Scalar
from sweeps.study.cell import axis_names, canonical_json
from sweeps.study.manifest import Manifest

MOST_RUNS: Final = 500
"""A study is divided into no more runs, where nobody asks for others: pages stay fast, and syncing takes minutes."""
USUAL_RUNS: Final = 200
"""Nor into more than these by axes that fewer people group by."""
ADVISED_RUNS: Final = 1000
"""More runs than this in a study are spoken of."""
STATUSES: Final = (*(s.value for s in RECORDED), State.SUPERSEDED.value)
"""What a run counts: what is stored, and of this apart what no table shows any more."""
SEVERAL: Final = "several"
"""The value of an axis in which a run's cells differ."""
_FIRST: Final = ("method", "bits", "dtype", "blocksize")
_LAST: Final = ("family", "model", "checkpoint", "calibration_seed")


@cache
def step_columns() -> tuple[str, ...]:
    """Return a row's columns that become columns of a run's history: what a cell is, and its size."""
    of_cell = ("key", "label", "family", "model", "checkpoint", "params", "tokens_seen", "method", *axes())
    sizes = ("bits_per_param", "bits_per_param_nominal", "total_bits", "total_bits_nominal")
    return (*of_cell, "calibration", "calibration_seed", *sizes)


def row_columns() -> tuple[str, ...]:
    """Return the columns that a mirror reads of the store: no samples, tracebacks or names of machines."""
    return ("sweep", "measurement", *step_columns(), "eval", "status", "metrics", "stderr", "error_type", "seconds")


@dataclass(frozen=True, kw_only=True)
class MirroredRun:
    """A run as W&B is to hold it.

    Attributes:
        rows: of its measurements, by ``token``.
    """

    id: str
    sweep: str
    name: str
    config: Mapping[str, Scalar]
    rows: Mapping[str, Row]

    @property
    def counts(self) -> dict[str, int]:
        counts = Counter(row["status"] for row in self.rows.values())
        return {status: counts[status] for status in STATUSES}

    def summary(self) -> dict[str, Scalar]:
        """Return its counts and, per '{eval}/{metric}', the median of its cells: where it has one cell, its value."""
        values: dict[str, list[float]] = {}
        current = [row for row in self.rows.values() if row["status"] != State.SUPERSEDED.value]
        for row in current:
            for name, value in row["metrics"].items():
                if value is not None and value == value:  # not NaN
                    values.setdefault(f"{row['eval']}/{name}", []).append(value)
        sizes = {row["key"]: row for row in current}.values()
        for name in ("params", "bits_per_param", "total_bits"):
            values[name] = [row[name] for row in sizes if row.get(name) is not None]
        medians = {name: median(of) for name, of in values.items() if of}
        return {**medians, **self.counts, "cells": len(sizes), "measurements": len(self.rows)}


def chosen(cells: Sequence[Mapping[str, object]]) -> tuple[str, ...]:
    """Return the axes by which a study is divided into runs.

    Method, bits, data type and block size come first, as far as ``MOST_RUNS`` allow, then the other axes of
    quantization, then family and model, as far as ``USUAL_RUNS`` do. So a run of a small study is a cell, and of a
    large one a quantization, whose steps are models.

    Args:
        cells: values of the axes, of each cell.
    """
    others = [name for name in axis_names() if name not in (*_FIRST, *_LAST)]
    groups: list[object] = [0] * len(cells)
    by, count = [], 1
    for name in (*_FIRST, *others, *_LAST):
        numbers: dict[tuple[object, str], int] = {}
        finer: list[object] = [
            numbers.setdefault((group, _text(cell, name)), len(numbers))
            for group, cell in zip(groups, cells, strict=True)
        ]
        if len(numbers) <= (MOST_RUNS if name in _FIRST else max(USUAL_RUNS, count)):
            by.append(name)
            groups, count = finer, len(numbers)
    return tuple(by)


def settled(
    out: Path, sweep: str, asked: Sequence[str] | None, cells: Iterable[Mapping[str, object]]
) -> tuple[str, ...]:
    """Return the axes by which a study is divided, as its first launch that was mirrored chose them.

    A study that grows keeps them, or all that W&B has would come a second time in other runs.

    Args:
        out: the results directory.
        sweep: the study's name.
        asked: what ``tracking.by`` asks for; None is ``chosen``.
        cells: what the study plans now, for ``chosen``.

    Raises:
        UserError: others are asked for than those that were chosen.
    """
    directory = out / "tracking"
    path = directory / f"{sweep}.json"
    if not path.exists():
        by = list(asked) if asked else list(chosen(list(cells)))
        make_directory(directory)
        create_exclusively(path, canonical_json({"by": by}).encode())
    known = tuple(read_json(path)["by"])
    if asked and set(asked) != set(known):
        raise UserError(
            f"tracking.by=[{','.join(asked)}]: the runs of {sweep} in W&B are by {', '.join(known)} since its first "
            f"launch. To have others, remove {path} and take another tracking.project, or delete those runs"
        )
    return known


def division(manifest: Manifest, by: Sequence[str]) -> str:
    """Say into how many runs a study is divided, and by what."""
    cells = [cell.axes() for cell in manifest.cells]
    runs = len({_values(cell, by) for cell in cells})
    differ = [name for name in axis_names() if len({_text(cell, name) for cell in cells}) > 1]
    apart = ", ".join(name for name in by if name in differ) or "nothing"
    together = ", ".join(name for name in differ if name not in by)
    text = f"W&B: {manifest.sweep} is {runs:,} runs by {apart}" + (f"; steps differ in {together}" if together else "")
    if runs > ADVISED_RUNS:
        text += f". More than {ADVISED_RUNS:,} are slow: take fewer axes (tracking.by=) in another tracking.project"
    return text


def divided(sweep: str, rows: Iterable[Row], by: Sequence[str]) -> list[MirroredRun]:
    """Return the runs of a study.

    Args:
        sweep: its name.
        rows: of the store, with ``row_columns``; metrics and stderr are mappings.
        by: axes.
    """
    groups: dict[str, list[Row]] = {}
    of_cell: dict[str, str] = {}
    for row in rows:
        if row["key"] not in of_cell:
            of_cell[row["key"]] = _values(row, by)
        groups.setdefault(of_cell[row["key"]], []).append(row)
    return [
        MirroredRun(
            id=hashlib.sha256(canonical_json({"sweep": sweep, "run": values}).encode()).hexdigest()[:16],
            sweep=sweep,
            name=_name(of_group, by),
            config={"sweep": sweep, **_config({row["key"]: row for row in of_group}.values())},
            rows={token(row): row for row in of_group},
        )
        for values, of_group in groups.items()
    ]


def token(row: Row) -> str:
    """12 hex digits that stand for a measurement and its outcome: measured again with other numbers, it is another one.

    Numbers enter with 6 digits, so that a row counts the same before and after it went through the store.
    """
    metrics = {k: f"{float(v):.6g}" for k, v in row["metrics"].items() if v is not None}
    text = json.dumps([row["measurement"], row["status"], sorted(metrics.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def steps(rows: Iterable[Row]) -> list[dict[str, Scalar]]:
    """Return measurements as steps of a run, smaller models first: a cell has one, with '{eval}/{metric}' and so on.

    A second result of an evaluation takes another step. One that is superseded has no numbers: its step says so of the
    one that may stand before it.
    """
    made: dict[str, list[dict[str, Scalar]]] = {}
    for row in sorted(rows, key=lambda r: (r.get("params") or 0, r["key"])):
        name, of_cell = row["eval"], made.setdefault(row["key"], [])
        step = next((s for s in of_cell if f"{name}/status" not in s), None)
        if step is None:
            step = {k: row[k] for k in step_columns() if row.get(k) is not None}
            of_cell.append(step)
        about = {"status": row["status"]}
        if row["status"] != State.SUPERSEDED.value:
            about |= {"seconds": row.get("seconds"), "error_type": row.get("error_type"), **row["metrics"]}
            about |= {f"{metric}_stderr": value for metric, value in row["stderr"].items()}
        step |= {f"{name}/{what}": value for what, value in about.items() if value is not None}
    return [step for of_cell in made.values() for step in of_cell]


def _config(rows: Collection[Row]) -> dict[str, Scalar]:
    """Return each axis with the value that a run's cells have; of one in which they differ, that they do.

    Args:
        rows: one of each cell.
    """
    found: dict[str, Scalar] = {}
    for name in (*axis_names(), "params", "label"):
        if len({_text(row, name) for row in rows}) == 1:
            # Rows of earlier versions lack an axis that came later, which is the same as its neutral value.
            value = next((row[name] for row in rows if row.get(name) is not None), None)
            if value is not None:
                found[name] = value
        elif name != "params":  # of which one can only sort numbers
            found[name] = SEVERAL
    return found


def _name(rows: Sequence[Row], by: Sequence[str]) -> str:
    """Return what people see in W&B."""
    first = rows[0]
    of_model = next((str(first[name]) for name in ("model", "family") if name in by), None)
    labels = {row["label"] for row in rows}
    about = [f"{name} {first[name]}" for name in by if name not in _LAST and first.get(name) is not None]
    quant = labels.pop() if len(labels) == 1 else ", ".join(about) or "all"
    return f"{of_model} {quant}" if of_model else str(quant)


def _values(cell: Mapping[str, object], by: Sequence[str]) -> str:
    return "\n".join(f"{name}={_text(cell, name)}" for name in sorted(by))


def _text(cell: Mapping[str, object], name: str) -> str:
    value = cell.get(name)
    is_neutral = name in axes() and axes()[name].is_neutral(value)
    return json.dumps(None if is_neutral else value, sort_keys=True)
