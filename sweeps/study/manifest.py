"""The plan of a study, frozen at launch: its cells, evaluations, exclusions and resolved configuration.

A manifest is named by its content, so launching the same study again adds no file, and what runs can't change with the
configuration files. Beside its content a file has the keys of its cells, which no name depends on: who reads results
builds and hashes no cell. ``mode=audit`` computes them again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Final

from kbit.evaluation.evaluators import EVALUATORS
from kbit.evaluation.spec import EvalSpec
from kbit.sources import Source
from sweeps.files import JsonObject, list_files, read_json, write_atomically
from sweeps.study.cell import (
    KEY_VERSION,
    Cell,
    Measurement,
    ModelRef,
    canonical_json,
    cell_from_dict,
    eval_from_dict,
    eval_to_dict,
    model_to_dict,
    quant_text,
)
from sweeps.study.grid import Excluded

_KEYS: Final = "keys"
"""In a file, beside the content: the keys of its cells, in their order, and the version of the rules that made them."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One study as it was planned.

    Attributes:
        chosen: measurements that a launch restricts itself to, by key; None is all. No part of what was planned: it is
            neither saved nor named.
    """

    sweep: str
    cells: tuple[Cell, ...]
    evals: tuple[EvalSpec, ...]
    excluded: tuple[Excluded, ...]
    config: Mapping[str, object]
    chosen: frozenset[str] | None = None

    def measurements(self) -> Iterator[Measurement]:
        """Yield every measurement, cell by cell (some are of baselines only), and what methods need first of models."""
        return iter(self._measurements)

    @cached_property
    def _measurements(self) -> tuple[Measurement, ...]:
        """The same, made once, so that each key is computed once: commands go through them many times."""
        of_all = [spec for spec in self.evals if not EVALUATORS[spec.kind].baseline_only]
        if len(of_all) == len(self.evals):
            found = list(Measurement.of_cells(self.cells, self.evals))
        else:
            by_cell = ((cell, self.evals if cell.quant.is_baseline else of_all) for cell in self.cells)
            found = [m for cell, evals in by_cell for m in Measurement.of_cells([cell], evals)]
        return (*found, *dict.fromkeys(cell.first for cell in self.cells if cell.first is not None))

    @cached_property
    def models(self) -> tuple[ModelRef, ...]:
        """The models of its cells, each once, in their order."""
        return tuple(dict.fromkeys({id(cell.model): cell.model for cell in self.cells}.values()))

    def restricted(self, chosen: frozenset[str]) -> Manifest:
        """Return it for a launch that runs these measurements alone."""
        part = replace(self, chosen=chosen)
        vars(part)["_measurements"] = self._measurements  # whose keys are known
        return part

    def wanted(self) -> Iterator[Measurement]:
        """Yield the measurements that a launch may run."""
        return (m for m in self.measurements() if self.chosen is None or m.key in self.chosen)

    def wanted_cells(self) -> list[Cell]:
        """Return the cells of these measurements, in their order."""
        return list(self.cells) if self.chosen is None else list(dict.fromkeys(m.cell for m in self.wanted()))

    def sources(self) -> list[Source | None]:
        """Return the sources of its evaluations' and calibrations' data."""
        calibrations = dict.fromkeys(c.calibration for c in self.cells if c.calibration is not None)
        return [e.source for e in self.evals] + [c.source for c in calibrations]

    @cached_property
    def _content(self) -> str:
        """Its canonical JSON."""
        index = {model: i for i, model in enumerate(self.models)}
        # Cells of a model share it, and hashing its fields takes longer than asking whether it is the same.
        places = {place: index[model] for place, model in {id(c.model): c.model for c in self.cells}.items()}
        cells = ",".join(f"[{places[id(c.model)]},{quant_text(c)}]" for c in self.cells)
        others = {
            "sweep": self.sweep,
            "models": [model_to_dict(m) for m in self.models],
            "evals": [eval_to_dict(e) for e in self.evals],
            "excluded": [{"axes": dict(e.axes), "reason": e.reason} for e in self.excluded],
            "config": dict(self.config),
        }
        return f'{{"cells":[{cells}],{canonical_json(others)[1:]}'

    @property
    def name(self) -> str:
        """The study's name and the hash of its content."""
        return _name(self.sweep, self._content)

    def path(self, out: Path) -> Path:
        """Return where a results directory has it."""
        return manifest_path(out, self.name)

    def save(self, out: Path) -> str:
        """Write it under its content's name and return that name."""
        path = self.path(out)
        keys = canonical_json({"version": KEY_VERSION, "cells": [cell.key for cell in self.cells]})
        data = f'{self._content[:-1]},"{_KEYS}":{keys}}}'.encode()
        if path.exists() and path.read_bytes() == data:
            # The newest launch decides which settings of an evaluation count where studies differ.
            os.utime(path)
        else:
            # Files of earlier versions lack keys, and one that was changed is what it was again.
            write_atomically(path, data)
        return self.name


