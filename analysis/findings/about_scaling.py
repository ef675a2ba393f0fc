"""Claims about bit-level scaling (section 5.1, Appendix C): which precision, how curves lie, what perplexity says."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from analysis.chance import chance_level
from analysis.findings.contrasts import Contrast, contrast, differences, slope
from analysis.findings.evidence import Cell, Evidence
from analysis.findings.finding import Finding
from analysis.findings.selections import EVERY_AXIS, families, main_stratum, named
from analysis.findings.testing import Claim, Part, finding, interval, scale
from analysis.metrics import ZERO_SHOT_MEAN, Metric, primary_loss
from analysis.significance import Effect, normal, over_models

UNSTABLE: Final = 1.0
"""Nats per token that a stable model doesn't lose: its perplexity is multiplied by e."""
CHANCE_MEAN: Final = 0.35
"""Of the mean of the paper's four tasks, as it says (section 5.1)."""
STRONG: Final = -0.8
"""A correlation that is at least as strong predicts."""

OPTIMAL: Final = Claim(
    name="four_bits_optimal",
    statement="At equal total model bits no other precision is better than 4 bits.",
    source="Section 5.1, Figures 2 and 7",
    run="sweep=fig2_bit_scaling on your models (model= or path=)",
)
PARALLEL: Final = Claim(
    name="curves_parallel",
    statement="Scaling curves of 4 bits and more are parallel: the lead of one over another does not depend on size.",
    source="Sections 4 and 5.1",
    run="sweep=fig2_bit_scaling on three sizes or more of a family",
)
UNSTABLE_3: Final = Claim(
    name="three_bits_unstable",
    statement="The largest OPT and Pythia models are unstable at 3 bits: close to random.",
    source="Section 5.1, observation 3",
    run="sweep=fig2_bit_scaling 'model=[opt,pythia]'",
)
PEARSON: Final = Claim(
    name="perplexity_predicts_zero_shot",
    statement="Perplexity predicts zero-shot accuracy: Pearson's correlation is strong (the paper: -0.94).",
    source="Section 4",
    run="sweep=fig2_bit_scaling on your models, with eval=paper",
)
_NAMED: Final = re.compile(r"(^|[^a-z])(opt|pythia|neox)", re.IGNORECASE)


def four_bits_optimal(evidence: Evidence) -> list[Finding]:
    found = []
    for i, metric in enumerate(evidence.metrics):
        dtype, size, own = main_stratum(evidence.cells(metric))
        every = [*own, *evidence.baselines(metric).values()]
        names = sorted({c.family for c in own if c.bits == 4})
        for family in [None, *(names if len(names) > 1 else [])]:
            parts = []
            for bits in sorted({c.bits for c in every} - {4}):
                fours = [c for c in own if c.bits == 4 and family in (None, c.family)]
                others = [c for c in every if c.bits == bits and family in (None, c.family)]
                between = contrast(evidence, metric, fours, others, ignoring=EVERY_AXIS)
                parts.append(
                    Part(name=f"than {bits} bits", found=between, kind="not worse", margin=evidence.margin(metric))
                )
            of = family or families(own)
            scope = _scope(of, dtype, size, own)
            found.append(finding(metric, OPTIMAL, parts, scope=scope, headline=i == 0 and family is None))
    return found


