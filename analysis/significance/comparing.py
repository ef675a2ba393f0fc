"""Compare two cells, or two sets of cells over all models, on every text set and task that both were measured on.

Two cells, or sets of a single model, are compared on the same samples: a bootstrap over windows for losses and
divergences, McNemar's exact test for accuracies. Of several models the model is what replicates: Student's t over each
one's mean difference.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd

from analysis.findings.contrasts import Differences, differences
from analysis.findings.evidence import Cell, Evidence
from analysis.findings.on_samples import Weights, outcomes
from analysis.metrics import Metric, metric_columns
from analysis.significance.effects import Effect, of_samples, over_models
from analysis.significance.equivalence import Margins, tost
from analysis.significance.multiplicity import benjamini_hochberg
from analysis.significance.pairs import (
    LEVEL,
    Comparison,
    SampleKey,
    Samples,
    compare_outcomes,
    mean_of_tasks,
    sample_keys,
)
from analysis.significance.power import smallest_detectable
from analysis.significance.proportions import mcnemar, wilson
from analysis.significance.resampling import bootstrap
from kbit.axes import VARIED
from kbit.spec import METHODS, axes

COLUMNS: Final = (
    *("eval", "metric", "unit", "a", "a_low", "a_high", "b", "b_low", "b_high", "difference", "low", "high"),
    *("p", "p_adjusted", "n", "over", "test", "detectable", "margin", "p_equivalent", "verdict"),
)
_SAME_AS_LOSS: Final = ("perplexity", "bits_per_byte", "word_perplexity", "byte_perplexity")


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Which cells of two sets are compared.

    Attributes:
        a, b: keys of the cells that have a partner.
        alone: keys of measured cells that have none.
        models: how many models there are.
        ignoring: axes in which partners may differ.
    """

    a: tuple[str, ...]
    b: tuple[str, ...]
    alone: tuple[str, ...]
    models: int
    ignoring: frozenset[str]


def pair_cells(df: pd.DataFrame, a: Collection[str], b: Collection[str], between: Collection[str]) -> Pairing:
    """Pair cells of two sets, model by model, that are alike in everything but what tells the sets apart.

    Two single cells are a pair whatever they are, also of two models. Axes that don't apply to one of the sets
    (exponent bits of int, the axes of another method) make no difference.

    Args:
        df: a wide result table.
        a: keys of the first set's cells.
        b: keys of the second's.
        between: axes that tell the sets apart.
    """
    evidence = Evidence(df=df)
    metric = next(iter(_metrics(evidence)), None)
    if metric is None:
        return Pairing(a=(), b=(), alone=(*a, *b), models=0, ignoring=frozenset())
    known = {c.key: c for c in evidence.every_cell()}
    sides = [[known[key] for key in keys if key in known] for keys in (a, b)]
    ignoring = _ignoring(sides, between)
    if len(a) == len(b) == 1:
        whole = all(sides)
        return Pairing(
            a=tuple(a) if whole else (),
            b=tuple(b) if whole else (),
            alone=() if whole else (*a, *b),
            models=len({c.unit for side in sides for c in side}) if whole else 0,
            ignoring=ignoring,
        )
    groups = [{_group(c, ignoring) for c in side} for side in sides]
    both = groups[0] & groups[1]
    mine = [tuple(c.key for c in side if _group(c, ignoring) in both) for side in sides]
    taken = {*mine[0], *mine[1]}
    alone = [c.key for side in sides for c in side if c.key not in taken]
    models = len({c.unit for c in sides[0] if _group(c, ignoring) in both})
    return Pairing(a=mine[0], b=mine[1], alone=tuple(alone), models=models, ignoring=ignoring)


