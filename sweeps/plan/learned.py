"""Seconds that stored measurements took, by what is like them; what each process does first apart from the rest.

A process's first evaluation of a kind takes longer: requests are encoded, kernels compiled, sharing beginnings tried.
A baseline's pack has nothing but firsts, so without this a model's next pack was predicted several times too long.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log
from statistics import fmean, median
from typing import Final

LATEST: Final = 7
"""Stored values of a kind that count: a machine's load and a job's node change."""
LATEST_ALIKE: Final = 49
"""The same of what is alike in a wider sense: what ran last must not stand for all."""
SPREAD: Final = 4.0
"""How far values of a single pack may lie from what is alike in a wider sense, as a factor, where they are not settled.

What a process does for the first time takes longer, a hundred times where kernels are compiled. One pack alone can't
tell this from what its quantizations take, unless many of them took much the same.
"""
FIRST_SPREAD: Final = 20.0
"""The same within what was the first of its kind: some of it is done for each, and the next first ones do it too."""
MANY: Final = 5
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
        keys: the likenesses, of this model.
    """

    model: str
    params: int
    like: Sequence[Like]
    counted: float
    keys: Sequence[Like] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", [(self.model, *like) for like in self.like])


@dataclass(frozen=True, kw_only=True)
class _Middle:
    """Of stored values the median of their seconds, their usual factor, and whether at least half are much the same."""

    seconds: float
    factor: float
    is_even: bool


