"""lm-eval's requests: encoded once for a tokenizer, scored on a model by token batches.

lm-eval's HFLM is the definition: requests are encoded, cut and scored as it does (lm_eval 0.4.13,
models/huggingface.py), so accuracies are equal. What differs is that encoding is apart from scoring, so a worker
encodes a task once and scores it for every cell; HFLM encodes with each call. tests/kbit/evaluation/test_zeroshot.py
compares encodings, scores and metrics with HFLM's.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from kbit.evaluation.encoding import encode_texts, find_joint
from kbit.evaluation.forests import Forest, Tree, fill_rows, grow_trees, size_of
from kbit.evaluation.scoring import OnItsWay, TokenBatch, TokenScorer
from kbit.garbage import uncollected

AHEAD: Final = 2
"""Batches that a GPU is asked for before the results of one are taken; more hold more of its memory."""

WORTH_A_BATCH: Final = 1 / 16
"""Padding, as a share of a batch's tokens, for which one batch more is no loss. A third of LAMBADA's first batch was
padding: 66 rows of 245 to 141 tokens.
"""


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

    def count_tokens(self, *, share: bool) -> int:
        """Return the tokens that go through the model, without padding."""
        return sum(map(size_of, self.shared)) if share else sum(map(len, self.inputs))

    @property
    def largest_id(self) -> int:
        targets = (max(target) for owners in self.owners for _, target in owners)
        return max(max(max(ids) for ids in self.inputs), *targets) if self.inputs else 0

    @cached_property
    def apart(self) -> list[list[Tree]]:
        """Rows of one input each, longest first."""
        trees = [Tree() for _ in self.inputs]
        for number, (tree, ids) in enumerate(zip(trees, self.inputs, strict=True)):
            tree.add(number, ids, 0)
        return [[tree.close()] for tree in trees]

    @cached_property
    def shared(self) -> list[list[Tree]]:
        """Rows in which inputs that begin alike share their beginning, the fullest first."""
        with uncollected():
            return fill_rows(list(grow_trees(self.inputs)))

    def run(self, scorer: TokenScorer, *, batch_tokens: int, share: bool) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives the continuation) of each request, in order.

        Args:
            scorer: of the model.
            batch_tokens: most tokens in a batch, padding included, or one row.
            share: beginnings that inputs have in common go through the model once.
        """
        return self.run_rows(scorer, self.shared if share else self.apart, batch_tokens=batch_tokens, share=share)

    def run_rows(
        self, scorer: TokenScorer, rows: Sequence[list[Tree]], *, batch_tokens: int, share: bool
    ) -> list[tuple[float, bool]]:
        """Score the requests of some rows; the others are NaN and False."""
        results: list[tuple[float, bool]] = [(math.nan, False)] * self.count
        begun: deque[tuple[_Batch, OnItsWay]] = deque()
        # A GPU always has the next batches to work on while one is laid out or its results are taken.
        for batch in self._batches(rows, batch_tokens, share, even=scorer.of_sequences):
            begun.append((batch, OnItsWay(*scorer.score(batch.tokens))))
            if len(begun) > AHEAD:
                _take(results, *begun.popleft())
        while begun:
            _take(results, *begun.popleft())
        return results

    def _batches(self, rows: Sequence[list[Tree]], batch_tokens: int, share: bool, *, even: bool) -> Iterator[_Batch]:
        """Yield the rows, longest first, in batches; `even` ones have no padding."""
        start = 0
        for count, length in cut_batches([size_of(row) for row in rows], batch_tokens, even=even):
            yield self._batch(rows[start : start + count], length, share)
            start += count

    def _batch(self, rows: Sequence[list[Tree]], length: int, share: bool) -> _Batch:
        """Lay rows of at most ``length`` tokens out for a forward pass."""
        ids, positions = np.zeros((2, len(rows), length), dtype=np.int64)
        ends = np.tile(np.arange(1, length + 1, dtype=np.int32), (len(rows), 1))
        at, targets, requests = [], [], []
        for row, trees in enumerate(rows):
            first = 0
            for tree in trees:
                last = first + len(tree.tokens)
                ids[row, first:last] = tree.tokens
                positions[row, first:last] = tree.positions
                ends[row, first:last] = np.asarray(tree.ends) + first
                for member, path in zip(tree.members, tree.paths, strict=True):
                    for request, target in self.owners[member]:
                        at.append(np.asarray(path[len(path) - len(target) :]) + (row * length + first))
                        targets.append(target)
                        requests.append(request)
                first = last
        return _Batch(
            tokens=TokenBatch.of(
                ids,
                np.concatenate(at),
                np.concatenate(targets),
                forest=Forest(positions=positions, ends=ends) if share else None,
            ),
            requests=requests,
            lengths=[len(target) for target in targets],
        )


