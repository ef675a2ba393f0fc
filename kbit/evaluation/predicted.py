"""Predict how many tokens an evaluation puts through the model, for a launch to predict its cost from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kbit.evaluation.evaluators import (
    BATCHES,
    NEW_TOKENS,
    PROMPT_TOKENS,
    REPETITIONS,
    WARM_UPS,
)
from kbit.sources import LocalFile, documents_of

if TYPE_CHECKING:
    from kbit.evaluation.spec import EvalSpec

TEXT_TOKENS: Final = 2_000_000
"""Of a text set without a limit, where its size is not known before it is read."""
TASK_TOKENS: Final = {
    # documents x tokens of a context and its continuations, of the full sets
    "lambada_openai": (5153, 90),
    "piqa": (1838, 55),
    "hellaswag": (10042, 75 + 4 * 27),
    "winogrande": (1267, 33),
}
OTHER_TASK: Final = (5000, 300)
BYTES_PER_TOKEN: Final = 3.5
NOISE_PASSES: Final = 300
"""Over the windows: six per layer, of which half on average is run, in ``NOISE_BLOCKS`` of ``NOISE_LAYERS`` each."""
REPEATED: Final = 1.2
"""A task's file goes through the model a little more than once: templates add words, and rows of a batch are padded."""


def text_tokens(spec: EvalSpec) -> int:
    """Count the tokens of a text set, each once."""
    text = documents_of(spec.source)
    size = text.bytes if isinstance(text, LocalFile) else None
    whole = int(size / BYTES_PER_TOKEN) if size else TEXT_TOKENS
    return min(spec.limit or whole, whole)


def noise_tokens(spec: EvalSpec) -> int:
    """Predict the tokens of measuring what noise in each layer does to the loss."""
    return NOISE_PASSES * (spec.limit or TEXT_TOKENS)


def latency_tokens(_: EvalSpec) -> int:
    """Count the tokens that latency puts through the model."""
    return (WARM_UPS + REPETITIONS) * (PROMPT_TOKENS + NEW_TOKENS) * sum(BATCHES)


def task_tokens(spec: EvalSpec) -> int:
    """Predict the tokens of a task's requests."""
    file = documents_of(spec.source)
    if isinstance(file, LocalFile) and file.bytes and file.documents:
        documents, each = file.documents, file.bytes / file.documents / BYTES_PER_TOKEN * REPEATED
    else:
        documents, each = TASK_TOKENS.get(spec.name, OTHER_TASK)
    return int((min(spec.limit, documents) if spec.limit else documents) * each)
