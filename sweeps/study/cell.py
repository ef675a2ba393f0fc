"""Identity: a cell is one model under one quantization; a measurement is a cell under one evaluation.

Identity is content: a key is the SHA-256 of the canonical JSON of what defines the thing, so the same cell in two
studies has one key and runs once. Where it runs, and what it is called, is not part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import TYPE_CHECKING, Final, Self

from kbit.axes import Axis
from kbit.calibration import Calibration
from kbit.evaluation.spec import EvalSpec, eval_axes
from kbit.sources import source_from_dict, source_to_dict
from kbit.spec import QuantSpec, Spec, axes, spec_from_canonical
from kbit.specs.base import BASELINE_BITS
from sweeps.files import JsonObject

KEY_VERSION: Final = 1
"""Part of every key. A change to what a key is made of raises it and migrates the store."""

UNRESOLVED: Final = "unresolved:"
_EVAL_COLUMNS: Final = {
    "name": "eval",
    "kind": "eval_kind",
    "version": "eval_version",
    "device": "eval_device",
    "bos": "eval_bos",
    "attention": "eval_attention",
    "execution": "eval_execution",
    "definition": "eval_definition",
    "seed": "eval_seed",
}
"""Columns with another name than the field of the evaluation."""


def canonical_json(value: Mapping[str, object]) -> str:
    """Sorted, compact JSON without NaN: equal contents give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """A model: from the hub at a commit, or a local directory with the hash of its contents.

    Attributes:
        family, name: what people call it ('pythia', '70m'); not identity.
        params: parameters, tied ones counted once; None where unknown.
        hub_id, commit: of the hub; a commit that starts with 'unresolved:' is only ever planned, never run.
        path, weights_hash: of a local directory.
        checkpoint: the revision that a study asks for by name ('step1000'); None where it asks for none. Its commit is
            identity, not its name.
        tokens_seen: tokens that the checkpoint was trained on; None where the family doesn't say.
        reading: which of its matrices are taken (``kbit.models.readings``); identity, but where it is 1.
        reading_reason: why earlier readings don't count.
    """

    family: str
    name: str
    params: int | None = None
    hub_id: str | None = None
    commit: str | None = None
    path: str | None = None
    weights_hash: str | None = None
    checkpoint: str | None = None
    tokens_seen: int | None = None
    reading: int = 1
    reading_reason: str | None = None

    def __post_init__(self) -> None:
        if not (self.hub_id and self.commit) and not (self.path and self.weights_hash):
            raise ValueError(f"model {self.name}: needs a hub id and a commit, or a path and the hash of its weights")

    @property
    def identity(self) -> dict[str, str | int]:
        return self.origin if self.reading == 1 else {**self.origin, "reading": self.reading}

    @property
    def origin(self) -> dict[str, str | int]:
        """What its files are, whatever is read of them."""
        if self.weights_hash:
            return {"weights": self.weights_hash}
        return {"hub": str(self.hub_id), "commit": str(self.commit)}

    @property
    def label(self) -> str:
        """'pythia-70m'; a directory's name, or one that holds its family, stands alone ('neox-s', 'gpt2-xl')."""
        alone = self.path is not None or self.name.lower().startswith(self.family.lower())
        name = self.name if alone else f"{self.family}-{self.name}"
        return name if self.checkpoint is None else f"{name}@{self.checkpoint}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model under one quantization.

    Attributes:
        calibration: what a method that calibrates reads; None for the others, whose keys know nothing of it.
    """

    model: ModelRef
    quant: Spec
    calibration: Calibration | None = None

    @classmethod
    def planned(cls, model: ModelRef, data: JsonObject, key: str) -> Self:
        """Return a cell of a plan that was frozen, with the key that the plan has for it.

        Its quantization is read when it is asked for: a reader of results needs that of no cell that was measured.

        Args:
            model: the cell's.
            data: what ``quant_to_dict`` gave.
            key: trusted; ``mode=audit`` computes it again.
        """
        cell = cls.__new__(cls)
        vars(cell).update(model=model, calibration=_calibration(data), key=key, _data=data)
        return cell

    if not TYPE_CHECKING:  # that is told of no attribute but the fields

        def __getattr__(self, name: str) -> object:
            if name != "quant" or "_data" not in vars(self):
                raise AttributeError(name)
            spec = vars(self)["quant"] = _spec(vars(self)["_data"])
            return spec

    @cached_property
    def key(self) -> str:
        # Of canonical_json({"calibration", "key_version", "model", "quant"}), whose parts many cells share.
        data = "" if self.calibration is None else f'"calibration":{canonical_json(self.calibration.canonical())},'
        of_model = f'"key_version":{KEY_VERSION},"model":{_identity_text(self.model)}'
        text = f'{{{data}{of_model},"quant":{self.quant.canonical_text}}}'
        return hashlib.sha256(text.encode()).hexdigest()

    def __hash__(self) -> int:
        # Grids look cells up many times, and hashing some thirty fields takes longer than all else there.
        return hash(self.key)

    @property
    def calibration_seed(self) -> int | None:
        """The seed by which replicates differ; None for a method in which nothing is random."""
        return None if self.calibration is None else self.calibration.seed

    @cached_property
    def first(self) -> Measurement | None:
        """What has to be measured of its 16-bit model before it is quantized (``Spec.measures``); None for most."""
        if self.calibration is None or self.quant.measures is None:
            return None
        baseline = Cell(model=self.model, quant=QuantSpec(bits=BASELINE_BITS))
        return Measurement(cell=baseline, eval=EvalSpec.of_calibration(self.quant.measures, self.calibration))

    @cached_property
    def quant_label(self) -> str:
        """The quantization in short, with what it was calibrated on."""
        return self.quant.label + ("" if self.calibration is None else f", {self.calibration.label}")

    @property
    def label(self) -> str:
        return f"{self.model.label} {self.quant_label}"

    def chosen_by(self) -> dict[str, object]:
        """Return what ``where=`` compares: every axis, the label, and the calibration in words (None without one).

        As columns have them, but that a column ``calibration`` has the data's identity.
        """
        words = None if self.calibration is None else self.calibration.label
        return {**self.axes(), "label": self.quant_label, "calibration": words}

    def axes(self) -> dict[str, object]:
        """Return every axis by name, for tables and filters (None where it does not apply)."""
        model = self.model
        of_model = {"family": model.family, "model": model.label, "checkpoint": model.checkpoint}
        named = {**of_model, "method": self.quant.method, "calibration_seed": self.calibration_seed}
        return {**dict.fromkeys(axis_names()), **named, **self.quant.axis_values()}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One evaluation of one cell: the unit of running, storing and resuming."""

    cell: Cell
    eval: EvalSpec

    @cached_property
    def key(self) -> str:
        # Of canonical_json({"cell", "eval", "key_version"}), of which all but the cell's key is the same for thousands.
        before, after = _around_cell(self.eval)
        return hashlib.sha256(f"{before}{self.cell.key}{after}".encode()).hexdigest()

    @classmethod
    def of_cells(cls, cells: Iterable[Cell], evals: Sequence[EvalSpec]) -> Iterator[Self]:
        """Yield the measurements of cells by all of some evaluations, cell by cell, with their keys."""
        around = [(spec, *_around_cell(spec)) for spec in evals]
        set_ = object.__setattr__
        for cell in cells:
            of_cell = cell.key
            for spec, before, after in around:
                found = cls.__new__(cls)
                set_(found, "cell", cell)
                set_(found, "eval", spec)
                # To look up what surrounds each cell's key, as ``key`` does, takes three times as long.
                set_(found, "key", hashlib.sha256(f"{before}{of_cell}{after}".encode()).hexdigest())
                yield found