def manifest_path(out: Path, name: str) -> Path:
    """Return where a results directory has a manifest, by its name."""
    return _directory(out) / f"{name}.json"


def load_manifest(path: Path) -> Manifest:
    """Read a manifest back; the same file is read once in a process, and its cells' keys are computed once."""
    about = path.stat()
    return _loaded(path, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=32)
def _loaded(path: Path, *_: int) -> Manifest:
    data = read_json(path)
    models = [ModelRef(**m) for m in data["models"]]
    keys = _stored_keys(data)
    return Manifest(
        sweep=data["sweep"],
        cells=tuple(
            cell_from_dict(models[i], q) if key is None else Cell.planned(models[i], q, key)
            for (i, q), key in zip(data["cells"], keys, strict=True)
        ),
        evals=tuple(eval_from_dict(e) for e in data["evals"]),
        excluded=tuple(Excluded(**e) for e in data["excluded"]),
        config=data["config"],
    )


def _stored_keys(data: JsonObject) -> Sequence[str | None]:
    """Return the key of each cell; None where a file has none, as those of earlier versions, or by other rules."""
    known, cells = data.get(_KEYS, {}), data["cells"]
    is_ours = known.get("version") == KEY_VERSION and len(known["cells"]) == len(cells)
    return known["cells"] if is_ours else [None] * len(cells)


def changed_manifests(out: Path, sweep: str | None = None) -> dict[Path, str]:
    """Return the manifests of a results directory, or of one study, that are not as a launch wrote them, and why not.

    Every cell is built from its content, and its key computed. Files of earlier versions have nothing to compare with.
    """
    changed = {}
    for path in list_files(_directory(out), "*.json"):
        data = read_json(path)
        why = _what_is_changed(data, path.stem) if sweep in (None, data["sweep"]) and _KEYS in data else ""
        if why:
            changed[path] = why
    return changed


def _what_is_changed(data: JsonObject, name: str) -> str:
    content = {key: value for key, value in data.items() if key != _KEYS}
    if _name(data["sweep"], canonical_json(content)) != name:
        return "its content is not what its name says"
    models = [ModelRef(**m) for m in data["models"]]
    for (index, quant), key in zip(data["cells"], _stored_keys(data), strict=True):
        cell = cell_from_dict(models[index], quant)
        if key not in (None, cell.key):
            return f"the key of {cell.label} is {key}, and {cell.key} by its content"
    return ""


def _name(sweep: str, content: str) -> str:
    return f"{sweep}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def load_manifests(out: Path, sweep: str | None = None) -> list[Manifest]:
    """Return all manifests of a results directory, or one study's, oldest first."""
    paths = sorted(list_files(_directory(out), "*.json"), key=lambda p: (p.stat().st_mtime_ns, p.name))
    manifests = [load_manifest(p) for p in paths]
    return [m for m in manifests if sweep in (None, m.sweep)]


def _directory(out: Path) -> Path:
    return out / "manifests"
