"""Predict what a measurement costs in seconds: by stored ones like it, else by their rates, else by counting.

What is stored of the same model, evaluation and data type is taken as it was: a median of the latest. What is like it
in part gives a factor by which the count is corrected: of the same model, else of the model nearest in size. The count
is the textbook's: a forward pass takes 2 operations a parameter and token. Its rates are what such passes reach in
practice, not peaks; they only have to be right within a factor of two, since finished cells replace them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Final, Self

from kbit.calibration import Calibration
from kbit.doors import load
from kbit.evaluation.evaluators import EVALUATORS, NOISE_BLOCKS, NOISE_LAYERS
from kbit.evaluation.spec import EvalSpec
from kbit.models.limits import DEPTHS, as_namespace, first_count, named_context, of_decoder
from kbit.models.readings import expert_count
from kbit.spec import METHODS
from sweeps.plan.learned import Like, Part, ValueOf
from sweeps.store.rows import moment
from sweeps.store.schema import Row
from sweeps.study.cell import Cell, Measurement, ModelRef
from sweeps.study.reading import config_of

OPERATIONS_PER_SECOND: Final = {"cpu": 8e10, "cuda": 3e14}
"""A core of a server's CPU in float32; an H100-class GPU in 16 bits: 1.5e14 at 160 million parameters, 4.5e14 at 1.3
billion, 5e14 at 6.7 billion, measured.
"""
QUANTIZE_PER_SECOND: Final = {"cpu": 2e7, "cuda": 3e10}
"""Weights quantized and dequantized a second. On a GPU 1e11 beside their originals and 3e10 from page-locked memory,
measured; fitted data types take longer the first time.
"""
QUANTIZE_SECONDS: Final = {"cpu": 0.01, "cuda": 0.015}
"""Whatever the size: kernels are launched layer by layer. Of a method of more effort more, but not in proportion:
measured on models of a million parameters on an H200, 0.02 of blockwise, 0.04 of ggml, 0.17 of gptq, 0.3 of hqq.
"""
CALIBRATE_SECONDS: Final = {"cpu": 0.0, "cuda": 0.1}
"""Of a cell that calibrates, whatever the size: 0.13 to 0.19 more than one that doesn't, on an H200 beside others."""
NOISE_SECONDS: Final = {"cpu": 0.0, "cuda": 0.12}
"""A pass over calibration windows with noise in a layer, whatever the size: 0.12 to 0.17 for models of 0.5 to 16
million parameters, measured.
"""
STEP_SECONDS: Final = {"cpu": 4e-3, "cuda": 1e-3}
STEP_WEIGHTS_PER_SECOND: Final = {"cpu": 5e9, "cuda": 1e12}
"""A step of decoding: launches and small operations, and weights read in 16 bits."""
UNPACK_PER_SECOND: Final = {"cpu": 5e7, "cuda": 2e12}
"""Weights held in k bits that a step takes a second: a CPU dequantizes them each time."""
LOAD_BYTES_PER_SECOND: Final = 5e8
SECONDS_PER_MEASUREMENT: Final = {"cpu": 0.2, "cuda": 0.12}
"""Whatever the size: scheduling, writing, small kernels. On a GPU as the demo took, 52 s for 387 on an H100."""
TASK_SECONDS: Final = 0.15
"""What a task takes besides on a CPU: 0.03 to 0.45 for 500 documents, measured."""
COLUMNS: Final = (
    *(
        "key",
        "launch",
        "pack",
        "model",
        "params",
        "method",
        "label",
        "bits",
        "dtype",
        "eval",
        "eval_kind",
        "limit",
        "window",
    ),
    *("num_fewshot", "compute_dtype", "n_tokens", "seconds", "quantize_seconds", "load_seconds", "device", "finished"),
    *("calibration", "model_id", "revision", "weights_hash", "job"),
)
"""Of a row, what is learned from."""
_DEFAULT_PARAMS: Final = 1_000_000_000
_LOAD: Final[Sequence[Like]] = [("load",)]
_BETWEEN: Final[Sequence[Like]] = [("between",)]