def compare_cells(
    df: pd.DataFrame,
    pairing: Pairing,
    samples: Mapping[SampleKey, Samples] | None = None,
    *,
    margins: Margins | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare paired cells on every metric that both sets have and that can be ranked.

    Args:
        df: a wide result table.
        pairing: ``pair_cells`` of it.
        samples: outcomes of the paired cells by (cell key, eval); without them a single pair has no interval.
        margins: what is too small to matter; by default 0.01 nats and 0.5 points.
        seed: of the bootstrap's draws.

    Returns:
        A row a metric: a and b, their means (of a single pair's accuracy with Wilson's interval); difference (a - b)
        with its 95 % interval; p, two-sided, and p_adjusted (Benjamini and Hochberg over the rows); n and what it
        counts ('over'; of a mean of tasks the fewest of one); test; detectable, the smallest true difference that
        would be found four times in five; p_equivalent, of the two one-sided tests with ``margin``; verdict,
        adjusted: 'a is better', 'b is better', 'alike' (within the margin) or "can't tell".
    """
    evidence = Evidence(df=df, samples={} if samples is None else samples, margins=margins or Margins())
    rows: list[dict[str, Any]] = []
    signs: list[float] = []
    for metric in _metrics(evidence):
        known = {c.key: c for c in (*evidence.cells(metric), *evidence.baselines(metric).values())}
        sides = [[known[key] for key in keys if key in known] for keys in (pairing.a, pairing.b)]
        if all(sides):
            rows.append(_row(evidence, metric, sides, pairing, seed))
            signs.append(metric.sign)
    found = pd.DataFrame(rows, columns=list(COLUMNS))
    alike = benjamini_hochberg(found["p_equivalent"].to_numpy(dtype=np.float64))
    found["p_adjusted"] = benjamini_hochberg(found["p"].to_numpy(dtype=np.float64))
    settled = zip(found.to_dict("records"), alike, signs, strict=True)
    found["verdict"] = [_verdict(row, p, sign) for row, p, sign in settled]
    return found


def wanted_for(long_df: pd.DataFrame, pairing: Pairing) -> dict[str, SampleKey]:
    """Measurement key -> (cell key, eval) of the outcomes that ``compare_cells`` compares."""
    found = long_df[long_df["key"].isin({*pairing.a, *pairing.b})]
    return sample_keys(found)


def _row(evidence: Evidence, metric: Metric, sides: list[list[Cell]], pairing: Pairing, seed: int) -> dict[str, Any]:
    found = _differences(metric, sides, pairing)
    # Differences are improvements; a - b is what the metric itself says.
    d = -metric.sign * found.d
    effect, test = over_models(d, found.correlation), "t over models"
    p = 2 * min(effect.p_above(0), effect.p_below(0)) if effect.tested else float("nan")
    over = "models"
    if effect.basis == "ranks":
        test = "signed ranks over models"
    if len(found.units) == 1:
        over = "windows" if metric.eval and metric.metric in ("loss", "kl", "top_token", "p_change") else "documents"
        single, p, test = _one_model(evidence, metric, found.combinations[0], seed)
        effect = single or effect
    margin = evidence.margins.of(metric)
    means = _means(found, sides)
    intervals = [_wilson(evidence, metric, side) for side in sides]
    return {
        **{"eval": metric.eval, "metric": metric.metric, "unit": metric.unit},
        **{"a": means[0], "a_low": intervals[0][0], "a_high": intervals[0][1]},
        **{"b": means[1], "b_low": intervals[1][0], "b_high": intervals[1][1]},
        **{"difference": effect.value, "low": effect.low, "high": effect.high, "p": min(p, 1.0), "n": effect.n},
        **{"over": over, "test": test, "detectable": smallest_detectable(effect.stderr, effect.dof)},
        **{"margin": np.nan if margin is None else margin, "p_adjusted": np.nan},
        "p_equivalent": np.nan if margin is None or not effect.tested else tost(effect, margin),
    }


def _means(found: Differences, sides: list[list[Cell]]) -> list[float]:
    """Means over models of either side's cells, each model's weighted as in its difference."""
    if len(found.units) == 1 and len(sides[0]) == len(sides[1]) == 1:
        return [sides[0][0].value, sides[1][0].value]
    means = []
    for side, sign in zip(sides, (-1.0, 1.0), strict=True):
        keys = {c.key for c in side}
        each = [sum(sign * w * found.cells[k].value for k, w in own.items() if k in keys) for own in found.combinations]
        means.append(float(np.mean(each)))
    return means


def _differences(metric: Metric, sides: list[list[Cell]], pairing: Pairing) -> Differences:
    if len(sides[0]) == len(sides[1]) == 1:
        # A pair whatever they are.
        a, b = sides[0][0], sides[1][0]
        d = metric.sign * (b.value - a.value)
        combination = {b.key: 1.0, a.key: -1.0} if a.key != b.key else {a.key: 0.0}
        return Differences(
            units=(a.unit,),
            families=(a.family,),
            x=np.asarray([np.nan]),
            d=np.asarray([d]),
            combinations=(combination,),
            alone=0,
            cells={c.key: c for c in (a, b)},
        )
    return differences(metric, *sides, ignoring=pairing.ignoring, at_equal_bits=False)


def _one_model(evidence: Evidence, metric: Metric, combination: Weights, seed: int) -> tuple[Effect | None, float, str]:
    """a - b on one model's samples: bootstrap, or McNemar's test with the paired interval of two proportions."""
    # Combinations are second minus first: a - b is their negative.
    parts = [_part(evidence, part, combination, seed) for part in evidence.evals(metric)]
    if any(found is None for found, _ in parts):
        return None, float("nan"), "none: samples are missing, or not of the same data"
    known = [found for found, _ in parts if found is not None]
    joined = mean_of_tasks(known)
    return of_samples(joined), joined.p, parts[0][1] if len(known) == 1 else "z, tasks independent"


def _part(evidence: Evidence, part: tuple[str, str], combination: Weights, seed: int) -> tuple[Comparison | None, str]:
    eval_name, name = part
    own = {key: evidence.samples.get((key, eval_name)) for key in combination}
    keys = sorted(combination, key=lambda key: combination[key])
    if all(s is not None and name in s and s[name].dtype == np.bool_ for s in own.values()) and len(keys) <= 2:
        first, second = (own[key] for key in (keys[0], keys[-1]))
        assert first is not None
        assert second is not None
        if len(first[name]) != len(second[name]):
            return None, ""
        found, test = compare_outcomes(first[name], second[name]), mcnemar(first[name], second[name])
        text = f"McNemar exact: {test.first_only} only a, {test.second_only} only b"
        return Comparison(**{**_fields(found), "p": test.p}), text
    joined = outcomes(evidence, part, combination)
    if joined is None:
        return None, ""
    values, weights = joined
    zero = np.zeros(len(values))
    if name == "loss":
        found = bootstrap({"nats": -values, "tokens": weights}, {"nats": zero, "tokens": weights}, name, seed=seed)
    else:
        found = bootstrap({name: -values, "tokens": weights}, {name: zero, "tokens": weights}, name, seed=seed)
    return found, "bootstrap over samples"


def _fields(found: Comparison) -> dict[str, Any]:
    return {name: getattr(found, name) for name in ("difference", "low", "high", "stderr", "n")}


def _wilson(evidence: Evidence, metric: Metric, side: Iterable[Cell]) -> tuple[float, float]:
    """Interval of a single cell's accuracy; NaN of others."""
    cells = list(side)
    if len(cells) == 1 and metric.eval:
        own = evidence.samples.get((cells[0].key, metric.eval), {})
        right = own.get(metric.metric)
        if right is not None and right.dtype == np.bool_:
            return wilson(float(right.sum()), len(right))
    return float("nan"), float("nan")


def _verdict(row: Mapping[Any, Any], p_alike: float, sign: float) -> str:
    if p_alike < 1 - LEVEL:
        return "alike"
    if not row["p_adjusted"] < 1 - LEVEL:
        return "can't tell"
    return "a is better" if sign * row["difference"] < 0 else "b is better"


def _metrics(evidence: Evidence) -> list[Metric]:
    """Metrics that can be ranked; of perplexity's the loss alone stands for all."""
    if not len(evidence.rows):
        return []
    found = [m for m in metric_columns(evidence.df) if m.higher_is_better is not None]
    return [m for m in found if m.metric not in _SAME_AS_LOSS and evidence.df[m.column].notna().any()]


def _ignoring(sides: list[list[Cell]], between: Collection[str]) -> frozenset[str]:
    ignoring = {*between}
    if "method" in between:
        offered = [{n for c in side for n in METHODS[str(c.axis("method"))].offered()} for side in sides]
        ignoring |= (offered[0] ^ offered[1]) | {"calibration"}
    applies = [{name for c in side for name, _ in c.spec} for side in sides]
    own = {name for name, a in axes().items() if a.neutral is VARIED} - {"dtype", "blocksize"}
    return frozenset(ignoring | ((applies[0] ^ applies[1]) & own))


def _group(c: Cell, ignoring: Collection[str]) -> tuple[object, ...]:
    return c.family, c.model, 0 if "bits" in ignoring else c.bits, c.without(ignoring)
