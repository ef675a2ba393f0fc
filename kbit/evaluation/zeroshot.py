"""Zero-shot tasks: lm-eval's own definitions, requests, filters, metrics and aggregation, around our own scoring.

Everything that depends on the task and the tokenizer only is built once; a cell costs the model's forward passes and
lm-eval's scoring of results. The steps are those of ``lm_eval.evaluator.evaluate`` (0.4.13).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from kbit.evaluation.evaluators import TASK
from kbit.evaluation.generation import generate
from kbit.evaluation.requests import RequestEncoder, ScoringPlan, sum_windows
from kbit.evaluation.scoring import TokenScorer
from kbit.evaluation.sharing import SHARED, sharing
from kbit.evaluation.spec import EvalResult, EvalSpec
from kbit.evaluation.tasks import build_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BOOTSTRAP_RESAMPLES: Final = 1000
"""For the metrics whose standard error lm-eval bootstraps: its first 1,000 resamples (of 100,000, which take minutes a
cell).
"""
RIGHT_OR_WRONG: Final = frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"})
REQUEST_TYPES: Final = ("loglikelihood", "loglikelihood_rolling", "generate_until")
ONE_FILTER: Final = "none"
_DECLARED: Final = {metric.name: metric.higher_is_better for metric in TASK.metrics}


@dataclass(kw_only=True)
class Answers:
    """The model's response to each request of one type, whether it is made of numbers, the tokens that it took, and
    whether beginnings were shared (``kbit.evaluation.sharing``).
    """

    responses: list[Any] = field(default_factory=list)
    defined: list[bool] = field(default_factory=list)
    finite: bool = True
    tokens: int = 0
    prefixes: str | None = None


@dataclass(frozen=True, kw_only=True)
class TaskEval:
    """A task with its requests built and encoded.

    Attributes:
        task: the lm_eval Task, whose instances ``run`` fills and reads.
        requests: its instances by request type, each repeated as the task asks.
        plans: what to score for each type of log-likelihood; for rolling ones with the text of each window.
        encoder: encodes what is to be continued.
        dataset_hash: SHA-256 of the requests.
    """

    task: Any
    requests: dict[str, list[Any]]
    plans: dict[str, tuple[ScoringPlan, list[int]]]
    encoder: RequestEncoder
    dataset_hash: str

    def run(self, model: PreTrainedModel, *, batch_tokens: int) -> EvalResult:
        """Return the task's metrics as lm-eval aggregates them, with standard errors and each metric per sample.

        A document with an undefined response (NaN) has undefined metrics, and so has the mean over documents: NaN,
        never a number that comes from comparing with NaN. ``diverged`` is set by any log-likelihood that is not finite.
        """
        for instance in self.task.instances:
            instance.resps, instance.filtered_resps = [], {}
        undefined: set[int] = set()
        finite, tokens = True, 0
        prefixes: list[str] = []
        for kind, instances in self.requests.items():
            answers = self._answer(kind, instances, model, batch_tokens)
            finite, tokens = finite and answers.finite, tokens + answers.tokens
            prefixes += [] if answers.prefixes is None else [answers.prefixes]
            for instance, response, defined in zip(instances, answers.responses, answers.defined, strict=True):
                instance.resps.append(response)
                if not defined:
                    undefined.add(instance.doc_id)
        self.task.apply_filters()
        found = _aggregate(self.task, undefined)
        return EvalResult(
            metrics=found.metrics,
            stderr=found.stderr,
            samples=found.samples,
            diverged=not finite,
            n_samples=len({instance.doc_id for instance in self.task.instances}),
            n_tokens=tokens,
            dataset_hash=self.dataset_hash,
            higher_is_better=found.higher_is_better,
            prefixes="; ".join(dict.fromkeys(prefixes)) or None,
        )

    def _answer(self, kind: str, instances: list[Any], model: PreTrainedModel, batch_tokens: int) -> Answers:
        if kind == "generate_until":
            generated = generate(model, self.encoder, [i.args for i in instances], batch_tokens=batch_tokens)
            return Answers(
                responses=generated.texts,
                defined=generated.defined,
                finite=all(generated.defined),
                tokens=generated.tokens,
            )
        plan, owners = self.plans[kind]
        scorer = TokenScorer(model)
        prefixes = sharing(scorer, plan, batch_tokens=batch_tokens)
        share = prefixes == SHARED
        scored: list[Any] = plan.run(scorer, batch_tokens=batch_tokens, share=share)
        values = [value for value, _ in scored]
        if kind == "loglikelihood_rolling":
            scored = values = sum_windows(scored, owners, len(instances))
        return Answers(
            responses=scored,
            defined=[not math.isnan(value) for value in values],
            finite=all(map(math.isfinite, values)),
            tokens=plan.count_tokens(share=share),
            prefixes=prefixes,
        )


def prepare_task(spec: EvalSpec, tokenizer: Any, *, context: int, vocab_size: int) -> TaskEval:
    """Build an lm-eval task and encode the requests of its first ``spec.limit`` documents.

    Raises:
        SpecError, ValueError: as ``kbit.evaluation.tasks.build_task``; also a type of request that a causal language
            model can't answer, and a token that is not in the model's vocabulary.
    """
    # Progress bars go to stderr, where they would break ours.
    with contextlib.redirect_stderr(io.StringIO()):
        task = build_task(spec)
        task.build_all_requests(limit=spec.limit)
    requests: dict[str, list[Any]] = defaultdict(list)
    digest = hashlib.sha256()
    for instance in task.instances:
        requests[instance.request_type].extend([instance] * instance.repeats)
        digest.update(json.dumps([instance.request_type, *instance.args], default=str).encode() + b"\n")
    encoder = RequestEncoder(tokenizer, context=context)
    plans: dict[str, tuple[ScoringPlan, list[int]]] = {}
    for kind, instances in requests.items():
        if kind not in REQUEST_TYPES or any(len(instance.args) > 2 for instance in instances):
            raise ValueError(f"the task {spec.name!r} asks for {kind!r} of more than text, which is not supported")
        if kind == "loglikelihood":
            plans[kind] = encoder.plan([i.args for i in instances]), []
        elif kind == "loglikelihood_rolling":
            plans[kind] = encoder.plan_windows([i.args[0] for i in instances])
    for plan, _ in plans.values():
        if plan.largest_id >= vocab_size:
            vocabulary = f"the model's vocabulary has {vocab_size} entries: they don't match"
            raise ValueError(f"the tokenizer gives token {plan.largest_id}; {vocabulary}")
    return TaskEval(task=task, requests=dict(requests), plans=plans, encoder=encoder, dataset_hash=digest.hexdigest())


@dataclass(frozen=True, kw_only=True)
class Aggregated:
    """The results of a task by metric: values, standard errors, samples; and directions, where ``TASK`` declares none,
    or another than the task's own definition.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    stderr: dict[str, float] = field(default_factory=dict)
    samples: dict[str, NDArray[Any]] = field(default_factory=dict)
    higher_is_better: dict[str, bool] = field(default_factory=dict)


