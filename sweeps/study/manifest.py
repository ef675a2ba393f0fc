"""The plan of a study, frozen at launch: its cells, evaluations, exclusions and resolved configuration.

A manifest is named by its content, so launching the same study again adds no file, and what runs can't change with the
configuration files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from kbit.evaluation.evaluators import EVALUATORS
from kbit.evaluation.spec import EvalSpec
from kbit.sources import Source
from sweeps.files import list_files, read_json, write_atomically
from sweeps.study.cell import (
    Cell,
    Measurement,
    ModelRef,
    canonical_json,
    cell_from_dict,
    eval_from_dict,
    eval_to_dict,
    model_to_dict,
    quant_to_dict,
)
from sweeps.study.grid import Excluded


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
        of_all = [spec for spec in self.evals if not EVALUATORS[spec.kind].baseline_only]
        for cell in self.cells:
            for spec in self.evals if cell.quant.is_baseline else of_all:
                yield Measurement(cell=cell, eval=spec)
        yield from dict.fromkeys(cell.first for cell in self.cells if cell.first is not None)

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
    def _data(self) -> bytes:
        return canonical_json(self._as_dict()).encode()

    @property
    def name(self) -> str:
        """The study's name and the hash of its content."""
        return f"{self.sweep}-{hashlib.sha256(self._data).hexdigest()[:16]}"

    def path(self, out: Path) -> Path:
        """Return where a results directory has it."""
        return manifest_path(out, self.name)

    def save(self, out: Path) -> str:
        """Write it under its content's name and return that name."""
        path = self.path(out)
        if path.exists():
            # The newest launch decides which settings of an evaluation count where studies differ.
            os.utime(path)
        else:
            write_atomically(path, self._data)
        return self.name

    def _as_dict(self) -> dict[str, object]:
        models = list(dict.fromkeys(c.model for c in self.cells))
        index = {model: i for i, model in enumerate(models)}
        return {
            "sweep": self.sweep,
            "models": [model_to_dict(m) for m in models],
            "cells": [[index[c.model], quant_to_dict(c)] for c in self.cells],
            "evals": [eval_to_dict(e) for e in self.evals],
            "excluded": [{"axes": dict(e.axes), "reason": e.reason} for e in self.excluded],
            "config": dict(self.config),
        }


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
    return Manifest(
        sweep=data["sweep"],
        cells=tuple(cell_from_dict(models[i], q) for i, q in data["cells"]),
        evals=tuple(eval_from_dict(e) for e in data["evals"]),
        excluded=tuple(Excluded(**e) for e in data["excluded"]),
        config=data["config"],
    )


def load_manifests(out: Path, sweep: str | None = None) -> list[Manifest]:
    """Return all manifests of a results directory, or one study's, oldest first."""
    paths = sorted(list_files(_directory(out), "*.json"), key=lambda p: (p.stat().st_mtime_ns, p.name))
    manifests = [load_manifest(p) for p in paths]
    return [m for m in manifests if sweep in (None, m.sweep)]


def _directory(out: Path) -> Path:
    return out / "manifests"
