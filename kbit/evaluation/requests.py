"""lm-eval's requests: encoded once for a tokenizer, scored on a model by token batches.

lm-eval's HFLM is the definition: requests are encoded, cut and scored as it does (lm_eval 0.4.13,
models/huggingface.py), so accuracies are equal. What differs is that encoding is apart from scoring, so a worker
encodes a task once and scores it for every cell; HFLM encodes with each call. tests/kbit/evaluation/test_zeroshot.py
compares encodings, scores and metrics with HFLM's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from kbit.evaluation.scoring import TokenScorer

ENCODE_BATCH: Final = 1000


@dataclass(frozen=True, kw_only=True)
class ScoringPlan:
    """Continuations to score, encoded: what a model sees, each distinct input once.

    Attributes:
        inputs: token ids of each distinct input, longest first. Continuations that differ in their last token only
            (one-token answers to the same question, say) share one.
        owners: for each input, the (index of the request, its target tokens) scored on it; targets are predicted at the
            input's end.
        count: requests.
    """

    inputs: list[list[int]]
    owners: list[list[tuple[int, list[int]]]]
    count: int

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.inputs)

    @property
    def largest_id(self) -> int:
        targets = (max(target) for owners in self.owners for _, target in owners)
        return max(max(max(ids) for ids in self.inputs), *targets) if self.inputs else 0

    def run(self, scorer: TokenScorer, *, batch_tokens: int) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives the continuation) of each request, in order."""
        results: list[tuple[float, bool]] = [(float("nan"), False)] * self.count
        start = 0
        while start < len(self.inputs):
            length = len(self.inputs[start])
            stop = min(len(self.inputs), start + max(1, batch_tokens // length))
            self._run_batch(scorer, start, stop, results)
            start = stop
        return results

    def _run_batch(self, scorer: TokenScorer, start: int, stop: int, results: list[tuple[float, bool]]) -> None:
        inputs, owners = self.inputs[start:stop], self.owners[start:stop]
        padded = np.zeros((len(inputs), len(inputs[0])), dtype=np.int64)
        rows, positions, targets, requests = [], [], [], []
        for row, (ids, of_input) in enumerate(zip(inputs, owners, strict=True)):
            padded[row, : len(ids)] = ids
            for request, target in of_input:
                rows.append(np.full(len(target), row))
                positions.append(np.arange(len(ids) - len(target), len(ids)))
                targets.append(target)
                requests.append(request)
        flat = (np.concatenate(part) for part in (rows, positions, targets))
        nats, greedy = scorer.score(padded, *flat)
        ends = np.cumsum([len(target) for target in targets])[:-1]
        per_request = zip(requests, np.split(nats, ends), np.split(greedy, ends), strict=True)
        for request, of_request, is_greedy in per_request:
            results[request] = (-float(of_request.sum(dtype=np.float64)), bool(is_greedy.all()))


class RequestEncoder:
    """Turn texts into token ids, exactly as HFLM does.

    Args:
        tokenizer: a transformers tokenizer.
        context: the model's context in tokens; longer inputs lose their beginning.
    """

    def __init__(self, tokenizer: Any, *, context: int) -> None:
        self.tokenizer, self.context = tokenizer, context
        bos = tokenizer.bos_token_id
        self.prefix_token = tokenizer.eos_token_id if bos is None else bos
        if self.prefix_token is None:
            raise ValueError(
                "the tokenizer has neither a beginning-of-sequence nor an end-of-sequence token, and tasks need one"
            )
        self._prefix_text = tokenizer.decode([self.prefix_token])

    def encode(self, texts: Iterable[str], *, special: bool | None = None) -> dict[str, list[int]]:
        """Token ids by text. ``special`` None: the tokenizer's default, but no second beginning token for a text that
        begins with one.
        """
        distinct = list(dict.fromkeys(texts))
        with_prefix = [t for t in distinct if special is None and t.startswith(self._prefix_text)]
        others = [t for t in distinct if special is not None or not t.startswith(self._prefix_text)]
        ids: dict[str, list[int]] = {}
        default = {} if special is None else {"add_special_tokens": special}
        for group, options in ((with_prefix, {"add_special_tokens": False}), (others, default)):
            for start in range(0, len(group), ENCODE_BATCH):
                batch = group[start : start + ENCODE_BATCH]
                ids.update(zip(batch, self.tokenizer(batch, verbose=False, **options)["input_ids"], strict=True))
        return ids

    def plan(self, requests: Sequence[tuple[str, str]]) -> ScoringPlan:
        """Plan (context, continuation) pairs.

        Blanks that end a context belong to its continuation; an empty context is one prefix token.
        """
        whole = self.encode(
            text for context, rest in requests if context for text in (context + rest, context.rstrip())
        )
        alone = self.encode((rest for context, rest in requests if not context), special=False)
        pairs = []
        for context, continuation in requests:
            if context:
                before = whole[context.rstrip()]
                pairs.append((before, whole[context + continuation][len(before) :]))
            elif alone[continuation][:1] != [self.prefix_token]:
                pairs.append(([self.prefix_token], alone[continuation]))
            else:
                pairs.append((alone[continuation][:1], alone[continuation][1:]))
        return self.plan_tokens(pairs)

    def plan_windows(self, texts: Sequence[str]) -> tuple[ScoringPlan, list[int]]:
        """Plan to score every token of each text in windows of the model's context.

        Also return the text that each request belongs to.
        """
        ids = self.encode(texts)
        pairs, owners = [], []
        for index, text in enumerate(texts):
            windows = get_rolling_token_windows(
                ids[text], prefix_token=self.prefix_token, max_seq_len=self.context, context_len=1
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(index)
        return self.plan_tokens(pairs), owners

    def plan_tokens(self, pairs: Sequence[tuple[list[int], list[int]]]) -> ScoringPlan:
        """Plan (context, continuation) pairs of token ids; what doesn't fit the model's context is cut on the
        left.
        """
        owners: dict[tuple[int, ...], list[tuple[int, list[int]]]] = defaultdict(list)
        for index, (context, target) in enumerate(pairs):
            if not context or not target:
                raise ValueError(
                    f"request {index} has an empty {'continuation' if context else 'context'} after encoding"
                )
            if len(target) > self.context:
                allowed = f"more than the model's context of {self.context}"
                raise ValueError(f"request {index} has a continuation of {len(target)} tokens, {allowed}")
            owners[tuple((context + target)[-(self.context + 1) :][:-1])].append((index, target))
        inputs = sorted(owners, key=lambda ids: (-len(ids), ids))
        return ScoringPlan(
            inputs=[list(ids) for ids in inputs], owners=[owners[ids] for ids in inputs], count=len(pairs)
        )


def sum_windows(results: Sequence[tuple[float, bool]], owners: Sequence[int], count: int) -> list[float]:
    """Log-likelihood of each text from those of its windows."""
    totals = [0.0] * count
    for (value, _), owner in zip(results, owners, strict=True):
        totals[owner] += value
    return totals
