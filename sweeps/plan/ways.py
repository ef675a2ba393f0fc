"""How each model of a study will run on an executor's devices, by the rule that its workers follow, before any job.

The sums come from files' headers and configurations, so no weight is read and torch is not loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from kbit.errors import CheckpointError
from kbit.evaluation.evaluators import EVALUATORS
from kbit.evaluation.spec import EvalSpec
from kbit.models.checkpoint import model_files, weights_among
from kbit.models.sizes import GUESSED, Sizes, parts_of, sizes_of
from kbit.models.ways import LEAST_BATCH_TOKENS, SHARE, Choice, Way, choose_way, needs, possible_ways
from kbit.spec import Spec
from sweeps.errors import UserError
from sweeps.study.cell import Cell, ModelRef
from sweeps.study.hub import ModelConfig, cached_snapshot
from sweeps.study.manifest import Manifest
from sweeps.study.reading import config_of
from sweeps.text import counted, hours

ABOUT: Final = "≈: by config.json or the number of parameters; the model's files tell (mode=fetch gets them)"
_FLOAT32: Final = 4
_SIXTEEN: Final = 2


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """The memory of the devices that an executor runs a model on.

    Attributes:
        device: 'cpu' or 'cuda'.
        words: what it is, for people: 'NVIDIA H200, 139 GB each'; where it is unknown, what tells it.
        bytes_of: of one device, for a model; None where unknown.
        gpus_of: GPUs that a model is given; 1 on a CPU.
        batch_tokens: tokens of a batch, where memory allows.
    """

    device: str
    words: str
    bytes_of: Callable[[ModelRef], int | None]
    gpus_of: Callable[[ModelRef], int]
    batch_tokens: int


@dataclass(frozen=True, kw_only=True)
class Planned:
    """How a model runs under some quantizations.

    Attributes:
        model: the model.
        specs: those that run alike, of the same bits.
        choice: None where nothing fits.
        terms: bytes on the fullest device, by what takes them: of the most demanding of the specs; where nothing fits,
            in the last way that is possible.
        memory: bytes of one device; None where unknown.
        sizes: of the model.
    """

    model: ModelRef
    specs: tuple[Spec, ...]
    choice: Choice | None
    terms: Mapping[str, int]
    memory: int | None
    sizes: Sizes

    @property
    def needed(self) -> int:
        """Bytes on the fullest device."""
        return sum(self.terms.values())

    @property
    def way(self) -> str:
        """The way in words; it depends on what is unknown, where that is."""
        if self.choice is None:
            return "does not fit"
        if self.memory is None:
            return f"unknown, {self.choice.way} if it fits"
        over = f" over {counted(self.choice.devices, 'GPU')}" if self.choice.devices > 1 else ""
        return f"{self.choice.way}{over}"

    @property
    def sum_text(self) -> str:
        """The sum in words: '7.9 GB = 7.4 GB packed weights + ...'; with ≈ where no file tells it."""
        about = "" if self.sizes.known_from == "files" else "≈ "
        return f"{about}{_bytes(self.needed)} = " + " + ".join(f"{_bytes(n)} {what}" for what, n in self.terms.items())


def planned_ways(manifest: Manifest, memory: DeviceMemory) -> tuple[list[Planned], list[ModelRef]]:
    """Return how each model runs at each of its bits, in the study's order, and the models of unknown size."""
    widest = _compute_bytes(manifest)
    found: dict[tuple[ModelRef, int, str], list[tuple[Spec, Choice | None, dict[str, int]]]] = {}
    unknown: dict[ModelRef, None] = {}
    sizes: dict[ModelRef, tuple[Sizes | None, ModelConfig | None]] = {}
    for cell in dict.fromkeys(_without_seed(cell) for cell in manifest.wanted_cells()):
        model, spec = cell.model, cell.quant
        if model not in sizes:
            sizes[model] = known_sizes(model)
        known, config = sizes[model]
        if known is None:
            unknown[model] = None
            continue
        choice, terms = _choose(cell, known, config, widest, memory)
        way = "" if choice is None else str(choice.way)
        found.setdefault((model, spec.bits, way), []).append((spec, choice, terms))
    ways = []
    for (model, _, _), alike in found.items():
        _, choice, terms = max(alike, key=lambda a: sum(a[2].values()))
        known = sizes[model][0]
        assert known is not None
        specs = tuple(dict.fromkeys(spec for spec, *_ in alike))
        ways.append(
            Planned(model=model, specs=specs, choice=choice, terms=terms, memory=memory.bytes_of(model), sizes=known)
        )
    return ways, list(unknown)


