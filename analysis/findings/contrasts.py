"""Contrasts: how much better one kind of cells is than another, model by model, at equal bits of the whole model.

A method that stores more is compared with what those bits would have bought otherwise: with the other kind's curve over
total bits, linear in their logarithm between the family's models (the paper's figures, section 4). The curve is carried
over an end by at most half a doubling, along its last piece.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from analysis.findings.evidence import Cell, Evidence, Spec
from analysis.findings.on_samples import Weights, documents, on_samples
from analysis.metrics import Metric
from analysis.significance import Effect, of_samples, over_models, student

REACH: Final = 0.5
"""Doublings of the bits by which a curve is carried over its ends."""
_ALIKE: Final = 1e-4
"""Doublings that are none: a mean a tensor adds no bits to speak of."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """How much better the first kind of cells is than the second.

    Attributes:
        effect: over models, in the metric's unit; positive is better.
        families: of the models that it rests on.
        alone: models that could not be compared at equal bits, as no other of their family was measured.
        own: of those, where there are no others, the effect at each cell's own bits.
        gone: models of which both kinds diverged.
        document_error: standard error of one model's improvement over its documents (root mean square over models);
            NaN where unknown.
        documents: windows or documents that it is over.
        tokens: scored tokens of a window on average; 0 of tasks, and where unknown.
        paired: whether that error is of the same samples; else of two separate errors, and too large.
    """

    effect: Effect
    families: tuple[str, ...] = ()
    alone: int = 0
    own: Effect | None = None
    gone: int = 0
    document_error: float = float("nan")
    documents: int = 0
    tokens: float = 0.0
    paired: bool = False


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Improvements of the first kind of cells over the second, by model.

    Attributes:
        units: the models.
        families, x, d: of each, its family, log2 of its total bits where it is compared, and its improvement: NaN
            where both diverged, infinite where one did.
        combinations: each as second minus first, a linear combination of cells.
        alone: models that could not be compared at equal bits, as no other of their family was measured.
    """

    units: tuple[str, ...]
    families: tuple[str, ...]
    x: NDArray[np.float64]
    d: NDArray[np.float64]
    combinations: tuple[Weights, ...]
    alone: int
    cells: Mapping[str, Cell]

    @property
    def correlation(self) -> NDArray[np.float64]:
        """Of the improvements [n, n], where cells' own errors are independent and equal."""
        keys = {key: i for i, key in enumerate(dict.fromkeys(k for c in self.combinations for k in c))}
        w = np.zeros((len(self.combinations), len(keys)))
        for i, combination in enumerate(self.combinations):
            for key, weight in combination.items():
                w[i, keys[key]] = weight
        covariance = w @ w.T
        scale = np.sqrt(np.diag(covariance))
        return np.asarray(covariance / np.outer(scale, scale)) if (scale > 0).all() else np.eye(len(scale))


def contrast(
    evidence: Evidence,
    metric: Metric,
    firsts: Iterable[Cell],
    seconds: Iterable[Cell],
    *,
    ignoring: Collection[str],
    at_equal_bits: bool = True,
) -> Contrast:
    """Compare two kinds of cells: ``differences``, and their mean over models.

    Args:
        evidence: the study.
        metric: what is compared.
        firsts: one kind.
        seconds: the other.
        ignoring: axes by which they differ; in all others a pair is equal.
        at_equal_bits: compare at equal bits of the whole model; else a model's cells as they are.
    """
    firsts, seconds = list(firsts), list(seconds)
    found = differences(metric, firsts, seconds, ignoring=ignoring, at_equal_bits=at_equal_bits)
    compared = over(evidence, metric, found)
    if found.alone and not len(found.units):
        as_they_are = differences(metric, firsts, seconds, ignoring=ignoring, at_equal_bits=False)
        compared = replace(compared, own=over(evidence, metric, as_they_are).effect)
    return compared


