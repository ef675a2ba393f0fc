"""From contrasts to a finding: p-values for and against a claim of one or several parts, in words and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from analysis.findings.contrasts import Contrast
from analysis.findings.finding import Finding
from analysis.metrics import Metric
from analysis.significance import LEVEL, Effect, models_needed, samples_needed, smallest_detectable, tost

Kind = Literal["better", "not better", "not worse", "alike"]
HEADLINES: Final = 16
"""Claims whose main findings are adjusted for each other: what it would take to decide one allows for that."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper.

    Attributes:
        name: in ``CLAIMS``.
        statement: in a sentence.
        source: section or figure.
        run: the study that would measure it.
    """

    name: str
    statement: str
    source: str
    run: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """One comparison of a claim.

    Attributes:
        name: what is compared, e.g. '3 bits: 64 against 1024'.
        found: the contrast; its effect is an improvement.
        kind: 'better': more than 0, else it fails where it is less than the margin. 'not better': less than the margin.
            'not worse': above minus the margin. 'alike': within the margins.
        margin: in the metric's unit.
    """

    name: str
    found: Contrast
    kind: Kind
    margin: float

    @property
    def effect(self) -> Effect:
        return self.found.effect

    @property
    def p_holds(self) -> float:
        of = self.effect
        return {
            "better": lambda: of.p_above(0),
            "not better": lambda: of.p_below(self.margin),
            "not worse": lambda: of.p_above(-self.margin),
            "alike": lambda: tost(of, self.margin),
        }[self.kind]()

    @property
    def p_fails(self) -> float:
        of = self.effect
        return {
            "better": lambda: of.p_below(self.margin),
            "not better": lambda: of.p_above(self.margin),
            "not worse": lambda: of.p_below(-self.margin),
            "alike": lambda: min(1.0, 2 * min(of.p_above(self.margin), of.p_below(-self.margin))),
        }[self.kind]()

    @property
    def gap(self) -> float:
        """Distance to the nearest bound that would decide."""
        value = self.effect.value
        if self.kind == "better":
            return max(abs(value), abs(value - self.margin))
        if self.kind == "alike":
            return abs(abs(value) - self.margin)
        return abs(value - (self.margin if self.kind == "not better" else -self.margin))


def finding(metric: Metric, claim: Claim, parts: Sequence[Part], *, scope: str, headline: bool) -> Finding:
    """Make the finding of a claim whose every part has to hold: not yet adjusted for the others.

    It holds as surely as its least sure part (an intersection-union test: Berger, 1982), and fails as surely as the
    surest failure among them, adjusted for their number (Bonferroni). Effect and interval are of the part that decides.
    """
    tested = [p for p in parts if p.effect.tested]
    if not tested:
        return _nothing(metric, claim, parts, scope, headline)
    p_holds = max(p.p_holds for p in tested)
    p_fails = min(1.0, len(tested) * min(p.p_fails for p in tested))
    least = max(tested, key=lambda p: (p.p_holds, -p.p_fails))
    worst = min(tested, key=lambda p: (p.p_fails, -p.p_holds))
    decides = worst if p_fails < p_holds and p_fails < 1 else least
    factor, unit = scale(metric)
    effect = decides.effect
    return Finding(
        claim=claim.name,
        statement=claim.statement,
        source=claim.source,
        scope=scope,
        metric=metric.column,
        effect=factor * effect.value,
        low=factor * effect.low,
        high=factor * effect.high,
        unit=f"{unit} better" if decides.kind != "alike" else unit,
        models=max(1 if p.effect.basis == "samples" else p.effect.n for p in tested),
        p_holds=p_holds,
        p_fails=p_fails,
        headline=headline,
        evidence=_evidence(parts, metric),
        needs=needs(decides, metric, claim, hypotheses=len(tested) * (HEADLINES if headline else 1)),
    )


def scale(metric: Metric) -> tuple[float, str]:
    """Return by what an improvement is multiplied for people, and its unit: points of accuracies."""
    return (100.0, "points") if metric.higher_is_better else (1.0, metric.unit or "")


def amount(value: float, metric: Metric) -> str:
    """'+0.0123', '+1.25' points; 'without limit' where a cell diverged."""
    factor, _ = scale(metric)
    if not math.isfinite(value):
        return "unknown" if math.isnan(value) else "+∞" if value > 0 else "-∞"
    return f"{factor * value:+.{2 if factor > 1 else 4}f}"


def interval(effect: Effect, metric: Metric) -> str:
    """'+0.0123 (+0.0100 to +0.0146)'."""
    if math.isnan(effect.low):
        return amount(effect.value, metric)
    return f"{amount(effect.value, metric)} ({amount(effect.low, metric)} to {amount(effect.high, metric)})"


def needs(part: Part, metric: Metric, claim: Claim, *, hypotheses: int = 1) -> str:
    """Say what would decide a comparison: more documents, more models, or neither.

    Args:
        part: what the verdict hangs on.
        metric: what is compared.
        claim: the study to run.
        hypotheses: for how many the p-value is adjusted at worst (Bonferroni).
    """
    effect, found = part.effect, part.found
    level = 1 - (1 - LEVEL) / hypotheses
    if effect.basis == "ranks":
        return f"more models: with {effect.n}, of which some diverged, ranks can't decide; {claim.run}"
    if effect.basis == "samples":
        documents = samples_needed(effect.stderr, effect.n, part.gap, level=level)
        return f"{part.name}: {_documents(documents, found, metric, effect.n)}; other models say more: {claim.run}"
    models = models_needed(effect.stderr * math.sqrt(effect.n), part.gap, level=level)
    by_documents = _documents_instead(part, level)
    least = amount(smallest_detectable(effect.stderr, effect.dof, level=level), metric).lstrip("+")
    said = f"{part.name}: beside the other claims, {effect.n} models show a difference of {least} or more"
    if by_documents is not None:
        return f"{said}; {_documents(by_documents, found, metric, found.documents)}"
    if math.isinf(models):
        return f"{said}; what there is lies too near the bound for any number of models to tell"
    enough = max(models, effect.n + 1)
    return f"{said}; about {enough:.0f} models like these would do (more documents alone would not): {claim.run}"


def _documents_instead(part: Part, level: float) -> float | None:
    """How many documents would decide with as many models, where it is their noise that stands in the way."""
    effect, found = part.effect, part.found
    if not found.documents or not math.isfinite(found.document_error) or part.gap <= 0:
        return None
    unit = smallest_detectable(1.0, effect.dof, level=level)
    wanted = effect.n * (part.gap / unit) ** 2
    between = max(0.0, effect.n * effect.stderr**2 - found.document_error**2)
    count = math.ceil(found.documents * found.document_error**2 / (wanted - between)) if wanted > between else 0
    return count if count > found.documents else None


def _documents(count: float, found: Contrast, metric: Metric, now: int) -> str:
    if math.isinf(count):
        return "what there is lies too near the bound for any number of documents to tell"
    what = "windows" if metric.metric in ("loss", "kl") else "documents"
    tokens = f" (eval.tokens={count * (found.tokens + 1):.0f})" if found.tokens else f" (eval.limit={count:.0f})"
    return f"about {count:,.0f} {what}{tokens} would do, instead of {now:,}"


def _evidence(parts: Sequence[Part], metric: Metric) -> str:
    _, unit = scale(metric)
    said = []
    for part in parts:
        if not part.effect.n:
            if part.found.own is not None and part.found.own.n:
                said.append(f"{part.name} {interval(part.found.own, metric)} at the cells' own bits")
            continue
        of = "1 model" if part.effect.basis == "samples" or part.effect.n == 1 else f"{part.effect.n} models"
        ranks = ", median" if part.effect.basis == "ranks" else ""
        gone = f", {part.found.gone} more diverged in both" if part.found.gone else ""
        said.append(f"{part.name} {interval(part.effect, metric)}{ranks}, {of}{gone}")
    return f"Better by, in {unit or metric.metric} (95 % CI): {'; '.join(said)}." if said else ""


def _nothing(metric: Metric, claim: Claim, parts: Sequence[Part], scope: str, headline: bool) -> Finding:
    alone = max((p.found.alone for p in parts), default=0)
    if any(p.effect.n > 1 for p in parts):
        why = "the models all say the same number, which tells nothing of its error: others would"
    elif any(p.effect.n for p in parts):
        why = "a single model: others, or the samples of this one, would give it an interval"
    elif alone:
        why = f"at equal bits a family needs two sizes or more, and {alone} of the models have no other of theirs"
    else:
        why = "no pair of cells to compare"
    measured = [p for p in parts if p.effect.n]
    factor, unit = scale(metric)
    return Finding(
        claim=claim.name,
        statement=claim.statement,
        source=claim.source,
        scope=scope,
        metric=metric.column,
        effect=factor * measured[0].effect.value if measured else math.nan,
        unit=f"{unit} better",
        models=max((p.effect.n for p in parts), default=0),
        headline=headline,
        evidence=_evidence(parts, metric),
        needs=f"{why}: {claim.run}",
    )