@cache
def _identity_text(model: ModelRef) -> str:
    return canonical_json(model.identity)


@cache
def _around_cell(spec: EvalSpec) -> tuple[str, str]:
    """Return the canonical JSON of a measurement before and after its cell's key."""
    text = canonical_json({"cell": "", "eval": spec.canonical(), "key_version": KEY_VERSION})
    begin = '{"cell":"'
    return begin, text.removeprefix(begin)


@cache
def axis_names() -> tuple[str, ...]:
    """Return the names that ``where=`` and ``by=`` accept: of the model, of every method's spec, and the replicate."""
    return ("family", "model", "checkpoint", "method", *axes(), "calibration_seed")


@cache
def eval_columns() -> Mapping[str, Axis]:
    """Return what defines an evaluation, by the column of results that has it."""
    return {_EVAL_COLUMNS.get(name, name): declared for name, declared in eval_axes().items()}


def quant_to_dict(cell: Cell) -> dict[str, object]:
    """A cell without its model, as manifests and packs carry it."""
    if cell.calibration is None:
        return cell.quant.canonical()
    about = {"name": cell.calibration.name, "source": source_to_dict(cell.calibration.source)}
    return {**cell.quant.canonical(), "calibration": {**cell.calibration.canonical(), **about}}


def quant_text(cell: Cell) -> str:
    """Return ``quant_to_dict`` as canonical JSON."""
    return cell.quant.canonical_text if cell.calibration is None else canonical_json(quant_to_dict(cell))


def cell_from_dict(model: ModelRef, data: JsonObject) -> Cell:
    """The inverse of ``quant_to_dict``."""
    return Cell(model=model, quant=_spec(data), calibration=_calibration(data))


def _spec(data: JsonObject) -> Spec:
    return spec_from_canonical({name: value for name, value in data.items() if name != "calibration"})


def _calibration(data: JsonObject) -> Calibration | None:
    about = data.get("calibration")
    return _calibration_of(canonical_json(about)) if about else None


@lru_cache(maxsize=64)
def _calibration_of(text: str) -> Calibration:
    """Return the calibration that JSON describes: many cells have the same."""
    about = json.loads(text)
    return Calibration(**{**about, "source": source_from_dict(about["source"])})


def model_to_dict(model: ModelRef) -> dict[str, object]:
    """A model as manifests and packs carry it; what came later is left out where there is none."""
    later = {"checkpoint": None, "tokens_seen": None, "reading": 1, "reading_reason": None}
    return {name: value for name, value in vars(model).items() if name not in later or value != later[name]}


def eval_to_dict(spec: EvalSpec) -> dict[str, object]:
    return {**spec.canonical(), "source": source_to_dict(spec.source)}


def eval_from_dict(data: JsonObject) -> EvalSpec:
    """Return the inverse of ``eval_to_dict``."""
    return EvalSpec(**{**data, "source": source_from_dict(data["source"])})