@dataclass(kw_only=True, slots=True)
class _Values:
    """Stored values of a model and a likeness.

    Attributes:
        latest: so many count.
        params: of the model.
        seconds: of each.
        factors: the same over the count.
        packs: those that the values come from, as far as they count.
    """

    latest: int
    params: int = 0
    # Lists of a few: there are as many as cells, and a deque takes ten times the memory.
    seconds: list[float] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    packs: list[object] = field(default_factory=list)
    _middle: _Middle | None = None

    def add(self, seconds: float, factor: float) -> None:
        if len(self.seconds) == self.latest:
            del self.seconds[0], self.factors[0]
        self.seconds.append(seconds)
        self.factors.append(factor)
        self._middle = None

    def middle(self, spread: float) -> _Middle:
        if self._middle is None:
            factors = sorted(self.factors)
            low, high = factors[len(factors) // 4], factors[-1 - len(factors) // 4]
            self._middle = _Middle(
                seconds=median(self.seconds),
                factor=_usual(factors, spread),
                is_even=len(factors) >= MANY and high <= SPREAD * low,
            )
        return self._middle


@dataclass(kw_only=True)
class Learned:
    """Stored values, by what is like them: seconds, and factors on what was counted.

    Attributes:
        settled: so many packs make a value stand by itself; of fewer it is held within ``SPREAD`` of what is alike in
            a wider sense.
        spread: how far above their lower quartile values count, as a factor, where the next one is predicted.
        values: by model and what the part is of.
        params: of the models that have any.
    """

    settled: int = 1
    spread: float = SPREAD
    values: dict[Like, _Values] = field(default_factory=dict)
    params: dict[Like, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, of: ValueOf, seconds: float, pack: object, *, exact: bool) -> None:
        """Take in what something took, and in which pack; of the closest likeness it tells if ``exact``."""
        factor = seconds / of.counted
        for number, key in enumerate(of.keys):
            if not number and not exact:
                continue
            values = self.values.get(key)
            if values is None:
                values = self.values[key] = _Values(latest=LATEST_ALIKE if number else LATEST)
            if values.params != of.params:
                values.params = self.params[of.like[number]][of.model] = of.params
            values.add(seconds, factor)
            if len(values.packs) < self.settled and pack not in values.packs:
                values.packs.append(pack)

    def own(self, of: ValueOf) -> float | None:
        """Return seconds by the model's own values: of the closest likeness what they took, else a factor."""
        return self._by(of.keys, of, exact=True)

    def of_others(self, of: ValueOf) -> float | None:
        """Return seconds by the factor of the model nearest in size."""

        def near(like: Like) -> str:
            others = self.params.get(like) or {"": 1}
            return min(others, key=lambda name: abs(log(max(1, others[name]) / max(1, of.params))))

        return self._by([(near(like), *like) for like in of.like], of, exact=False)

    def _by(self, chosen: Sequence[Like], of: ValueOf, *, exact: bool) -> float | None:
        """Return seconds by what is stored of models and likenesses, from the closest to the widest."""
        found, is_widest = None, True
        for number, key in reversed(list(enumerate(chosen))):
            values = self.values.get(key)
            if values is None:
                continue
            known, is_widest = values.middle(self.spread), number == len(chosen) - 1
            took = known.seconds if exact and not number else of.counted * known.factor
            # What a model's own cells took all alike it takes; another one may have compiled for all of them.
            stands = len(values.packs) >= self.settled or (exact and known.is_even)
            found = took if found is None or stands else _within(took, found)
        if found is not None and is_widest and self.settled > 1:
            # Nothing of the same method is known: what others take over their count tells little of it.
            return _within(found, of.counted)
        return found

    def factor(self, model: str, like: Like) -> float:
        """Return what a model's values were over the count."""
        return self.values[model, *like].middle(self.spread).factor


@dataclass(kw_only=True)
class Part:
    """One part of the cost.

    Attributes:
        settled: as of ``Learned``.
        first: values of what was the first of its kind in its process.
        later: all others.
    """

    settled: int = 1
    first: Learned = field(init=False)
    later: Learned = field(init=False)

    def __post_init__(self) -> None:
        self.first = Learned(settled=self.settled, spread=FIRST_SPREAD)
        self.later = Learned(settled=self.settled)

    def add(self, of: ValueOf, seconds: float, *, pack: object = None, first: bool = False, exact: bool = True) -> None:
        """Take in what something took.

        Args:
            of: what it is.
            seconds: it took.
            pack: it was done in.
            first: it was the first of its kind in its process.
            exact: it tells of the closest likeness too.
        """
        (self.first if first else self.later).add(of, seconds, pack, exact=exact)

    def predict(self, of: ValueOf, *, first: bool = False) -> float:
        """Return seconds: by own values, of the same turn or the other one; by other models'; as counted.

        A value of the other turn is corrected by what both turns took of models that have them.
        """
        same, other = (self.first, self.later) if first else (self.later, self.first)
        if (known := same.own(of)) is not None:
            return known
        if (known := other.own(of)) is not None:
            return self._turned(known, of, first=first)
        if (known := same.of_others(of)) is not None:
            return known
        if (known := other.of_others(of)) is not None:
            return self._turned(known, of, first=first)
        return of.counted

    def _turned(self, took: float, of: ValueOf, *, first: bool) -> float:
        """Return what the other turn tells, corrected. Where nothing tells by how much, a first one tells little."""
        same, other = (self.first, self.later) if first else (self.later, self.first)
        turns = _turns(same, other, of.like)
        if turns is not None:
            return took * turns
        return took if first else min(took, of.counted * SPREAD)

    def telling(self, model: str, like: Sequence[Like], *, first: bool = False) -> Sequence[Like]:
        """Return the likenesses that tell what something takes: its own where it is no first, or else others' too."""
        own = [] if first else [of for of in like if (model, *of) in self.later.values]
        return own or [of for of in like if self.knows(model, of) or of in self.first.params or of in self.later.params]

    def knows(self, model: str, like: Like) -> bool:
        """Tell whether a value of the model's own is stored."""
        return (model, *like) in self.first.values or (model, *like) in self.later.values


def _within(took: float, wider: float) -> float:
    """Return so much of what something took as what is alike in a wider sense makes likely."""
    return min(max(took, wider / SPREAD), wider * SPREAD)


def _usual(values: Sequence[float], spread: float) -> float:
    """Return the mean of sorted values that are at most ``spread`` times their lower quartile.

    A mean, since many of them add up to it as to no median; the quartile, since half may have compiled something.
    """
    low = values[len(values) // 4]
    return fmean(value for value in values if value <= low * spread)


def _turns(same: Learned, other: Learned, likenesses: Sequence[Like]) -> float | None:
    """Return what one turn takes over the other: a median over models that have both; None where none has."""
    for like in likenesses:
        both = same.params.get(like, {}).keys() & other.params.get(like, {}).keys()
        if both:
            return median(same.factor(model, like) / other.factor(model, like) for model in both)
    return None