def differences(
    metric: Metric,
    firsts: Iterable[Cell],
    seconds: Iterable[Cell],
    *,
    ignoring: Collection[str],
    at_equal_bits: bool = True,
) -> Differences:
    """Compare two kinds of cells that are alike but for some axes ('bits' and 'method' among them), model by model.

    At equal bits it goes both ways: the first kind's models beside the second's curve, and the second's beside the
    first's. A straight piece lies above a curve that bends, and the two ways err by as much in opposite directions.
    """
    kinds = [_grouped(kind, ignoring) for kind in (firsts, seconds)]
    curves: list[dict[tuple[str, tuple[int, Spec]], list[list[Cell]]]] = [defaultdict(list), defaultdict(list)]
    for kind, curve in zip(kinds, curves, strict=True):
        for (family, _, stratum), group in kind.items():
            curve[family, stratum].append(group)
    combinations: dict[str, list[Weights]] = defaultdict(list)
    where: dict[str, tuple[str, list[float]]] = {}
    alone = set()
    for way in (0, 1) if at_equal_bits else (0,):
        for (family, model, stratum), own in kinds[way].items():
            same = kinds[1 - way].get((family, model, stratum))
            if at_equal_bits:
                other = _at(own, same, curves[1 - way].get((family, stratum), []))
            else:
                other = _mean(same) if same else None
            if other is None:
                alone |= {own[0].unit} if same else set()
                continue
            second, first = (other, _mean(own)) if way == 0 else (_mean(own), other)
            combinations[own[0].unit].append(_sum(second, {key: -w for key, w in first.items()}))
            where.setdefault(own[0].unit, (family, []))[1].append(_log_bits(own))
    cells = {c.key: c for kind in kinds for group in kind.values() for c in group}
    return Differences(
        units=tuple(combinations),
        families=tuple(where[unit][0] for unit in combinations),
        x=np.asarray([np.mean(where[unit][1]) for unit in combinations], dtype=np.float64),
        d=np.asarray([metric.sign * _value(parts, cells) for parts in combinations.values()], dtype=np.float64),
        combinations=tuple(_average(parts) for parts in combinations.values()),
        alone=len(alone - set(combinations)),
        cells=cells,
    )


def over(evidence: Evidence, metric: Metric, found: Differences) -> Contrast:
    """Return the mean over models; of a single one, over its samples where they are known."""
    known = ~np.isnan(found.d)
    combinations = [c for c, k in zip(found.combinations, known, strict=True) if k]
    return Contrast(
        **documents(evidence, metric, combinations, found.cells),
        effect=_one_or_more(evidence, metric, found, combinations),
        families=tuple(dict.fromkeys(found.families)),
        alone=found.alone,
        gone=int((~known).sum()),
    )


def slope(found: Differences) -> Effect:
    """Return by how much the improvement grows for each doubling of the bits, with an intercept for each family.

    Least squares; its error as in ``over_models``, by the residuals and the differences' correlation. Families of one
    model say nothing.
    """
    usable = np.isfinite(found.d) & np.isfinite(found.x)
    for family in set(found.families):
        own = np.asarray([f == family for f in found.families])
        if (own & usable).sum() < 2:
            usable &= ~own
    names = sorted({f for f, k in zip(found.families, usable, strict=True) if k})
    x, d = found.x[usable], found.d[usable]
    design = np.stack([x, *(np.asarray(found.families)[usable] == name for name in names)], axis=1).astype(np.float64)
    dof = len(d) - len(names) - 1
    if dof < 1 or np.linalg.matrix_rank(design) < design.shape[1]:
        return over_models([])
    r = found.correlation[np.ix_(usable, usable)]
    solve = np.linalg.pinv(design)
    residual = np.eye(len(d)) - design @ solve
    variance = float(((residual @ d) ** 2).sum() / np.trace(residual @ r @ residual.T))
    value, error = float(solve[0] @ d), float(np.sqrt(variance * solve[0] @ r @ solve[0]))
    return student(value, error, dof, n=len(d), size=float(np.abs(d).max()))


