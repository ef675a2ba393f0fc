"""Specs and results of evaluations. Imports no torch, so planning a study stays light."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Final, Self

from kbit.axes import Axis, axis, axis_of
from kbit.calibration import Calibration
from kbit.compute_dtypes import COMPUTE_DTYPES
from kbit.errors import SpecError
from kbit.evaluation.evaluators import EVALUATORS
from kbit.sources import Source
from kbit.specs.base import LARGEST_NUMBER

if TYPE_CHECKING:
    from numpy.typing import NDArray

BOS: Final = ("first", "each", "none")
"""Which windows of a text begin with the tokenizer's beginning-of-sequence token (``EvalSpec.bos``)."""

ATTENTIONS: Final = ("sdpa", "eager")
"""How transformers computes attention: torch's fused operator, or one by one (``EvalSpec.attention``)."""
EXECUTIONS: Final = ("eager", "graph", "compile")
"""How a decoding step runs: as written, as a CUDA graph, or compiled by torch.compile (on a GPU as a graph too)."""
SLOPES: Final = "slopes"
"""Of a table of sensitivity, the sample of each layer: nats per squared relative error, in the model's order."""


@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """One evaluation of a model: everything that decides its number, and where its data lie.

    A field that came after version 1 of the keys (``since``) is left out of the identity at its neutral value, so that
    adding one changes no key.

    Attributes:
        bos: of a text set. 'first', kept as None: the text is encoded once with the tokenizer's defaults, and a token
            that these add stands in the first window only, as in GPTQ's protocol. 'each': every window is that token,
            then text, all of it scored. 'none': text alone.
        attention: of what is timed: one of ``ATTENTIONS``; None is the first.
        execution: of what is timed: one of ``EXECUTIONS``; None is a graph on a GPU, and 'eager' on a CPU, as the
            device's name says.
        definition: of a task that is the user's own: what its YAML, with what it includes and runs, contains. lm-eval's
            tasks are known by their versions.
        seed: of a kind that methods ask for, of the draw of the windows; None for others.
        source: where to read, which is not identity; None for a kind that reads nothing.

    Raises:
        SpecError: a value that is not allowed, by the name of the setting that it comes from.
    """

    name: str = axis(type="string", doc="name of the evaluation")
    kind: str = axis(type="string", doc="kind of the evaluation: perplexity, task or another")
    version: str = axis("1", type="string", doc="version of the task or of the text's preparation")
    num_fewshot: int = axis(0, type="int64", doc="examples in the prompt", unit="count")
    window: int | None = axis(None, type="int64", doc="tokens of a window, cut to the model's context", unit="tokens")
    limit: int | None = axis(
        None,
        type="int64",
        doc="first documents of a task, or tokens of a text; null is all",
        unit="documents or tokens",
    )
    dataset: str = axis(type="string", doc="hub:ID@COMMIT or sha256:HASH")
    compute_dtype: str = axis(type="string", doc="dtype of the arithmetic; storage is the checkpoint's own 16 bits")
    device: str | None = axis(
        None,
        type="string",
        doc="device that is measured; null where the number does not depend on it",
        neutral=None,
        since=2,
    )
    bos: str | None = axis(
        None,
        type="string",
        doc="text windows that begin with the beginning-of-sequence token: each or none; null is the first, where the "
        "tokenizer adds it",
        neutral="first",
        since=3,
    )
    attention: str | None = axis(
        None,
        type="string",
        doc="of what is timed: how attention is computed, sdpa or eager; null for the others",
        neutral=None,
        since=4,
    )
    execution: str | None = axis(
        None,
        type="string",
        doc="of what is timed: how a step runs, eager, graph (CUDA) or compile; null for the others",
        neutral=None,
        since=4,
    )
    definition: str | None = axis(
        None,
        type="string",
        doc="SHA-256 of the files that define a task of the user's own; null for lm-eval's tasks and other kinds",
        neutral=None,
        since=5,
    )
    seed: int | None = axis(
        None,
        type="int64",
        doc="seed of the draw of the windows that a method asks to measure; null for what users name",
        neutral=None,
        since=6,
    )
    source: Source | None = field(default=None, compare=False)

    def __hash__(self) -> int:
        # Plans look evaluations up for each of their cells: all fields take ten times as long, and tell no more apart.
        return hash((self.name, self.dataset, self.limit, self.window))

    def __post_init__(self) -> None:
        evaluator = EVALUATORS[self.kind]
        if self.bos is not None and self.bos not in BOS:
            raise SpecError(evaluator.key("bos"), self.bos, "one of " + ", ".join(BOS))
        if self.bos == "first":
            # One value for one meaning: rows from before the axis have null.
            object.__setattr__(self, "bos", None)
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise SpecError("eval.compute_dtype", self.compute_dtype, "one of " + ", ".join(COMPUTE_DTYPES))
        _whole_number(evaluator.key("limit"), self.limit, 1)
        _whole_number(evaluator.key("window"), self.window, 2)
        _whole_number(evaluator.key("num_fewshot"), self.num_fewshot, 0)
        if evaluator.identity_of_device != (self.device is not None):
            allowed = "the name of the device that is measured" if evaluator.identity_of_device else "null"
            raise SpecError("device", self.device, f"{allowed}, for an evaluation of kind {self.kind}")
        if evaluator.of_methods and self.seed is None:
            object.__setattr__(self, "seed", 0)
        elif not evaluator.of_methods and self.seed is not None:
            raise SpecError("seed", self.seed, f"null, for an evaluation of kind {self.kind}")
        on_cpu = (self.device or "").startswith("cpu")
        self._choose("attention", ATTENTIONS, ATTENTIONS[0])
        # A CPU has no graphs.
        self._choose(
            "execution", [e for e in EXECUTIONS if not (on_cpu and e == "graph")], "eager" if on_cpu else "graph"
        )

    def _choose(self, name: str, allowed: Sequence[str], default: str) -> None:
        """Fill in, or check, a field that only some kinds have."""
        evaluator, value = EVALUATORS[self.kind], getattr(self, name)
        if name not in evaluator.settings:
            allowed = ()
        elif value is None:
            object.__setattr__(self, name, default)
            return
        if value is not None and value not in allowed:
            said = "one of " + ", ".join(allowed) if allowed else f"null, for an evaluation of kind {self.kind}"
            raise SpecError(evaluator.key(name), value, said)

    @classmethod
    def of_calibration(cls, kind: str, data: Calibration) -> Self:
        """Return what a method that calibrates on data wants measured of the 16-bit model first (``Spec.measures``)."""
        evaluator = EVALUATORS[kind]
        dtype = "" if data.compute_dtype == "storage" else f"_{data.compute_dtype}"
        return cls(
            kind=kind,
            # The columns of a table go by it, and each of a model's calibrations has its own.
            name=f"{data.name}_{data.samples}x{data.length}_seed{data.seed}{dtype}{evaluator.suffix}",
            version=f"{evaluator.version}.{data.version}",
            window=data.length,
            limit=data.samples * data.length,
            dataset=data.dataset,
            compute_dtype=data.compute_dtype,
            seed=data.seed,
            source=data.source,
        )

    @property
    def calibration(self) -> Calibration:
        """The data of an evaluation that a method asked for: what ``of_calibration`` was given."""
        if self.window is None or self.limit is None or self.seed is None:
            raise ValueError(f"the evaluation {self.name!r} is of no calibration data")
        samples = self.limit // self.window
        return Calibration(
            dataset=self.dataset,
            samples=samples,
            length=self.window,
            seed=self.seed,
            compute_dtype=self.compute_dtype,
            version=self.version.rpartition(".")[2],
            name=self.name.rpartition(f"_{samples}x{self.window}_")[0],
            source=self.source,
        )

    @property
    def limit_key(self) -> str:
        """The setting that ``limit`` comes from, for messages: a text set's tokens, or a task's documents."""
        return EVALUATORS[self.kind].key("limit")

    def canonical(self) -> dict[str, Any]:
        """Return what defines the measurement besides its cell, as plain JSON values."""
        return dict(self._canonical)

    @cached_property
    def _canonical(self) -> Mapping[str, Any]:
        """The same, made once: a study asks for it with each of its cells."""
        values = {name: (declared, getattr(self, name)) for name, declared in eval_axes().items()}
        return {name: value for name, (declared, value) in values.items() if declared.is_identity(value)}


