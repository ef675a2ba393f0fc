"""Prepare an EvalSpec to run: encode its text or build its task's requests, once per tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from kbit.doors import load
from kbit.evaluation.evaluators import EVALUATORS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kbit.evaluation.spec import EvalResult, EvalSpec


class PreparedEval(Protocol):
    """An evaluation whose data lie encoded in memory; a worker keeps one and runs it on many cells of the same
    tokenizer.
    """

    def run(self, model: PreTrainedModel, *, batch_tokens: int) -> EvalResult:
        """Measure ``model`` (in eval mode); a batch holds at most ``batch_tokens`` tokens, padding included, or one
        sequence.
        """


class ComparingEval(PreparedEval, Protocol):
    """An evaluation that compares a model with its 16-bit form: what is prepared where ``Evaluator.compares``.

    Its ``run`` raises ValueError: ``refer`` returns the one that runs.
    """

    def refer(self, model: PreTrainedModel, *, batch_tokens: int) -> PreparedEval:
        """Take from ``model``, in its 16-bit form and in eval mode, what others are compared with.

        The evaluation that is returned is for other forms of this very model, in the same compute dtype. Run with the
        same ``batch_tokens`` on the 16-bit form, it finds no difference, to the bit.
        """


class Prepare(Protocol):
    """The function that ``Evaluator.prepare`` names: it reads and encodes what a spec evaluates."""

    def __call__(self, spec: EvalSpec, tokenizer: Any, *, context: int, vocab_size: int) -> PreparedEval: ...


def prepare(spec: EvalSpec, tokenizer: Any, *, context: int, vocab_size: int) -> PreparedEval:
    """Read and encode what ``spec`` evaluates.

    Args:
        spec: the evaluation.
        tokenizer: a transformers tokenizer.
        context: the model's context length in tokens.
        vocab_size: entries of the model's vocabulary: bounds the token ids, and ln(vocab_size) + 1 the loss of what has
            not diverged.

    Raises:
        SpecError: a limit below one window; few-shot examples that a task or local data can't give.
        ValueError: data that are missing, malformed or too short, naming file, line and field.

    What compares (``Evaluator.compares``) is a ``ComparingEval``: ``refer`` comes before ``run``.
    """
    function: Prepare = load(EVALUATORS[spec.kind].prepare)
    return function(spec, tokenizer, context=context, vocab_size=vocab_size)