def check_ways(ways: Collection[Planned], memory: DeviceMemory, evals: Iterable[EvalSpec] = ()) -> None:
    """Refuse what can't fit any way, and evaluations that look inside of baselines that run layer by layer.

    A size that is guessed from the number of parameters refuses nothing.

    Raises:
        UserError: names models, bits or evaluation, sum and memory.
    """
    looking = [spec.name for spec in evals if EVALUATORS[spec.kind].looks_inside]
    layered = [w for w in ways if w.memory is not None and w.choice is not None and w.choice.way is Way.LAYERED]
    outside = [w for w in layered if w.specs[0].is_baseline and w.sizes.known_from != GUESSED]
    if looking and outside:
        names = ", ".join(dict.fromkeys(w.model.label for w in outside))
        raise UserError(
            f"eval {looking[0]!r} watches what enters the layers of a 16-bit model in memory, and {names} runs "
            f"{Way.LAYERED} on {memory.words}: leave the evaluation or these models (sweep.sizes) out, or run where a "
            "device has more memory"
        )
    refused = [w for w in ways if w.choice is None and w.sizes.known_from != GUESSED]
    if not refused:
        return
    first = refused[0]
    names = ", ".join(dict.fromkeys(f"{w.model.label} at {w.specs[0].bits} bits" for w in refused))
    assert first.memory is not None
    held_whole = next((spec for spec in first.specs if spec.why_not_layered is not None), None)
    least = f"even {Way.LAYERED}"
    if held_whole is not None:
        least = f"{held_whole.label!r}, which can't run {Way.LAYERED} ({held_whole.why_not_layered}),"
    raise UserError(
        f"{names} can't run on {memory.words}, of which {SHARE:.0%} are counted on: {least} takes "
        f"{first.sum_text} for {first.model.label}. Leave these models out (sweep.sizes), or run where a device has "
        "more memory"
    )


def _without_seed(cell: Cell) -> Cell:
    """Return a cell with its calibration's first seed: draws take alike."""
    if not cell.calibration_seed:
        return cell
    data = cell.calibration
    return Cell(model=cell.model, quant=cell.quant, calibration=None if data is None else data.with_seed(0))


def _choose(
    cell: Cell, sizes: Sizes, config: ModelConfig | None, compute_bytes: int, memory: DeviceMemory
) -> tuple[Choice | None, dict[str, int]]:
    model, data = cell.model, cell.calibration
    parts = parts_of(sizes, cell.quant, config, compute_bytes=compute_bytes, device=memory.device, calibration=data)
    gpus, tokens = memory.gpus_of(model), memory.batch_tokens
    choice = choose_way(parts, memory.bytes_of(model), gpus=gpus, batch_tokens=tokens)
    if choice is not None:
        return choice, dict(choice.terms)
    # The last way is the one that is left, and for most models takes least.
    last = possible_ways(parts, gpus)[-1]
    return None, needs(parts, last, gpus=gpus, batch_tokens=min(tokens, LEAST_BATCH_TOKENS))


def _compute_bytes(manifest: Manifest) -> int:
    """Return the bytes of a value in the widest dtype that a study computes in."""
    return _FLOAT32 if any(e.compute_dtype == "float32" for e in manifest.evals) else _SIXTEEN


@cache
def _files(model: ModelRef) -> tuple[Path, ...]:
    """Return a model's weights, where they are on this machine."""
    directory = Path(model.path) if model.path else cached_snapshot(str(model.hub_id), str(model.commit))
    if directory is None:
        return ()
    try:
        return tuple(weights_among(directory, model_files(directory)))
    except (CheckpointError, OSError):
        return ()


def known_sizes(model: ModelRef) -> tuple[Sizes | None, ModelConfig | None]:
    """Return a model's sizes by the best that is known of it here, and its config.json; None where nothing is."""
    config = config_of(model, ask=False)
    try:
        return sizes_of(_files(model), config, model.params), config
    except (CheckpointError, OSError):
        return None, config  # the worker says what is wrong with it


def ways_rows(
    ways: Sequence[Planned], seconds: Mapping[tuple[ModelRef, Spec], float]
) -> list[tuple[str, str, str, str, str]]:
    """Return rows (model, bits, way, time of what is left, sum) for people.

    Bits of a model that run alike, in equal memory, are one row.

    Args:
        ways: of the study's models.
        seconds: predicted for what is left of each quantization of a model.
    """
    rows: dict[tuple[str, str, str], list[Planned]] = {}
    for planned in ways:
        rows.setdefault((planned.model.label, planned.way, planned.sum_text), []).append(planned)
    found = []
    for (model, way, text), alike in rows.items():
        bits = sorted({planned.specs[0].bits for planned in alike}, reverse=True)
        left = sum(seconds.get((planned.model, spec), 0.0) for planned in alike for spec in planned.specs)
        found.append((model, ", ".join(map(str, bits)), way, hours(left), text))
    return found


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