def tokens_of(measurement: Measurement) -> int:
    """Predict how many tokens go through the model."""
    spec = measurement.eval
    tokens: int = load(EVALUATORS[spec.kind].tokens)(spec)
    if EVALUATORS[spec.kind].of_methods:  # windows as they are, cut to the context
        whole, cut = (calibrating_tokens(spec.calibration, c) for c in (None, context_of(measurement.cell.model)))
        tokens = tokens * cut // whole
        tokens = round(tokens * _noise_of(measurement.cell.model))
    return tokens


@cache
def _noise_of(model: ModelRef) -> float:
    """Return how many times the layers of noise's prediction a model has, as config.json tells; else 1.

    Of a mixture of experts' matrices nearly all are experts', two of each.
    """
    config = config_of(model, ask=False)
    if config is None:
        return 1.0
    experts = expert_count(config)
    depth = first_count(of_decoder(config), DEPTHS) or NOISE_BLOCKS
    return depth / NOISE_BLOCKS * (NOISE_LAYERS + 2 * experts) / NOISE_LAYERS


def calibrating_tokens(data: Calibration, context: int | None) -> int:
    """Return the tokens of a calibration's windows, for a model with this context."""
    return data.samples * data.length_in(context)


@cache
def context_of(model: ModelRef) -> int | None:
    """Return a model's context by its config.json; None where that is not on this machine, or doesn't say."""
    config = config_of(model, ask=False)
    return None if config is None else named_context(as_namespace(config))


def load_seconds(model: ModelRef) -> float:
    """Predict what loading takes, where nothing like it is stored."""
    return 2 * (model.params or 0) / LOAD_BYTES_PER_SECOND + 1.0


@dataclass(kw_only=True)
class _Open:
    """The cell that a pack is at: when its last measurement ended, and what passed beside so many of them.

    A pack's first is not whole: when it began is unknown.
    """

    key: object
    end: float
    is_whole: bool = False
    passed: float = 0.0
    count: int = 0