def curves_parallel(evidence: Evidence) -> list[Finding]:
    """Regress each precision's distance from the 4-bit curve, at equal bits, on the logarithm of the bits.

    Curves that are one function and an offset have no slope; each family has an intercept of its own.
    """
    found = []
    for i, metric in enumerate(evidence.metrics):
        dtype, size, own = main_stratum(evidence.cells(metric))
        every = [*own, *evidence.baselines(metric).values()]
        fours = [c for c in own if c.bits == 4]
        slopes = {}
        for bits in sorted({c.bits for c in every} - {4}):
            here = [c for c in every if c.bits == bits]
            slopes[bits] = slope(differences(metric, fours, here, ignoring=EVERY_AXIS))
        margin, unit = evidence.margin(metric), scale(metric)[1]
        parts = [
            Part(name=f"{bits} bits", found=Contrast(effect=effect), kind="alike", margin=margin)
            for bits, effect in slopes.items()
            if bits > 4
        ]
        said = finding(metric, PARALLEL, parts, scope=_scope(families(own), dtype, size, own), headline=i == 0)
        listed = "; ".join(f"{p.name} {interval(p.effect, metric)}, {p.effect.n} models" for p in parts if p.effect.n)
        text = f"4 bits' lead grows for each doubling of the bits by, in {unit} (95 % CI): against {listed}."
        if 3 in slopes and slopes[3].n:
            text += f" Against 3 bits, which the paper excepts: {interval(slopes[3], metric)}."
        found.append(replace(said, evidence=text if listed else "", unit=f"{unit} per doubling"))
    return found


def three_bits_unstable(evidence: Evidence) -> list[Finding]:
    found: list[Finding] = []
    for i, metric in enumerate(evidence.metrics):
        dtype, size, own = main_stratum(evidence.cells(metric))
        threes = [c for c in own if c.bits == 3 and np.isfinite(c.params)]
        largest = {c.family: c for c in sorted(threes, key=lambda c: c.params)}
        asked = [c for family, c in sorted(largest.items()) if _NAMED.search(family)]
        beyond = UNSTABLE if metric.metric == "loss" else _chance(metric)
        # Nothing is worse than no document right: a chance of 0 is no bound.
        parts = [p for c in asked if beyond and (p := _instability(c, evidence, metric, beyond)) is not None]
        scope = _scope(families(asked) if asked else "no OPT or Pythia", dtype, size, own)
        said = finding(metric, UNSTABLE_3, parts, scope=scope, headline=i == 0)
        if parts:
            bound = f"{beyond:g} nat per token" if metric.metric == "loss" else f"chance ({beyond:.0%})"
            listed = "; ".join(f"{p.name} {interval(p.effect, metric)}" for p in parts)
            text = f"Worse at 3 bits than the bound, {bound}, by (95 % CI): {listed}."
            said = replace(
                said,
                models=len(parts),
                evidence=text,
                unit=f"{scale(metric)[1]} beyond {bound}",
                needs=_more_documents(said),
            )
        found.append(said)
    return found


def perplexity_predicts_zero_shot(evidence: Evidence) -> list[Finding]:
    """Pearson's r over cells, its error by a jackknife of Fisher's z that leaves out one model at a time."""
    loss, accuracy = primary_loss(evidence.df), next((m for m in evidence.metrics if m.higher_is_better), None)
    if loss is None or accuracy is None or not len(evidence.rows):
        return [replace(_empty(PEARSON), needs=f"cells with both perplexity and accuracies: {PEARSON.run}")]
    x = {c.key: c for c in (*evidence.cells(loss), *evidence.baselines(loss).values())}
    both = [(x[c.key], c) for c in (*evidence.cells(accuracy), *evidence.baselines(accuracy).values()) if c.key in x]
    finite = [(a, b) for a, b in both if np.isfinite(a.value) and np.isfinite(b.value)]
    r, effect = _correlation(finite)
    gone = f"; {len(both) - len(finite)} diverged cells are left out" if len(both) > len(finite) else ""
    low, high = math.tanh(effect.low), math.tanh(effect.high)
    text = (
        f"r = {r:.2f} (95 % CI {low:.2f} to {high:.2f}) of {loss.phrase} (the logarithm of perplexity) with "
        f"{accuracy.phrase} over {len(finite)} cells of {effect.n} models; {STRONG:g} or beyond is strong{gone}."
    )
    bound = math.atanh(STRONG)
    return [
        replace(
            _empty(PEARSON),
            scope=f"{families([b for _, b in finite])}, all quantizations",
            metric=accuracy.column,
            effect=r,
            low=low,
            high=high,
            unit="correlation",
            models=effect.n,
            p_holds=effect.p_below(bound),
            p_fails=effect.p_above(bound),
            evidence=text if finite else "",
            needs=f"more models (now {effect.n}) or documents for each accuracy: {PEARSON.run}",
        )
    ]


