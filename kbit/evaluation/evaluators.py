"""The kinds of evaluations: what each needs, costs and measures. Imports no torch, so planning and analysis stay light.

A kind is one ``Evaluator`` in ``EVALUATORS``; what computes it is a file of its own, imported when it runs. Another
package adds a kind by an entry point of the group ``kbit_sweep.evaluations``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from kbit.doors import Door
from kbit.errors import SpecError

Data = Literal["text", "task", "none"]
"""What an evaluation reads: a text set, the documents of an lm-eval task, or nothing."""


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """A metric, declared where it is made.

    Attributes:
        name: as results carry it: the columns ``{eval}_{name}``.
        title: for people, e.g. 'Loss'.
        unit: e.g. 'nats/token'; empty for a fraction or a ratio.
        higher_is_better: accuracies yes, losses no; None for a property of the model that is neither good nor bad, so
            that nothing is ranked by it.
        decimals: how many a table shows.
    """

    name: str
    title: str
    unit: str = ""
    higher_is_better: bool | None
    decimals: int = 3


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """A kind of evaluation.

    Attributes:
        data: what it reads. Users name text sets, or tasks; with 'none', the evaluation itself.
        prepare: "module:function", as ``kbit.evaluation.prepared.Prepare``; imported when it runs.
        tokens: "module:function", or the function, from a spec to about how many tokens go through the model, for
            predicting the cost.
        recompute: "module:function" from the stored samples to the metrics and standard errors that follow from them
            (``kbit.evaluation.recomputed``); None where none do.
        metrics: what it measures. A name means the same in every kind.
        settings: the fields of ``EvalSpec`` that the kind uses, each with the key under ``eval`` that it comes from.
        version: of what it computes, raised when a number would change; None where the data have a version.
        suffix: follows the data's name in the evaluation's, so that several kinds can read one text set.
        modules: what must be importable where it runs, besides torch and transformers.
        packed: it measures the model with its layers held in k bits, not with their dequantized weights.
        identity_of_device: the device belongs to the measurement's identity, since the number is one of the device.
        compares: it compares a model with its 16-bit form, from which it takes what it needs before the model is
            quantized: what is prepared is a ``kbit.evaluation.prepared.ComparingEval``.
        brings: kinds whose results, of the same data under the same settings, come with its own
            (``EvalResult.also``): where both are due, the model runs once.
        baseline_only: it looks at the model before it is quantized: of a study's cells only the 16-bit baselines have
            it.
        looks_inside: it watches what enters the model's layers, so the model has to be in memory as a whole: layer by
            layer only what leaves the last block is known.
        needs_order: it needs to know which layer follows which (``kbit.models.orders``).
        context: tokens of context that a model needs for it; None where any will do.
        steps: forward passes of a few tokens, for predicting the cost: each reads all weights.
        own_batches: memory does not change its batches, so smaller ones of the others don't help it.
        of_methods: methods ask for it (``Spec.measures``), of the 16-bit model and the data that they calibrate on;
            users don't name it.
    """

    data: Data
    prepare: str
    tokens: str | Callable[[Any], int]
    metrics: tuple[MetricSpec, ...]
    recompute: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    version: str | None = "1"
    suffix: str = ""
    modules: tuple[str, ...] = ()
    packed: bool = False
    identity_of_device: bool = False
    compares: bool = False
    brings: tuple[str, ...] = ()
    baseline_only: bool = False
    looks_inside: bool = False
    needs_order: bool = False
    context: int | None = None
    steps: int = 0
    own_batches: bool = False
    of_methods: bool = False

    def key(self, name: str) -> str:
        """Return the setting that a field of the spec comes from, for messages."""
        return f"eval.{self.settings.get(name, name)}"


_PERPLEXITY: Final = MetricSpec(name="perplexity", title="Perplexity", higher_is_better=False, decimals=2)
_BITS_PER_BYTE: Final = MetricSpec(name="bits_per_byte", title="Compression", unit="bits/byte", higher_is_better=False)

PERPLEXITY: Final = Evaluator(
    data="text",
    prepare="kbit.evaluation.perplexity:prepare_perplexity",
    recompute="kbit.evaluation.recomputed:text_numbers",
    tokens="kbit.evaluation.predicted:text_tokens",
    metrics=(
        MetricSpec(name="loss", title="Loss", unit="nats/token", higher_is_better=False),
        _PERPLEXITY,
        _BITS_PER_BYTE,
    ),
    settings={"window": "window", "limit": "tokens", "bos": "bos"},
)

AGREEMENT: Final = Evaluator(
    data="text",
    prepare="kbit.evaluation.agreement:prepare_agreement",
    recompute="kbit.evaluation.recomputed:agreement_numbers",
    # Of one pass: the 16-bit model's is made once for all cells of a loaded model.
    tokens="kbit.evaluation.predicted:text_tokens",
    metrics=(
        MetricSpec(
            name="kl", title="Divergence from 16-bit (KL)", unit="nats/token", higher_is_better=False, decimals=5
        ),
        MetricSpec(
            name="kl_median",
            title="Median divergence from 16-bit (KL)",
            unit="nats",
            higher_is_better=False,
            decimals=5,
        ),
        MetricSpec(
            name="kl_p99",
            title="99th percentile of divergence from 16-bit (KL)",
            unit="nats",
            higher_is_better=False,
            decimals=4,
        ),
        MetricSpec(name="top_token", title="Same top token as 16-bit", higher_is_better=True, decimals=4),
        # Signed: probability that the text's own tokens lost is negative.
        MetricSpec(name="p_change", title="Change of p(target) from 16-bit", higher_is_better=True, decimals=5),
        MetricSpec(
            name="p_change_rms",
            title="Change of p(target) from 16-bit, root mean square",
            higher_is_better=False,
            decimals=5,
        ),
    ),
    settings=PERPLEXITY.settings,
    suffix="_agreement",
    compares=True,
    brings=("perplexity",),
)

TASK: Final = Evaluator(
    data="task",
    prepare="kbit.evaluation.zeroshot:prepare_task",
    recompute="kbit.evaluation.recomputed:task_numbers",
    tokens="kbit.evaluation.predicted:task_tokens",
    # Of lm-eval's metrics those that its tasks use most. Others have the direction that the task's definition gives.
    metrics=(
        _PERPLEXITY,
        MetricSpec(name="word_perplexity", title="Word perplexity", higher_is_better=False, decimals=2),
        MetricSpec(name="byte_perplexity", title="Byte perplexity", higher_is_better=False),
        _BITS_PER_BYTE,
        MetricSpec(name="acc", title="Accuracy", higher_is_better=True),
        MetricSpec(name="acc_norm", title="Length-normalised accuracy", higher_is_better=True),
        MetricSpec(name="exact_match", title="Exact match", higher_is_better=True),
        MetricSpec(name="f1", title="F1", higher_is_better=True),
        MetricSpec(name="mcc", title="Matthews correlation", higher_is_better=True),
        MetricSpec(name="brier_score", title="Brier score", higher_is_better=False),
    ),
    settings={"num_fewshot": "num_fewshot", "limit": "limit"},
    version=None,
    modules=("datasets", "lm_eval.api.task"),
)

BATCHES: Final = (1, 16)
PROMPT_TOKENS: Final = 128
NEW_TOKENS: Final = 128
WARM_UPS: Final = 3
REPETITIONS: Final = 10
"""Of latency: sequences, tokens, and repetitions. What it measures is named by them, so they are no settings."""


def _with_quartiles(metric: MetricSpec) -> tuple[MetricSpec, ...]:
    """Return the metric of a median, and those of its quartiles."""
    lower, upper = (
        replace(metric, name=f"{metric.name}_{suffix}", title=f"{metric.title}, {title} quartile")
        for suffix, title in (("q25", "first"), ("q75", "third"))
    )
    return metric, lower, upper


def _at_batch(batch: int) -> tuple[MetricSpec, ...]:
    rate = MetricSpec(
        name=f"tokens_per_second_{batch}",
        title=f"Tokens a second at batch {batch}",
        unit="tokens/s",
        higher_is_better=True,
        decimals=1,
    )
    ttft = MetricSpec(
        name=f"ttft_{batch}",
        title=f"Time to first token at batch {batch}",
        unit="ms",
        higher_is_better=False,
        decimals=2,
    )
    peak = MetricSpec(
        name=f"peak_memory_{batch}",
        title=f"Peak memory at batch {batch}",
        unit="MB",
        higher_is_better=False,
        decimals=1,
    )
    return *_with_quartiles(rate), *_with_quartiles(ttft), peak


LATENCY: Final = Evaluator(
    data="text",
    prepare="kbit.evaluation.latency:prepare_latency",
    recompute="kbit.evaluation.recomputed:latency_numbers",
    tokens="kbit.evaluation.predicted:latency_tokens",
    metrics=(
        *(metric for batch in BATCHES for metric in _at_batch(batch)),
        MetricSpec(name="size_on_disk", title="Size on disk", unit="MB", higher_is_better=False, decimals=1),
    ),
    settings={"attention": "attention", "execution": "execution"},
    suffix="_latency",
    packed=True,
    identity_of_device=True,
    context=PROMPT_TOKENS + NEW_TOKENS,
    steps=(WARM_UPS + REPETITIONS) * (NEW_TOKENS - 1) * len(BATCHES),
    own_batches=True,
)

OUTLIER_MAGNITUDE: Final = 6.0
OUTLIER_LAYERS: Final = 0.25
OUTLIER_POSITIONS: Final = 0.06
"""What makes a dimension an outlier feature (LLM.int8(), Dettmers et al., 2022, section 4): a magnitude, and the shares
of layers and of sequence positions in which it occurs, at least. They are the definition, so they are no settings.
"""

SPREAD_PAIRS: Final[Mapping[str, tuple[str, str]]] = {
    "ffn1_ffn2": ("FFN 1", "FFN 2"),
    "value_output": ("V", "attention output"),
    "output_ffn1": ("attention output", "FFN 1"),
    "ffn2_ffn1": ("previous FFN 2", "FFN 1"),
    "ffn2_qkv": ("previous FFN 2", "QKV"),
}
"""Name of a pair to (layer whose weights' spread it is, layer that reads the activations): Table 2's three rows, then
those that the paper does not have. Where attention and FFN read the same input, FFN 1 follows the previous block's
FFN 2.
"""


def _neutral(name: str, title: str, *, unit: str = "", decimals: int = 3) -> MetricSpec:
    return MetricSpec(name=name, title=title, unit=unit, higher_is_better=None, decimals=decimals)


OUTLIERS: Final = Evaluator(
    data="text",
    prepare="kbit.evaluation.outliers:prepare_outliers",
    recompute="kbit.evaluation.recomputed:outlier_numbers",
    tokens="kbit.evaluation.predicted:text_tokens",
    metrics=(
        _neutral("outlier_features", "Outlier features", decimals=0),
        _neutral("outlier_layers", "Layers with outlier features"),
        _neutral("outlier_positions", "Positions with outlier features"),
        _neutral("widest_layers", "Layers with the widest large feature"),
        _neutral("widest_positions", "Positions with the widest large feature"),
        _neutral("largest_input", "Largest input of attention and FFN", decimals=1),
        *(
            _neutral(f"spearman_{pair}", f"Correlation of spread of {by} with input of {reads}")
            for pair, (by, reads) in SPREAD_PAIRS.items()
        ),
    ),
    settings=PERPLEXITY.settings,
    suffix="_outliers",
    baseline_only=True,
    looks_inside=True,
    needs_order=True,
)

NOISE_BLOCKS: Final = 24
NOISE_LAYERS: Final = 4
"""Blocks, and layers in each, of the model by which noise in every layer is predicted."""

SENSITIVITY: Final = Evaluator(
    data="text",
    prepare="kbit.evaluation.sensitivity:prepare_sensitivity",
    recompute="kbit.evaluation.recomputed:slope_numbers",
    tokens="kbit.evaluation.predicted:noise_tokens",
    metrics=(
        _neutral("noise_rise", "Rise of the loss by noise of a tenth of each weight", unit="nats/token", decimals=4),
    ),
    suffix="_sensitivity",
    baseline_only=True,
    looks_inside=True,
    own_batches=True,
    of_methods=True,
)

EVALUATORS: Final[Door[Evaluator]] = Door(
    "kbit_sweep.evaluations",
    "eval.kinds",
    {
        "perplexity": PERPLEXITY,
        "task": TASK,
        "agreement": AGREEMENT,
        "latency": LATENCY,
        "outliers": OUTLIERS,
        "sensitivity": SENSITIVITY,
    },
)


def declared_metrics() -> Mapping[str, MetricSpec]:
    """Return every metric that some kind declares, by name.

    Raises:
        SpecError: two kinds declare a metric of one name differently.
    """
    found: dict[str, MetricSpec] = {}
    for kind, evaluator in EVALUATORS.items():
        for metric in evaluator.metrics:
            known = found.setdefault(metric.name, metric)
            if known != metric:
                raise SpecError(f"eval.kinds.{kind}: the metric {metric.name}", metric, f"another kind has {known}")
    return found
