"""A study's W&B runs: which cells share one, and what it says of itself and of them.

A run is the cells of a study that have one quantization; its configuration is the axes of that, so that people group
runs by them. All that it says of results is its summary, which is made from the store each time and takes the place of
the last one: a run has no history, so that nothing can be in it twice, in part, or when it does not count any more.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from kbit.spec import axes
from sweeps.errors import LinkError
from sweeps.files import PASSING, create_exclusively, make_inside, patiently
from sweeps.results.joined import planned
from sweeps.status import RECORDED, State
from sweeps.store.rows import rows_digest
from sweeps.store.schema import Row, Scalar
from sweeps.study.cell import canonical_json
from sweeps.study.manifest import Manifest
from sweeps.study.reading import superseded

MOST_RUNS: Final = 600
"""A study is divided into no more: with more than 1,000, W&B's pages are slow."""
STATUSES: Final = (*(s.value for s in RECORDED), State.SUPERSEDED.value)
"""What a run counts: what is stored, and of this apart what no table shows any more."""
DIGEST: Final = "store_digest"
"""In a run's summary: what tells the stored rows that it was made of from all others."""
NEEDED: Final = ("row_id", "measurement")
"""A row's columns that tell whether its run is up to date."""
SHOWN: Final = (
    *("key", "model", "eval", "status", "metrics", "stderr"),
    *("bits_per_param", "bits_per_param_nominal", "total_bits", "seconds"),
)
"""A row's columns from which a summary is made: no samples, tracebacks or names of machines."""
_FIRST: Final = ("method", "bits", "dtype", "blocksize")
_SIZES: Final = ("bits_per_param", "bits_per_param_nominal", "total_bits")
_MADE_BY: Final = 1
"""Part of every digest. A change to what a summary is made of raises it, and each run is brought up to date."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as W&B is to have it, but for its results."""

    id: str
    sweep: str
    name: str
    config: Mapping[str, Scalar]


@dataclass(frozen=True, kw_only=True)
class Division:
    """The runs of a study.

    Attributes:
        number: of its run, of each measurement that the study ever planned.
        old: measurements that its tables do not show any more.
        words: what names in a summary are made of (``words``), for all models and evaluations of the study, so that
            its runs have the same names whatever is measured of them.
    """

    runs: Sequence[Run]
    number: Mapping[str, int]
    old: frozenset[str]
    words: Mapping[str, str]

    def digest(self, rows: Iterable[tuple[str, str]]) -> str:
        """Return what tells the rows of a run, (row_id, measurement), from all others."""
        counted = [f"{row_id} {State.SUPERSEDED}" if m in self.old else row_id for row_id, m in rows]
        renamed = [f"{label} {word}" for label, word in self.words.items() if word != _plain(label)]
        return rows_digest([*counted, *renamed, f"by {_MADE_BY}"])


def directory_id(out: Path) -> str:
    """Return what tells a results directory from others, wherever it is moved; its path, where nothing can be kept.

    Raises:
        OSError: it can't be told just now (a stale mount, a full disk): the path would be that of other runs.
    """
    path = out / "tracking" / "id"
    try:
        with contextlib.suppress(FileNotFoundError):
            return patiently(path.read_text)
        make_inside(path.parent)
        create_exclusively(path, uuid.uuid4().hex.encode())
        return patiently(path.read_text)
    except OSError as error:
        is_for_good = isinstance(error, PermissionError | LinkError) or error.errno == errno.EROFS
        if not is_for_good or error.errno in PASSING:
            raise
        return str(out.resolve())


def divided(manifests: Sequence[Manifest], directory: str) -> Division:
    """Return the runs of a study.

    Args:
        manifests: of the study, oldest first; at least one.
        directory: what tells this results directory, and the W&B project, from all others: part of the runs' ids.
    """
    sweep = manifests[0].sweep
    cells = {cell.key: cell for manifest in manifests for cell in manifest.cells}
    specs = {cell.quant.canonical_text: cell.quant for cell in cells.values()}
    quants = {text: {"method": spec.method, **spec.axis_values()} for text, spec in specs.items()}
    by = alike_in(list(quants.values()))
    groups: dict[str, list[str]] = {}
    for text, values in quants.items():
        groups.setdefault(_values(values, by), []).append(text)
    number = {text: n for n, texts in enumerate(groups.values()) for text in texts}
    now = {m.key for _, m in planned(manifests).values()}
    earlier = superseded(model for manifest in manifests for model in manifest.models)
    of_measurement: dict[str, int] = {}
    old: set[str] = set()
    for manifest in manifests:
        for m in manifest.measurements():
            of_measurement[m.key] = number[m.cell.quant.canonical_text]
            if m.key not in now or m.cell.model in earlier:
                old.add(m.key)
    runs = [
        Run(
            id=_hash(canonical_json({"in": directory, "sweep": sweep, "run": group}))[:16],
            sweep=sweep,
            name=specs[texts[0]].label if len(texts) == 1 else group or sweep,
            config={"sweep": sweep, **_config([quants[text] for text in texts])},
        )
        for group, texts in groups.items()
    ]
    labels = {model.label for manifest in manifests for model in manifest.models}
    labels |= {spec.name for manifest in manifests for spec in manifest.evals}
    return Division(runs=runs, number=of_measurement, old=frozenset(old), words=words(labels))