def _one_or_more(evidence: Evidence, metric: Metric, found: Differences, combinations: Sequence[Weights]) -> Effect:
    if len(combinations) == 1:
        of_one = on_samples(evidence, metric, combinations[0])
        if of_one is not None and np.isfinite(of_one.stderr):
            return of_samples(of_one, sign=metric.sign)
    return over_models(found.d, found.correlation)


def _grouped(cells: Iterable[Cell], ignoring: Collection[str]) -> dict[tuple[str, str, tuple[int, Spec]], list[Cell]]:
    """Cells by (family, model, what they have in common); replicates are together."""
    found: dict[tuple[str, str, tuple[int, Spec]], list[Cell]] = defaultdict(list)
    for c in cells:
        bits = 0 if "bits" in ignoring else c.bits
        found[c.family, c.model, (bits, c.without(ignoring))].append(c)
    return found


def _at(own: Sequence[Cell], same: Sequence[Cell] | None, curve: Sequence[Sequence[Cell]]) -> Weights | None:
    """Weights of a curve's cells at the bits of some cells; None where it doesn't reach them."""
    at = _log_bits(own)
    if math.isnan(at):
        return None
    if same and abs(at - _log_bits(same)) < _ALIKE:
        return _mean(same)
    # Of two models of one size nothing can be interpolated: they are one point.
    sizes: dict[float, list[Cell]] = defaultdict(list)
    for cells in curve:
        if not math.isnan(bits := _log_bits(cells)):
            sizes[round(bits, 9)] += cells
    x = sorted(sizes)
    if not x or (len(x) == 1 and abs(x[0] - at) > _ALIKE) or not x[0] - REACH <= at <= x[-1] + REACH:
        return None
    if len(x) == 1:
        return _mean(sizes[x[0]])
    i = min(max(bisect_left(x, at), 1), len(x) - 1)
    share = (at - x[i - 1]) / (x[i] - x[i - 1])
    left, right = sizes[x[i - 1]], sizes[x[i]]
    beyond = not 0 <= share <= 1
    if beyond and not all(math.isfinite(c.value) for c in (*left, *right)):
        return None
    return _sum({k: w * (1 - share) for k, w in _mean(left).items()}, {k: w * share for k, w in _mean(right).items()})


def _log_bits(cells: Sequence[Cell]) -> float:
    return math.log2(sum(c.total_bits for c in cells) / len(cells))


def _mean(cells: Sequence[Cell]) -> Weights:
    return {c.key: 1 / len(cells) for c in cells}


def _sum(*parts: Weights) -> Weights:
    total: Weights = defaultdict(float)
    for part in parts:
        for key, weight in part.items():
            total[key] += weight
    return {key: weight for key, weight in total.items() if weight}


def _average(parts: Sequence[Weights]) -> Weights:
    return _sum(*({key: weight / len(parts) for key, weight in part.items()} for part in parts))


def _value(parts: Sequence[Weights], cells: Mapping[str, Cell]) -> float:
    """Mean over a model's strata of second minus first, infinite where only one diverged; NaN where both did in all."""
    found = []
    for part in parts:
        ends = {math.copysign(1.0, w) for key, w in part.items() if math.isinf(cells[key].value)}
        if len(ends) == 2:
            continue  # both diverged
        if ends:
            # Less is better where the worst value is +inf, and the other way round.
            worst = next(cells[key].value for key in part if math.isinf(cells[key].value))
            found.append(float(worst * ends.pop()))
        else:
            found.append(sum(w * cells[key].value for key, w in part.items()))
    if not found:
        return float("nan")
    infinite = {x for x in found if math.isinf(x)}
    if len(infinite) == 2:
        return float("nan")
    return infinite.pop() if infinite else sum(found) / len(found)
