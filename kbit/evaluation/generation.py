"""Text generation for lm-eval's generate_until requests, as HFLM does it: batches padded on the left, cut at stop
sequences.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kbit.evaluation.requests import RequestEncoder

MAX_NEW_TOKENS: Final = 256
"""HFLM's default, where a task says nothing."""
SEED: Final = 1234
"""lm-eval's torch seed, for tasks that sample."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Generated text of each request; whether the model's logits were numbers throughout; tokens that went through the
    model.
    """

    texts: list[str]
    defined: list[bool]
    tokens: int


class _WatchLogits:
    """A logits processor that changes nothing and remembers the rows that had a NaN or +inf."""

    def __init__(self, rows: int) -> None:
        self.bad = torch.zeros(rows, dtype=torch.bool)

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.bad |= (scores.isnan() | scores.isposinf()).any(-1).cpu()
        return scores


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    encoder: RequestEncoder,
    requests: Sequence[tuple[str, dict[str, Any]]],
    *,
    batch_tokens: int,
) -> Generated:
    """Generate for (context, lm-eval's generation arguments) pairs: greedily unless the task asks for sampling, which
    is seeded.

    Raises:
        ValueError: a task asks for at least as many new tokens as the model has context.
    """
    ids = encoder.encode(context for context, _ in requests)
    even = any(getattr(module, "of_sequences", False) for module in model.modules())  # as TokenScorer
    groups: dict[str, list[int]] = defaultdict(list)
    for index, (_, arguments) in enumerate(requests):
        groups[json.dumps(arguments, sort_keys=True, default=str)].append(index)
    texts, defined, tokens = [""] * len(requests), [True] * len(requests), 0
    for members in groups.values():
        members.sort(key=lambda index: -len(ids[requests[index][0]]))
        settings = _Settings.of(requests[members[0]][1], encoder)
        start = 0
        while start < len(members):
            longest = min(settings.room, len(ids[requests[members[start]][0]])) + settings.new_tokens
            batch = members[start : start + max(1, batch_tokens // longest)]
            if even:
                size = len(ids[requests[batch[0]][0]])
                batch = [index for index in batch if len(ids[requests[index][0]]) == size]
            contexts = [ids[requests[index][0]][-settings.room :] or [encoder.prefix_token] for index in batch]
            outputs, bad = _run_batch(model, encoder.tokenizer, contexts, settings)
            for index, output, is_bad in zip(batch, outputs, bad, strict=True):
                text = encoder.tokenizer.decode(output, skip_special_tokens=True)
                texts[index] = postprocess_generated_text(text, stop=settings.stop, think_end_token=None)
                defined[index] = not is_bad
            tokens += sum(map(len, contexts)) + sum(map(len, outputs))
            start += len(batch)
    return Generated(texts=texts, defined=defined, tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Settings of generation: stop sequences, most new tokens, what a context may then have, further arguments."""

    stop: list[str]
    new_tokens: int
    room: int
    options: dict[str, Any]

    @classmethod
    def of(cls, arguments: dict[str, Any], encoder: RequestEncoder) -> _Settings:
        options = dict(normalize_gen_kwargs(arguments, MAX_NEW_TOKENS))
        end = encoder.tokenizer.decode([encoder.tokenizer.eos_token_id])
        stop = handle_stop_sequences(options.pop("until", None), eos=end)
        new_tokens = options.pop("max_gen_toks")
        room = encoder.context - new_tokens
        if room < 1:
            raise ValueError(f"the task asks for {new_tokens} new tokens; the model's context has {encoder.context}")
        if not options.get("do_sample"):
            options.pop("temperature", None)
        return cls(stop=stop, new_tokens=new_tokens, room=room, options=options)


def _run_batch(
    model: Any, tokenizer: Any, contexts: list[list[int]], settings: _Settings
) -> tuple[list[list[int]], list[bool]]:
    from lm_eval.models.utils_hf import stop_sequences_criteria
    from transformers import LogitsProcessorList

    length, device = max(map(len, contexts)), model.get_input_embeddings().weight.device
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    watch = _WatchLogits(len(contexts))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        outputs = model.generate(
            input_ids=torch.tensor([[pad] * (length - len(c)) + c for c in contexts], device=device),
            attention_mask=torch.tensor([[0] * (length - len(c)) + [1] * len(c) for c in contexts], device=device),
            stopping_criteria=stop_sequences_criteria(tokenizer, settings.stop, length, len(contexts)),
            logits_processor=LogitsProcessorList([watch]),
            pad_token_id=pad,
            use_cache=True,
            **{"max_length": length + settings.new_tokens, **settings.options},
        )
    return [row[length:] for row in outputs.tolist()], watch.bad.tolist()
