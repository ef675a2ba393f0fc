"""Whether a model may score requests that share their beginnings: tried on it, with a sample of the requests.

A model that ignores the mask or the positions that it is given (recurrent layers, masks of its own, sliding windows)
would give other numbers, and nothing would say so.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import torch

from kbit.evaluation.forests import Tree, size_of
from kbit.evaluation.positions import is_masked_anyway
from kbit.memory import is_out_of_memory

if TYPE_CHECKING:
    from kbit.evaluation.requests import ScoringPlan
    from kbit.evaluation.scoring import TokenScorer

NOTHING: Final = "nothing to share"
SHARED: Final = "shared"
WHOLE_SEQUENCES: Final = "not shared: outlier dimensions are found in whole sequences"
LEAST_SAVED: Final = 0.1
"""The share of a task's tokens that sharing has to save: masks cost attention about as much."""
SAMPLE: Final = 32
"""Inputs that are scored both ways."""
FLOAT_NOISE: Final = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}
"""Nats, root mean square over requests, that no model is refused for; wrong masks and positions change them by nats."""
TIMES_NOISE: Final = 3.0
"""How many times the measured noise is taken for noise."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a trial found.

    Attributes:
        says: ``SHARED``, or why the model's requests are scored apart.
        depth: tokens of the longest input that was tried: with longer ones it is tried again.
    """

    says: str
    depth: int


_VERDICTS: Final[WeakKeyDictionary[Any, Verdict]] = WeakKeyDictionary()
"""By model: quantizing its weights changes nothing in how it is computed."""


def forgo_sharing(model: Any, why: str) -> None:
    """Have all requests to a model scored apart, where it can't be tried.

    Args:
        model: the model.
        why: what ``sharing`` returns of it.
    """
    _VERDICTS[model] = Verdict(says=why, depth=sys.maxsize)


def sharing(scorer: TokenScorer, plan: ScoringPlan, *, batch_tokens: int) -> str:
    """Return ``SHARED`` where a plan is to be scored with shared beginnings on a model, else why not."""
    if not plan.inputs:
        return NOTHING
    if scorer.of_sequences:
        return WHOLE_SEQUENCES
    saved = 1 - plan.count_tokens(share=True) / plan.count_tokens(share=False)
    if saved < LEAST_SAVED and not is_masked_anyway(scorer.base):
        return NOTHING
    depth = max(map(len, plan.inputs))
    known = _VERDICTS.get(scorer.model)
    if known is None or known.depth < depth:
        known = _try(scorer, plan, batch_tokens)
        if known is None:
            return "not shared: the model's numbers are not finite"
        _VERDICTS[scorer.model] = known
    return known.says


def _try(scorer: TokenScorer, plan: ScoringPlan, batch_tokens: int) -> Verdict | None:
    """Score a sample singly, in padded batches and shared; None where the model can't tell."""
    rows = _sample(plan)
    members = sorted({member for row in rows for tree in row for member in tree.members})
    requests = [request for member in members for request, _ in plan.owners[member]]
    depth = max(len(plan.inputs[member]) for member in members)

    def nats(which: Sequence[list[Tree]], tokens: int, share: bool) -> np.ndarray[Any, np.dtype[np.float64]]:
        scored = plan.run_rows(scorer, which, batch_tokens=tokens, share=share)
        return np.array([scored[request][0] for request in requests])

    apart = [plan.apart[member] for member in members]
    alone = nats(apart, 1, share=False)
    if not np.isfinite(alone).all():
        return None
    noise = _rms(nats(apart, batch_tokens, share=False) - alone)
    try:
        change = _rms(nats(rows, batch_tokens, share=True) - alone)
    except Exception as error:  # a model that takes no such mask or positions refuses in its own way
        if is_out_of_memory(error):
            raise
        what = " ".join(str(error).split())[:200]
        return Verdict(says=f"not shared: {type(error).__name__}: {what}", depth=depth)
    allowed = FLOAT_NOISE.get(scorer.model.dtype, 0.0) + TIMES_NOISE * noise
    if change <= allowed:
        return Verdict(says=SHARED, depth=depth)
    return Verdict(says=f"not shared: off by {change:.2g} nats rms, of which {noise:.2g} are float noise", depth=depth)


def _sample(plan: ScoringPlan) -> list[list[Tree]]:
    """Return rows with about ``SAMPLE`` inputs: that of the longest input, and those where most of them meet."""
    longest = max(len(ids) for ids in plan.inputs)
    first = next(row for row in plan.shared if any(max(tree.positions) + 1 == longest for tree in row))
    rows, count = [first], sum(len(tree.members) for tree in first)
    for row in sorted(plan.shared, key=lambda trees: -max(len(tree.members) for tree in trees)):
        if count >= SAMPLE:
            break
        if row is not first:
            rows.append(row)
            count += sum(len(tree.members) for tree in row)
    return sorted(rows, key=lambda row: -size_of(row))


def _rms(changes: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Return the root mean square; NaN and inf count as infinitely far."""
    value = math.sqrt(float(np.mean(changes**2)))
    return value if math.isfinite(value) else math.inf
