"""Metrics once more from the stored outcomes of samples, by kind of evaluation: what a store can be checked with.

Each function takes samples by name, as ``kbit.evaluation.spec.EvalResult`` has them, and returns the metrics and
standard errors that follow from them. What does not (bits per byte needs the bytes) is left out. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kbit.evaluation.evaluators import BATCHES, SPREAD_PAIRS
from kbit.evaluation.spec import SLOPES

Samples = Mapping[str, NDArray[Any]]
Numbers = tuple[dict[str, float], dict[str, float]]
"""Metrics and standard errors by name."""

TENTH: Final = 0.1
QUARTILES: Final = {"": 50, "_q25": 25, "_q75": 75}


def text_numbers(samples: Samples) -> Numbers:
    """Return loss and perplexity from the nats and scored tokens of each window (DEFINITIONS: perplexity)."""
    losses = samples["nats"].astype(np.float64) / samples["tokens"]
    mean, error = _mean(losses)
    with np.errstate(over="ignore"):
        metrics = {"loss": mean, "perplexity": float(np.exp(mean))}
    return metrics, {} if error is None else {"loss": error, "perplexity": metrics["perplexity"] * error}


def agreement_numbers(samples: Samples) -> Numbers:
    """Return means over windows, and the root mean square of the change of p(target); windows have equal lengths."""
    metrics, stderr = {}, {}
    for name in ("kl", "top_token", "p_change"):
        metrics[name], error = _mean(samples[name].astype(np.float64))
        if error is not None:
            stderr[name] = error
    metrics["p_change_rms"] = math.sqrt(float(samples["p_change_squares"].astype(np.float64).mean()))
    return metrics, stderr


def task_numbers(samples: Samples) -> Numbers:
    """Return the means of what is right or wrong for each document, and lm-eval's perplexity = exp(-mean)."""
    metrics, stderr = {}, {}
    for name, values in samples.items():
        if values.dtype == np.bool_:
            metrics[name], error = _mean(values.astype(np.float64))
            if error is not None:
                stderr[name] = error
        elif name == "perplexity":
            with np.errstate(over="ignore"):
                metrics[name] = float(np.exp(-values.astype(np.float64).mean()))
    return metrics, stderr


def latency_numbers(samples: Samples) -> Numbers:
    """Return medians and quartiles of the repetitions."""
    names = [f"{what}_{batch}" for batch in BATCHES for what in ("ttft", "tokens_per_second")]
    return {n + end: float(np.percentile(samples[n], of)) for n in names for end, of in QUARTILES.items()}, {}


def outlier_numbers(samples: Samples) -> Numbers:
    """Return the mean correlation over blocks of each pair of layers; blocks without one don't count."""
    metrics, stderr = {}, {}
    for pair in SPREAD_PAIRS.keys() & samples.keys():
        values = samples[pair].astype(np.float64)
        metrics[f"spearman_{pair}"], error = _mean(values[~np.isnan(values)])
        if error is not None:
            stderr[f"spearman_{pair}"] = error
    return metrics, stderr


def slope_numbers(samples: Samples) -> Numbers:
    """Return the rise of the loss by errors of a tenth in each layer."""
    return {"noise_rise": float(TENTH**2 * samples[SLOPES].sum(dtype=np.float64))}, {}


def _mean(values: NDArray[np.float64]) -> tuple[float, float | None]:
    """Return a mean, NaN of nothing, and its standard error where there are several values."""
    if not len(values):
        return math.nan, None
    with np.errstate(invalid="ignore", over="ignore"):
        error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
        return float(values.mean()), error