def summary(rows: Iterable[Row], old: frozenset[str], named: Mapping[str, str] | None = None) -> dict[str, Scalar]:
    """Return what a run says of its results, from its rows (columns ``NEEDED`` and ``SHOWN``).

    ``MODEL/EVAL/METRIC`` and ``MODEL/bits_per_param``, as of the run's cell of a model; ``EVAL/METRIC`` is the median
    over models. Where several cells are of one model (seeds; a quantization that is not the run's alone), it is theirs.
    Counts are of measurements by status, and of cells.

    Args:
        rows: stored rows, of one run.
        old: as ``Division.old``.
        named: as ``Division.words``.
    """
    word = dict(named or {})
    found: dict[str, list[float]] = {}
    sizes: dict[str, dict[str, float]] = {}
    model_of: dict[str, str] = {}
    counts = dict.fromkeys(STATUSES, 0)
    seconds = 0.0
    for row in rows:
        is_old = row["measurement"] in old
        counts[State.SUPERSEDED.value if is_old else row["status"]] += 1
        if is_old:
            continue
        # Rows of one cell may lack what others of it have: those that failed before it was known.
        sizes.setdefault(row["key"], {}).update({name: row[name] for name in _SIZES if row[name] is not None})
        seconds += row["seconds"] or 0.0
        model, evaluation = (word.get(row[column]) or _plain(row[column]) for column in ("model", "eval"))
        model_of[row["key"]] = model
        for suffix, values in (("", row["metrics"]), ("_stderr", row["stderr"])):
            for metric, value in dict(values or ()).items():
                if value is not None and value == value:  # not NaN
                    found.setdefault(f"{model}/{evaluation}/{_plain(metric)}{suffix}", []).append(value)
    for key, of_cell in sizes.items():
        for name, value in of_cell.items():
            found.setdefault(f"{model_of[key]}/{name}", []).append(value)
    of_models = {name: median(values) for name, values in found.items()}
    over_models: dict[str, list[float]] = {}
    for name, value in of_models.items():
        if not name.endswith("_stderr"):
            over_models.setdefault(name.partition("/")[2], []).append(value)
    values = {**of_models, **{name: median(of) for name, of in over_models.items()}}
    # The median of the two infinities is no number.
    numbers = {name: value for name, value in values.items() if value == value}
    told = {name: value if abs(value) != float("inf") else _infinity(value) for name, value in numbers.items()}
    return {**told, **counts, "cells": len(sizes), "measurements": sum(counts.values()), "seconds": seconds}


def words(labels: Iterable[str]) -> dict[str, str]:
    """Return what each label is called in the names of a summary: in letters, digits and '_', which W&B asks for.

    Where that would give two labels one name, each has the beginning of its hash too.
    """
    known = sorted(set(labels))
    counts = Counter(map(_plain, known))
    return {a: _plain(a) if counts[_plain(a)] == 1 else f"{_plain(a)}_{_hash(a)[:6]}" for a in known}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def alike_in(quants: Sequence[Mapping[str, object]]) -> tuple[str, ...]:
    """Return the axes in which the cells of a run are alike: all of a quantization, or as few first ones as it takes.

    What was planned decides, not what was measured; and neither how many models there are.
    """
    ways = [("method", *axes()), *(_FIRST[:n] for n in range(len(_FIRST), 0, -1))]
    return next((by for by in ways if len({_values(q, by) for q in quants}) <= MOST_RUNS), ())


def _values(quant: Mapping[str, object], by: Iterable[str]) -> str:
    """Return a quantization's values of some axes, but those that it has not."""
    return ", ".join(f"{name} {quant[name]}" for name in by if quant.get(name) is not None)


def _config(quants: Sequence[Mapping[str, object]]) -> dict[str, Scalar]:
    """Return each axis with the value that a run's quantizations have, where they have one."""
    first = quants[0]
    alike = {name: value for name, value in first.items() if all(q.get(name) == value for q in quants)}
    return {name: value for name, value in alike.items() if isinstance(value, str | bool | int | float)}


def _plain(label: str) -> str:
    """Return a label without what W&B takes for levels of a name, or its filters for signs."""
    return re.sub(r"\W", "_", label, flags=re.ASCII)


def _infinity(value: float) -> str:
    """Return an infinite number as W&B writes it, since JSON has none."""
    return "Infinity" if value > 0 else "-Infinity"