def _instability(cell: Cell, evidence: Evidence, metric: Metric, bound: float) -> Part | None:
    """How far beyond the bound of stability one model lies at 3 bits, by its documents; diverged is beyond any."""
    base = evidence.baselines(metric).get((cell.family, cell.model))
    name = f"{cell.family}/{cell.model}"
    if cell.diverged and not np.isfinite(cell.value):
        far = Effect(value=math.inf, low=math.inf, high=math.inf, stderr=0.0, dof=1, n=1, basis="samples")
        return Part(name=f"{name} (diverged)", found=Contrast(effect=far), kind="better", margin=0)
    if metric.metric == "loss":
        if base is None:
            return None
        found = contrast(evidence, metric, [base], [cell], ignoring=EVERY_AXIS, at_equal_bits=False)
        value, error = cell.value - base.value - bound, found.document_error
    else:
        value, error = bound - cell.value, cell.stderr
    if not np.isfinite(error):
        return None
    of = normal(value, error, 1)
    beyond = Effect(value=value, low=of.low, high=of.high, stderr=error, dof=1e9, n=1, basis="samples")
    return Part(name=name, found=Contrast(effect=beyond), kind="better", margin=0)


def _chance(metric: Metric) -> float | None:
    """Accuracy of guessing; None where it isn't known."""
    return CHANCE_MEAN if metric.column == ZERO_SHOT_MEAN else chance_level(metric)


def _correlation(pairs: Sequence[tuple[Cell, Cell]]) -> tuple[float, Effect]:
    """Pearson's r, and Fisher's z with a jackknife over models: without an error where a model is needed for r."""
    units = sorted({b.unit for _, b in pairs})
    r = _pearson(pairs)
    n = len(units)
    without = [_pearson([p for p in pairs if p[1].unit != unit]) for unit in units]
    if n < 3 or np.isnan([r, *without]).any():
        return r, replace(over_models([]), n=n)
    z, left = _fisher(r), np.asarray([_fisher(x) for x in without])
    pseudo = n * z - (n - 1) * left
    found = over_models(pseudo)
    half = found.high - found.value
    effect = Effect(
        value=z,
        low=z - half,
        high=z + half,
        stderr=found.stderr,
        dof=found.dof,
        n=n,
        basis="models",
        values=found.values,
    )
    return r, effect


def _pearson(pairs: Sequence[tuple[Cell, Cell]]) -> float:
    if len(pairs) < 3:
        return math.nan
    x, y = np.asarray([(a.value, b.value) for a, b in pairs]).T
    if x.std() == 0 or y.std() == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def _fisher(r: float) -> float:
    return math.atanh(float(np.clip(r, -1 + 1e-12, 1 - 1e-12)))  # NaN stays


def _scope(of: str, dtype: str | None, size: int | None, cells: Sequence[Cell]) -> str:
    if dtype is None:
        return of or "nothing measured"
    exponents = {c.bits: c.axis("exponent_bits") for c in cells if c.axis("exponent_bits") is not None}
    text = f" (exponent bits {', '.join(f'{float(str(e)):.0f} at {b}' for b, e in sorted(exponents.items()))})"
    return f"{of}, {dtype}{text if exponents else ''}, block size {named(size)}"


def _more_documents(said: Finding) -> str:
    return f"more documents for each, or larger models: {UNSTABLE_3.run}" if said.needs else ""


def _empty(claim: Claim) -> Finding:
    return Finding(claim=claim.name, statement=claim.statement, source=claim.source, scope="", metric="", headline=True)
