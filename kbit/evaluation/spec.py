"""What an evaluation is and what it returns. Imports no torch, so planning a study stays light."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from numpy.typing import NDArray

from kbit.compute_dtypes import COMPUTE_DTYPES
from kbit.errors import SpecError
from kbit.spec import LARGEST_NUMBER

EvalKind = Literal["perplexity", "task"]


@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """One evaluation of a model: everything that decides its number, and where its data lie.

    Attributes:
        kind: 'perplexity' of a text set, or a zero-shot 'task' of lm-eval.
        name: the text set's or the task's name; results carry it.
        version: the task's version in lm-eval, or of the text set's preparation.
        dataset: identity of the data: 'hub:ID@COMMIT' or 'sha256:HASH' of the local file.
        compute_dtype: dtype of activations and arithmetic; 'storage' is the checkpoint's own 16-bit dtype.
        num_fewshot: examples in a task's prompt.
        window: perplexity only: tokens in a window, cut to the model's context.
        limit: a task's first documents, or a text set's first tokens; None is all.
        source: where to read, which is not identity: {'path': FILE} or {'hub': ID, 'revision': COMMIT, ...}; a task
            has {'task_file': YAML} too.

    Raises:
        SpecError: a value that is not allowed, by the name of the setting that it comes from.
    """

    kind: str
    name: str
    dataset: str
    compute_dtype: str
    version: str = "1"
    num_fewshot: int = 0
    window: int | None = None
    limit: int | None = None
    source: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(EvalKind):
            raise SpecError("kind", self.kind, "one of " + ", ".join(get_args(EvalKind)))
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise SpecError("eval.compute_dtype", self.compute_dtype, "one of " + ", ".join(COMPUTE_DTYPES))
        _whole_number(self.limit_key, self.limit, 1)
        _whole_number("eval.window", self.window, 2)
        _whole_number("eval.num_fewshot", self.num_fewshot, 0)

    @property
    def limit_key(self) -> str:
        """The setting that ``limit`` comes from, for messages: a text set's tokens, or a task's documents."""
        return "eval.tokens" if self.kind == "perplexity" else "eval.limit"

    def canonical(self) -> dict[str, Any]:
        """What defines the measurement beside its cell, as plain JSON values."""
        return {
            "kind": self.kind,
            "name": self.name,
            "version": self.version,
            "num_fewshot": self.num_fewshot,
            "window": self.window,
            "limit": self.limit,
            "dataset": self.dataset,
            "compute_dtype": self.compute_dtype,
        }


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What one evaluation measured.

    Attributes:
        metrics: value by metric ('loss' in nats a token, 'perplexity', 'bits_per_byte', 'acc', ...); inf and NaN too.
        stderr: standard error by metric, where there is one.
        samples: outcome of every sample: bool arrays for right or wrong, float32 or int32 arrays otherwise; a text set
            has 'nats' and 'tokens' of each window.
        diverged: the model gave values that are not finite, or a loss above ln(vocabulary) + 1. A result, not a
            failure.
        n_samples: documents, or windows.
        n_tokens: tokens that went through the model (scored and context), for the cost model.
        dataset_hash: SHA-256 of what was evaluated (the tokens of a text set, the requests of a task): provenance.
    """

    metrics: Mapping[str, float]
    stderr: Mapping[str, float]
    samples: Mapping[str, NDArray[Any]]
    diverged: bool
    n_samples: int
    n_tokens: int
    dataset_hash: str


def _whole_number(key: str, value: int | None, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST_NUMBER:
        raise SpecError(key, value, f"a whole number of at least {least} (and at most 2^40)")
