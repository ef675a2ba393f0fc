"""Improvements of single models on their windows and documents: linear combinations of cells' outcomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.findings.evidence import Cell, Evidence
from analysis.metrics import Metric
from analysis.significance import Comparison, can_pair, compare_loss, compare_outcomes, mean_of_tasks

Weights = dict[str, float]
"""A linear combination of cells: weight by key. Times the metric's sign it is an improvement."""


def documents(
    evidence: Evidence, metric: Metric, combinations: Sequence[Weights], cells: Mapping[str, Cell]
) -> dict[str, Any]:
    """How far the documents go: fields of ``Contrast``."""
    samples = [on_samples(evidence, metric, c) for c in combinations]
    known = [s for s in samples if s is not None and np.isfinite(s.stderr)]
    if not known:
        return {"document_error": _separate_error(combinations, cells)}
    return {
        "document_error": float(np.sqrt(np.mean([s.stderr**2 for s in known]))),
        "documents": min(s.n for s in known),
        "tokens": _window_tokens(evidence, metric, combinations[samples.index(known[0])]),
        "paired": True,
    }


def on_samples(evidence: Evidence, metric: Metric, weights: Weights) -> Comparison | None:
    """One model's second minus first on its samples; None where some are missing or can't be combined."""
    parts = []
    for part in evidence.evals(metric):
        found = _combined(evidence, part, weights)
        if found is None:
            return None
        parts.append(found)
    return mean_of_tasks(parts)


def outcomes(
    evidence: Evidence, part: tuple[str, str], weights: Weights
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return a combination's outcome of each sample, and the samples' weights: nats and tokens, or means and tokens.

    None where a cell's samples are missing or of other data.

    Args:
        evidence: with the samples.
        part: (eval, name in its samples).
        weights: of the cells.
    """
    eval_name, name = part
    own = {key: evidence.samples.get((key, eval_name)) for key in weights}
    known = {key: s for key, s in own.items() if s is not None}
    if len(known) != len(weights) or not known:
        return None
    first = next(iter(known.values()))
    if not all(can_pair(first, s, name) for s in known.values()):
        return None
    outcome = "nats" if name == "loss" else name
    with np.errstate(invalid="ignore"):
        total = np.sum([weights[k] * np.asarray(s[outcome], dtype=np.float64) for k, s in known.items()], axis=0)
    tokens = np.asarray(first["tokens"], dtype=np.float64) if "tokens" in first else np.ones(len(total))
    return np.asarray(total, dtype=np.float64), tokens


def _combined(evidence: Evidence, part: tuple[str, str], weights: Weights) -> Comparison | None:
    found = outcomes(evidence, part, weights)
    if found is None:
        return None
    total, tokens = found
    zero = np.zeros(len(total))
    if part[1] == "loss":
        return compare_loss({"nats": total, "tokens": tokens}, {"nats": zero, "tokens": tokens})
    return compare_outcomes(total, zero)


def _window_tokens(evidence: Evidence, metric: Metric, weights: Weights) -> float:
    found = evidence.samples.get((next(iter(weights)), metric.eval))
    return float(np.mean(found["tokens"])) if found is not None and "tokens" in found else 0.0


def _separate_error(combinations: Sequence[Weights], cells: Mapping[str, Cell]) -> float:
    squares = [sum(w * w * cells[key].stderr ** 2 for key, w in c.items()) for c in combinations]
    return float(np.sqrt(np.mean(squares))) if squares else float("nan")