@cache
def eval_axes() -> Mapping[str, Axis]:
    """Return what defines an evaluation, by the name of its field; not where its data lie."""
    return {f.name: axis_of(f) for f in fields(EvalSpec) if f.compare}


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """The result of one evaluation.

    Attributes:
        metrics: value by metric ('loss' in nats per token, 'perplexity', 'bits_per_byte', 'acc', ...); inf and NaN too.
        stderr: standard error by metric, where there is one.
        samples: outcome of every sample: bool arrays for right or wrong, float32 or int32 arrays otherwise; a text set
            has 'tokens' of each window, and 'nats', or means by the metric's name.
        diverged: the model gave values that are not finite, or a loss above ln(vocabulary) + 1. A result, not a
            failure.
        n_samples: documents, or windows.
        n_tokens: tokens that went through the model (scored and context), for the cost model.
        dataset_hash: SHA-256 of what was evaluated (the tokens of a text set, the requests of a task): provenance.
        higher_is_better: direction of metrics that the kind doesn't declare, or declares otherwise, where the data's
            own definition gives it (a task's ``metric_list``).
        prefixes: of a task: whether beginnings that requests share went through the model once, else why not
            (``kbit.evaluation.sharing``).
        also: results that came with this one, by kind (``Evaluator.brings``): of the same data under the same settings.
    """

    metrics: Mapping[str, float]
    stderr: Mapping[str, float]
    samples: Mapping[str, NDArray[Any]]
    diverged: bool
    n_samples: int
    n_tokens: int
    dataset_hash: str
    higher_is_better: Mapping[str, bool] = field(default_factory=dict)
    prefixes: str | None = None
    also: Mapping[str, EvalResult] = field(default_factory=dict)


def _whole_number(key: str, value: int | None, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST_NUMBER:
        raise SpecError(key, value, f"a whole number of at least {least} (and at most 2^40)")