def cut_batches(lengths: Sequence[int], batch_tokens: int, *, even: bool = False) -> Iterator[tuple[int, int]]:
    """Yield how many rows each batch has, and their length with padding.

    Args:
        lengths: of the rows, longest first.
        batch_tokens: most tokens in a batch, padding included, or one row. It ends earlier where the rest would be
            padded with more than ``WORTH_A_BATCH`` of them.
        even: no padding.
    """
    left = np.asarray(lengths)
    while len(left):
        longest = int(left[0])
        batch = left[: max(1, batch_tokens // longest)]
        if even:
            batch = batch[batch == longest]
        while True:
            spared = (len(batch) - np.arange(len(batch))) * (longest - batch)  # by ending before each row
            best = int(spared.argmax())
            if spared[best] <= WORTH_A_BATCH * batch_tokens:
                break
            batch = batch[:best]
        yield len(batch), longest
        left = left[len(batch) :]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    """Rows for one forward pass; the requests whose targets are scored, one after another, and their numbers."""

    tokens: TokenBatch
    requests: list[int]
    lengths: list[int]


def _take(results: list[tuple[float, bool]], batch: _Batch, scored: OnItsWay) -> None:
    """Put what a batch gave in its requests' places."""
    starts = np.cumsum([0, *batch.lengths[:-1]])
    nats, greedy = scored.arrays()
    sums = np.add.reduceat(nats, starts, dtype=np.float64)
    # A GPU has nothing to do while the last batches are here: no steps by request.
    all_greedy = np.logical_and.reduceat(greedy, starts)
    for request, of_request, is_greedy in zip(batch.requests, (-sums).tolist(), all_greedy.tolist(), strict=True):
        results[request] = (of_request, is_greedy)


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
        self._joint = find_joint(tokenizer)

    def encode(self, texts: Iterable[str], *, special: bool | None = None) -> dict[str, list[int]]:
        """Token ids by text. ``special`` None: the tokenizer's default, but no second beginning token for a text that
        begins with one.
        """
        distinct = list(dict.fromkeys(texts))
        with_prefix = [t for t in distinct if special is None and t.startswith(self._prefix_text)]
        others = [t for t in distinct if special is not None or not t.startswith(self._prefix_text)]
        ids: dict[str, list[int]] = {}
        for group, of_group in ((with_prefix, False), (others, special)):
            ids.update(zip(group, encode_texts(self.tokenizer, group, special=of_group), strict=True))
        return ids

    def plan(self, requests: Sequence[tuple[str, str]]) -> ScoringPlan:
        """Plan (context, continuation) pairs.

        Blanks that end a context belong to its continuation; an empty context is one prefix token.
        """
        with uncollected():
            return self.plan_tokens(self._encode_pairs(requests))

    def _encode_pairs(self, requests: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Return the token ids of contexts and continuations: of each pair those of the whole, cut after the context's
        own; by parts where that comes to the same.
        """
        cuts = [self._cut(*request) for request in requests]
        whole = self.encode(
            text
            for first, rest, is_apart in cuts
            if first is not None
            for text in ((first,) if is_apart else (first, first + rest))
        )
        alone = self.encode((rest for _, rest, is_apart in cuts if is_apart), special=False)
        pairs = []
        for first, rest, is_apart in cuts:
            if first is None:
                begins = alone[rest][:1] == [self.prefix_token]
                pairs.append(([self.prefix_token], alone[rest][1:] if begins else alone[rest]))
            elif is_apart:
                pairs.append((whole[first], alone[rest]))
            else:
                pairs.append((whole[first], whole[first + rest][len(whole[first]) :]))
        return pairs

    def _cut(self, context: str, continuation: str) -> tuple[str | None, str, bool]:
        """Return a request's context, None where it is empty; its continuation, with the context's last blanks; and
        whether their tokens are those that each has alone.
        """
        if not context:
            return None, continuation, True
        first = context.rstrip()
        rest = context[len(first) :] + continuation
        is_apart = self._joint is not None and self._joint.lies_between(first, rest)
        return first, rest, is_apart and not (first + rest).startswith(self._prefix_text)

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