def _aggregate(task: Any, undefined: set[int]) -> Aggregated:
    """Aggregate a task whose instances are filled. Documents in ``undefined`` have NaN for every metric."""
    by_document: dict[int, list[Any]] = defaultdict(list)
    for instance in task.instances:
        by_document[instance.doc_id].append(instance)
    found = Aggregated()
    filters = list(task.instances[0].filtered_resps)
    for name in filters:
        values: dict[str, list[Any]] = defaultdict(list)
        for document, instances in by_document.items():
            instances.sort(key=lambda instance: instance.idx)
            results = task.process_results(instances[0].doc, [instance.filtered_resps[name] for instance in instances])
            for metric, value in results.items():
                values[metric].append(math.nan if document in undefined else value)
        for metric, items in values.items():
            key = metric if len(filters) == 1 or name == ONE_FILTER else f"{metric}_{name.replace('-', '_')}"
            aggregate = task.aggregation().get(metric) or _mean()
            found.metrics[key] = _aggregated(aggregate, items)
            error = _standard_error(aggregate, items, found.metrics[key])
            if error is not None:
                found.stderr[key] = error
            found.samples.update(_samples(key, metric, items))
            # lm-eval has it from the task's definition, or from its own list of metrics; None where nobody says.
            higher = task.higher_is_better().get(metric)
            if isinstance(higher, bool) and _DECLARED.get(key) != higher:
                found.higher_is_better[key] = higher
    return found


def _mean() -> Callable[[Sequence[Any]], float]:
    from lm_eval.api.metrics import mean

    return mean  # type: ignore[no-any-return]


def _has_nan(items: Sequence[Any]) -> bool:
    return any(isinstance(item, float) and math.isnan(item) for item in items)


def _aggregated(aggregate: Callable[[Sequence[Any]], Any], items: Sequence[Any]) -> float:
    if _has_nan(items):
        return math.nan
    try:
        return float(aggregate(items))
    except OverflowError:  # math.exp of a loss that has exploded
        return math.inf


def _standard_error(aggregate: Callable[[Sequence[Any]], Any], items: Sequence[Any], value: float) -> float | None:
    """lm-eval's standard error, but of perplexity = exp(-mean) to first order, where lm-eval bootstraps; None where
    lm-eval has none.
    """
    from lm_eval.api.metrics import _bootstrap_internal, perplexity, sample_stddev, stderr_for_metric

    if len(items) < 2:
        return None
    if _has_nan(items):
        return math.nan
    if aggregate is perplexity:
        with np.errstate(invalid="ignore"):
            return value * float(np.std(items, ddof=1)) / math.sqrt(len(items))
    function = stderr_for_metric(aggregate, BOOTSTRAP_RESAMPLES)
    if function is None:
        return None
    if aggregate is _mean():
        return float(function(items))
    # function(items) would start a process a core and print; these are its own resamples.
    return float(sample_stddev(_bootstrap_internal(aggregate, BOOTSTRAP_RESAMPLES)((0, items))))


def _samples(key: str, metric: str, items: Sequence[Any]) -> dict[str, NDArray[Any]]:
    """Values of a metric, one per document: bool for right or wrong, else float32; parts of a tuple apart. What isn't
    numbers is left out.
    """
    if all(isinstance(item, tuple | list) and len(item) == len(items[0]) for item in items):
        parts = zip(*items, strict=True)
        return {k: v for i, part in enumerate(parts) for k, v in _samples(f"{key}_{i}", "", list(part)).items()}
    if not all(isinstance(item, int | float | np.number | np.bool_) for item in items):
        return {}
    array = np.asarray(items, dtype=np.float32)
    if metric in RIGHT_OR_WRONG and bool(np.isin(array, (0, 1)).all()):
        return {key: array.astype(bool)}
    return {key: array}