@dataclass(kw_only=True)
class CostModel:
    """Predicts seconds; learns from the store's rows.

    Attributes:
        device: 'cpu' or 'cuda'.
        evaluating, quantizing, loading: what each takes.
        between: what a measurement takes that is neither: it is prepared and stored.
    """

    device: str
    evaluating: Part = field(default_factory=Part)
    # Of one pack a process may have compiled the kernels of every second cell.
    quantizing: Part = field(default_factory=lambda: Part(settled=2))
    loading: Part = field(default_factory=Part)
    between: Part = field(default_factory=Part)
    _open: dict[tuple[object, ...], _Open] = field(default_factory=dict)
    _seen: set[tuple[object, ...]] = field(default_factory=set)
    _predicted: dict[tuple[object, ...], float] = field(default_factory=dict)
    _evaluated: dict[tuple[object, ...], ValueOf] = field(default_factory=dict)

    @classmethod
    def from_rows(cls, rows: Iterable[Row], device: str) -> Self:
        """Learn from stored rows (``COLUMNS``), the latest of which count."""
        cost = cls(device=device)
        for row in sorted(rows, key=lambda r: str(r.get("finished") or "")):
            cost.learn(row)
        return cost

    def learn(self, row: Row) -> None:
        """Take in a row; one of a failure, or of another kind of device, says nothing."""
        get = row.get
        seconds, kind, on_cpu = get("seconds"), str(get("eval_kind")), str(get("device") or "").startswith("cpu")
        if seconds is None or on_cpu != (self.device == "cpu") or kind not in EVALUATORS:
            return
        self._predicted.clear()
        model, params, launch = str(row["model"]), get("params") or _DEFAULT_PARAMS, get("launch")
        pack, packed = (launch, get("pack")), EVALUATORS[kind].packed
        of = self._of_eval(row, kind, model, params, packed=packed)
        self.evaluating.add(of, seconds, pack=pack, first=self._is_first(row, model))
        # Shared by the rows of a cell, or a process: known by what it took, to the last bit.
        quantized, loaded = get("quantize_seconds") or 0.0, get("load_seconds") or 0.0
        if quantized and not self._is_new(("quantize", launch, get("key"), packed, quantized)):
            quantized = 0.0
        if loaded and not self._is_new(("load", launch, model, loaded)):
            loaded = 0.0
        self._learn_between(row, _between(model, params), known=seconds + quantized + loaded)
        method = str(get("method"))
        if quantized and method != "baseline":
            counted = self._counted_quantizing(params, method, _calibrated_tokens(row))
            like = _like_quant(get("label"), method, get("dtype"), bool(get("calibration")), packed)
            of = ValueOf(model=model, params=params, like=like, counted=counted)
            # The first of a label may have compiled kernels, once on a machine.
            is_first = self._is_new(_labelled(get("label"), packed))
            self.quantizing.add(of, quantized, pack=pack, exact=not is_first)
            if is_first:
                self.quantizing.add(of, quantized, pack=pack, exact=False, first=True)
        if loaded:
            counted = 2 * params / LOAD_BYTES_PER_SECOND + 1.0
            self.loading.add(ValueOf(model=model, params=params, like=_LOAD, counted=counted), loaded)

    def _of_eval(self, row: Row, kind: str, model: str, params: int, *, packed: bool) -> ValueOf:
        """Return what the seconds of a row are of: alike for all cells of a model, unless they are held in k bits."""
        is_wide, bits, tokens = row.get("compute_dtype") == "float32", row.get("bits") or 0, row.get("n_tokens") or 0
        if packed:
            like = _like_packed(row["eval"], kind, row.get("label"), bits, is_wide)
            return ValueOf(model=model, params=params, like=like, counted=self._counted(kind, params, tokens, bits))
        sizes = (row.get("limit"), row.get("window"), row.get("num_fewshot") or 0)
        key = (model, params, row["eval"], kind, sizes, is_wide, tokens)
        if key not in self._evaluated:
            like, counted = _like_eval(row["eval"], kind, sizes, is_wide), self._counted(kind, params, tokens, bits)
            counted += self._noises(kind, tokens, row.get("limit"))
            self._evaluated[key] = ValueOf(model=model, params=params, like=like, counted=counted)
        return self._evaluated[key]

    def _learn_between(self, row: Row, of: ValueOf, known: float) -> None:
        """Take in what passed between a cell's measurements, once the next cell of its pack has one.

        Cell by cell, since evaluations that share a forward pass end one upon the other.

        Args:
            row: a measurement.
            of: what is learned of.
            known: seconds that the measurement took, and what was quantized and loaded for it.
        """
        place = (row.get("launch"), row.get("pack"), row.get("job"))
        if not row.get("finished") or None in place[:2]:
            return
        end, last = moment(row["finished"]).timestamp(), self._open.get(place)
        is_next = last is None or last.key != row.get("key")
        if last is None:
            self._open[place] = _Open(key=row.get("key"), end=end)
            return
        if is_next:
            if last.is_whole:
                self.between.add(of, max(0.0, last.passed) / last.count, pack=place[:2])
            last.key, last.passed, last.count, last.is_whole = row.get("key"), 0.0, 0, True
        last.end, last.passed, last.count = end, last.passed + end - last.end - known, last.count + 1

    def _is_new(self, once: tuple[object, ...]) -> bool:
        """Tell whether something is seen for the first time, and remember it."""
        before = len(self._seen)
        self._seen.add(once)
        return len(self._seen) > before

    def _is_first(self, row: Row, model: str) -> bool:
        """Tell whether a row, of those in the order of their ends, is the first of a model's evaluation in its process.

        Not in its pack: what a process has prepared it keeps, and its next pack of the model is as fast.
        """
        process = row.get("job") or row.get("pack")
        return process is not None and self._is_new(("first", row.get("launch"), process, model, row["eval"]))

    def cell_seconds(self, cell: Cell, evals: Sequence[EvalSpec], *, first: bool = False) -> float:
        """Predict quantizing, once for each form of the layers, and evaluating.

        Args:
            cell: the cell.
            evals: its evaluations.
            first: it is the first of its model in its process.
        """
        evals, forms = tuple(evals), {EVALUATORS[spec.kind].packed for spec in evals}
        # Of a plan's cells most differ in nothing that counts here.
        key = (cell.model.label, evals, first, (cell.quant_label, cell.quant.bits) if True in forms else None)
        if key not in self._predicted:
            self._predicted[key] = self._evaluating(cell, evals, first=first)
        return self._predicted[key] + sum(self._quantize(cell, packed=packed) for packed in sorted(forms))

    def _evaluating(self, cell: Cell, evals: Sequence[EvalSpec], *, first: bool) -> float:
        brought = {kind for spec in evals for kind in EVALUATORS[spec.kind].brings}
        return len(evals) * self._pass_between(cell.model) + sum(
            self._evaluate(Measurement(cell=cell, eval=spec), evals if spec.kind in brought else (), first=first)
            for spec in evals
        )

    def _pass_between(self, model: ModelRef) -> float:
        """Predict what passes beside a measurement; 0 where that is unknown: then it is part of what is counted."""
        return self.between.predict(_between(model.label, _params(model))) if self.between.later.params else 0.0

    def seconds(self, measurement: Measurement) -> float:
        """Predict a measurement by itself."""
        return self.cell_seconds(measurement.cell, [measurement.eval])

    def load(self, model: ModelRef) -> float:
        """Predict loading a model."""
        of = ValueOf(model=model.label, params=_params(model), like=_LOAD, counted=load_seconds(model))
        return self.loading.predict(of)

    def _quantize(self, cell: Cell, *, packed: bool) -> float:
        quant = cell.quant
        if quant.is_baseline:
            return 0.0
        params, calibrates = _params(cell.model), cell.calibration is not None
        tokens = calibrating_tokens(cell.calibration, context_of(cell.model)) if cell.calibration else 0
        like = _like_quant(cell.quant_label, quant.method, getattr(quant, "dtype", None), calibrates, packed)
        # Cells whose quantization has no value of its own, as most that are left of a plan, differ in nothing else.
        first = _labelled(cell.quant_label, packed) not in self._seen
        telling = self.quantizing.telling(cell.model.label, like, first=first)
        key = (quant.method, cell.model.label, params, tokens, first, *telling)
        if key not in self._predicted:
            counted = self._counted_quantizing(params, quant.method, tokens)
            of = ValueOf(model=cell.model.label, params=params, like=like, counted=counted)
            # A first one takes no less than others.
            self._predicted[key] = max(self.quantizing.predict(of, first=turn) for turn in {first, False})
        return self._predicted[key]

    def _counted_quantizing(self, params: int, method: str, tokens: int) -> float:
        """Count the seconds of quantizing: of a method that no installed package has, as of blockwise."""
        of = METHODS[method] if method in METHODS else METHODS["blockwise"]
        calibrating = of.passes * 2.0 * params * tokens / OPERATIONS_PER_SECOND[self.device]
        calibrating += CALIBRATE_SECONDS[self.device] if tokens else 0.0
        weights = of.effort * params / QUANTIZE_PER_SECOND[self.device]
        launching = QUANTIZE_SECONDS[self.device] * math.pow(of.effort, 0.75)
        return calibrating + weights + launching

    def _evaluate(self, measurement: Measurement, due: Sequence[EvalSpec], *, first: bool) -> float:
        """Predict evaluating; what comes with another that is due costs nothing, unless its own part is known."""
        model, spec, quant = measurement.cell.model, measurement.eval, measurement.cell.quant
        is_wide = spec.compute_dtype == "float32"
        if EVALUATORS[spec.kind].packed:
            like = _like_packed(spec.name, spec.kind, measurement.cell.quant_label, quant.bits, is_wide)
        else:
            like = _like_eval(spec.name, spec.kind, (spec.limit, spec.window, spec.num_fewshot), is_wide)
        if due and _comes_with_another(spec, due) and not self.evaluating.knows(model.label, like[0]):
            return 0.0
        tokens = tokens_of(measurement)
        counted = self._counted(spec.kind, _params(model), tokens, quant.bits)
        counted += self._noises(spec.kind, tokens, spec.limit)
        of = ValueOf(model=model.label, params=_params(model), like=like, counted=counted)
        return self.evaluating.predict(of, first=first)

    def _counted(self, kind: str, params: int, tokens: int, bits: int) -> float:
        """Count the seconds of an evaluation: its operations, its steps, and what each measurement takes."""
        evaluator = EVALUATORS[kind]
        forward = 2.0 * params * tokens / OPERATIONS_PER_SECOND[self.device]
        in_bits = evaluator.packed and bits < 16
        rate = (UNPACK_PER_SECOND if in_bits else STEP_WEIGHTS_PER_SECOND)[self.device]
        steps = evaluator.steps * (STEP_SECONDS[self.device] + params / rate)
        task = TASK_SECONDS if evaluator.data == "task" else 0.0
        return forward + steps + task + SECONDS_PER_MEASUREMENT[self.device]

    def _noises(self, kind: str, tokens: int, windows: int | None) -> float:
        """Count what passes with noise take whatever the model's size.

        Args:
            kind: of the evaluation.
            tokens: of all passes.
            windows: tokens of one.
        """
        passes = tokens / windows if EVALUATORS[kind].of_methods and windows else 0.0
        return passes * NOISE_SECONDS[self.device]


