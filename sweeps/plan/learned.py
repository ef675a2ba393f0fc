"""Seconds that stored measurements took, by what is like them; what each pack does first apart from the rest.

The first of a kind in a pack takes longer: kernels are compiled, sharing beginnings is tried, originals are kept.
A baseline's pack has nothing but firsts, so without this a model's next pack was predicted several times too long.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log
from statistics import median
from typing import Final

LATEST: Final = 7
"""Stored values of a kind that count: a machine's load and a job's node change."""
Like = tuple[object, ...]
"""What makes two measurements, or two quantizations, alike."""


@dataclass(frozen=True, kw_only=True)
class ValueOf:
    """What a part of the cost is of.

    Attributes:
        model: the model's label.
        params: its parameters.
        like: from the closest likeness to the widest.
        counted: seconds that were counted for it.
    """

    model: str
    params: int
    like: Sequence[Like]
    counted: float


@dataclass(kw_only=True)
class Learned:
    """Stored values, by what is like them: seconds, and factors on what was counted.

    Attributes:
        seconds: by model and what the part is of.
        factors: the same over the count, by model and by the part's kind.
        params: of the models that have any.
    """

    seconds: dict[Like, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=LATEST)))
    factors: dict[Like, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=LATEST)))
    params: dict[Like, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, of: ValueOf, seconds: float) -> None:
        """Take in what something took."""
        for like in of.like:
            self.seconds[(of.model, *like)].append(seconds)
            self.factors[(of.model, *like)].append(seconds / of.counted)
            self.params[like][of.model] = of.params

    def own(self, of: ValueOf, *, exact: int) -> float | None:
        """Return seconds by the model's own values: of the first ``exact`` likenesses what they took, else a factor."""
        for number, like in enumerate(of.like):
            if number < exact and (known := self.seconds.get((of.model, *like))):
                return median(known)
            if known := self.factors.get((of.model, *like)):
                return of.counted * median(known)
        return None

    def of_others(self, of: ValueOf) -> float | None:
        """Return seconds by the factor of the model nearest in size."""
        for like in of.like:
            if others := self.params.get(like):
                near = min(others, key=lambda name: abs(log(max(1, others[name]) / max(1, of.params))))
                return of.counted * self.factor(near, like)
        return None

    def factor(self, model: str, like: Like) -> float:
        """Return what a model's values were over the count."""
        return median(self.factors[(model, *like)])


@dataclass(kw_only=True)
class Part:
    """One part of the cost.

    Attributes:
        first: values of what was the first of its kind in its pack.
        later: all others.
    """

    first: Learned = field(default_factory=Learned)
    later: Learned = field(default_factory=Learned)

    def add(self, of: ValueOf, seconds: float, *, first: bool = False) -> None:
        """Take in what something took, and whether it was the first of its kind in its pack."""
        (self.first if first else self.later).add(of, seconds)

    def predict(self, of: ValueOf, *, exact: int, first: bool = False) -> float:
        """Return seconds: by own values, of the same turn or the other one; by other models'; as counted.

        A value of the other turn is corrected by what both turns took of models that have them.
        """
        same, other = (self.first, self.later) if first else (self.later, self.first)
        if (known := same.own(of, exact=exact)) is not None:
            return known
        if (known := other.own(of, exact=exact)) is not None:
            return known * _turns(same, other, of.like)
        if (known := same.of_others(of)) is not None:
            return known
        if (known := other.of_others(of)) is not None:
            return known * _turns(same, other, of.like)
        return of.counted

    def knows(self, model: str, like: Like) -> bool:
        """Tell whether a value of the model's own is stored."""
        return (model, *like) in self.first.seconds or (model, *like) in self.later.seconds


def _turns(same: Learned, other: Learned, likenesses: Sequence[Like]) -> float:
    """Return what one turn takes over the other: a median over models that have both; 1 where none has."""
    for like in likenesses:
        both = same.params.get(like, {}).keys() & other.params.get(like, {}).keys()
        if both:
            return median(same.factor(model, like) / other.factor(model, like) for model in both)
    return 1.0
