"""A language model for lm-eval: its requests, scored on a transformers model by ``kbit.evaluation.requests``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM

from kbit.evaluation.generation import generate
from kbit.evaluation.requests import RequestEncoder, ScoringPlan, sum_windows
from kbit.evaluation.scoring import TokenScorer
from kbit.evaluation.sharing import SHARED, sharing

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel


class KbitLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """lm-eval's view of a transformers causal model: ``lm_eval.evaluate(lm=KbitLM(...))`` works, and
    ``kbit.evaluation`` uses the same parts.

    Args:
        model: a causal language model, in eval mode.
        tokenizer: its tokenizer.
        context: its context in tokens.
        batch_tokens: most tokens in a batch, padding included (one sequence always fits).
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, *, context: int, batch_tokens: int) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.encoder = RequestEncoder(tokenizer, context=context)
        self.scorer = TokenScorer(model)
        self._device = self.scorer.device

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return int(self.encoder.prefix_token)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.encoder.encode([string], special=add_special_tokens)[string]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._run(self.encoder.plan([r.args for r in requests]))

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self._run(self.encoder.plan_tokens(pairs))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        plan, owners = self.encoder.plan_windows([r.args[0] for r in requests])
        return sum_windows(self._run(plan), owners, len(requests))

    def _run(self, plan: ScoringPlan) -> list[tuple[float, bool]]:
        share = sharing(self.scorer, plan, batch_tokens=self.batch_tokens) == SHARED
        return plan.run(self.scorer, batch_tokens=self.batch_tokens, share=share)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        arguments = [r.args for r in requests]
        generated = generate(self.model, self.encoder, arguments, batch_tokens=self.batch_tokens)
        return generated.texts