def _calibrated_tokens(row: Row) -> int:
    """Return the tokens that the method of a stored row calibrated on; 0 of other methods, and of data unknown here."""
    if not row.get("calibration"):
        return 0
    try:
        about = json.loads(row["calibration"])
        data = Calibration(**{f.name: about[f.name] for f in fields(Calibration) if f.compare and f.name in about})
    except (TypeError, ValueError):  # another version's: planning goes by what else is stored
        return 0
    place = {name: row.get(name) for name in ("revision", "weights_hash", "model_id")}
    if not place["model_id"]:
        return calibrating_tokens(data, None)
    is_local = place["weights_hash"] is not None
    model = ModelRef(
        family="",
        name="",
        path=place["model_id"] if is_local else None,
        weights_hash=place["weights_hash"],
        hub_id=None if is_local else place["model_id"],
        commit=place["revision"],
    )
    return calibrating_tokens(data, context_of(model))


def _params(model: ModelRef) -> int:
    return model.params or _DEFAULT_PARAMS


@cache
def _between(model: str, params: int) -> ValueOf:
    return ValueOf(model=model, params=params, like=_BETWEEN, counted=1.0)


def _like_eval(name: str, kind: str, sizes: tuple[object, ...], is_wide: bool) -> list[Like]:
    return [(name, *sizes, is_wide), (kind, is_wide), (kind,)]


def _like_packed(name: str, kind: str, label: object, bits: int, is_wide: bool) -> list[Like]:
    """What is measured in k bits depends on them."""
    return [(name, label, is_wide), (kind, bits, is_wide), (kind, bits < 16, is_wide), (kind,)]


def _like_quant(label: object, method: str, dtype: object, calibrates: bool, packed: bool) -> list[Like]:
    return [(label, packed), (method, dtype, calibrates, packed), (method, calibrates, packed), (packed,)]


def _labelled(label: object, packed: bool) -> tuple[object, ...]:
    return ("label", label, packed)


def _comes_with_another(spec: EvalSpec, due: Sequence[EvalSpec]) -> bool:
    """Tell whether another evaluation that is due brings this one's result (``Evaluator.brings``)."""
    same = ("dataset", "limit", "window", "bos", "compute_dtype")
    return any(
        spec.kind in EVALUATORS[other.kind].brings and all(getattr(spec, n) == getattr(other, n) for n in same)
        for other in due
    )
