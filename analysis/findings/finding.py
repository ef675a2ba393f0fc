"""A finding: one of the paper's claims held against the data, with its evidence and its verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Final

from analysis.significance import LEVEL, benjamini_hochberg, holm

_WRONG_AT_MOST: Final = 1 - LEVEL
_NOT_TESTED: Final = float("nan")


class Verdict(StrEnum):
    HOLDS = "holds"
    FAILS = "fails"
    UNKNOWN = "can't tell"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the data say about a claim.

    Attributes:
        claim: its name in ``analysis.findings.claims.CLAIMS``.
        statement: the paper's claim, in a sentence that can be true or false.
        source: its section or figure of the paper.
        scope: what it was tested on, such as 'OPT, float, block size 64'.
        metric: column of the metric.
        verdict: at the level of 95 %, by ``p_adjusted``.
        effect: in ``unit``; NaN where nothing could be measured. Of several comparisons, the one that decides.
        low, high: its 95 % interval (not adjusted for other claims).
        unit: what ``effect`` is in, e.g. 'nats/token better'.
        models: how many models it rests on: the unit of replication.
        p_holds: p-value against the claim's being false: small where it holds.
        p_fails: p-value against its being true: small where it fails.
        p_adjusted: the smaller of the two, adjusted for the other findings (``settled``).
        headline: whether it is the claim's main finding, of the first metric and all models.
        evidence: one sentence with the numbers.
        needs: what to run, and how many documents it would take, where the verdict is "can't tell".
    """

    claim: str
    statement: str
    source: str
    scope: str
    metric: str
    verdict: Verdict = Verdict.UNKNOWN
    effect: float = _NOT_TESTED
    low: float = _NOT_TESTED
    high: float = _NOT_TESTED
    unit: str = ""
    models: int = 0
    p_holds: float = _NOT_TESTED
    p_fails: float = _NOT_TESTED
    p_adjusted: float = _NOT_TESTED
    headline: bool = False
    evidence: str = ""
    needs: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values: what is not a number is None, and infinities are texts."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def settled(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings with their verdicts.

    The headline findings are adjusted by Holm: with 95 % confidence none of their verdicts is wrong. The others are
    adjusted by Benjamini and Hochberg: of their verdicts about 5 % may be. A finding counts once, by the smaller of its
    two p-values, as at most one of "it holds" and "it fails" can be wrong. Where both are small (better, but by less
    than the margin) it holds.
    """
    decided = list(findings)
    for headline, adjust in ((True, holm), (False, benjamini_hochberg)):
        own = [i for i, f in enumerate(findings) if f.headline is headline]
        smaller = [_smaller(findings[i]) for i in own]
        for i, p, adjusted in zip(own, smaller, adjust(smaller), strict=True):
            factor = float(adjusted) / p if p > 0 else float(len(own))
            decided[i] = _decided(findings[i], float(adjusted), factor)
    return decided


def _decided(finding: Finding, adjusted: float, factor: float) -> Finding:
    verdict = Verdict.UNKNOWN
    if finding.p_holds * factor < _WRONG_AT_MOST:
        verdict = Verdict.HOLDS
    elif finding.p_fails * factor < _WRONG_AT_MOST:
        verdict = Verdict.FAILS
    needs = finding.needs if verdict is Verdict.UNKNOWN else ""
    return replace(finding, verdict=verdict, p_adjusted=adjusted, needs=needs)


def _smaller(finding: Finding) -> float:
    known = [p for p in (finding.p_holds, finding.p_fails) if not math.isnan(p)]
    return min(known) if known else _NOT_TESTED


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return str(value) if isinstance(value, Verdict) else value
