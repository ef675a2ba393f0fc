"""Two measurements on the same samples: the difference of their means with a confidence interval.

Every comparison is paired: both cells saw the same windows or documents, so most of the variance between samples
cancels. An interval speaks of other texts of the same kind, for the models at hand; not of other models.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

LEVEL: Final = 0.95
_DIFFERENT_WINDOWS: Final = (
    "the two losses are of different windows; compare measurements of one tokenizer, dataset, window and limit"
)

Samples = Mapping[str, NDArray[Any]]
"""Outcomes of each sample by name: 'nats' and 'tokens' of each window, or a task's metric ('acc') of each document."""
SampleKey = tuple[str, str]
"""(cell key, eval name)."""


def sample_keys(rows: pd.DataFrame) -> dict[str, SampleKey]:
    """Return whose outcomes rows of a long table stand for: measurement key -> (cell key, eval)."""
    every = zip(rows["measurement"], rows["key"], rows["eval"], strict=True)
    return {str(measurement): (str(key), str(name)) for measurement, key, name in every}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A difference, first minus second, and its 95 % confidence interval.

    Attributes:
        difference: of the means over the same samples, in the metric's unit (nats per token for a loss).
        low, high: the interval; NaN where a value isn't finite or there are fewer than two samples.
        stderr: standard error of the difference.
        n: samples (windows or documents).
        p: two-sided p-value of no difference; NaN where none was computed.
    """

    difference: float
    low: float
    high: float
    stderr: float
    n: int
    p: float = float("nan")

    @property
    def significant(self) -> bool:
        """The interval leaves out zero."""
        return self.low > 0 or self.high < 0


def compare_loss(a: Samples, b: Samples) -> Comparison:
    """Difference of two losses, in nats per token, on the same windows.

    Loss is a ratio, the sum of nats by the sum of tokens, so the error is the ratio estimator's: with d_i the
    difference in nats and t_i the tokens of window i, R = sum d / sum t and var R = n / (n - 1) sum (d_i - R t_i)² /
    (sum t)² (Cochran, Sampling Techniques, 1977, section 2.11), with Student's t.

    Args:
        a: 'nats' [n] and 'tokens' [n] (scored tokens of each window).
        b: the same of the other.

    Raises:
        ValueError: the windows are not the same (their number or their tokens differ).
    """
    tokens = np.asarray(a["tokens"], dtype=np.float64)
    if not np.array_equal(tokens, np.asarray(b["tokens"], dtype=np.float64)):
        raise ValueError(_DIFFERENT_WINDOWS)
    with np.errstate(invalid="ignore", divide="ignore"):
        d = np.asarray(a["nats"], dtype=np.float64) - np.asarray(b["nats"], dtype=np.float64)
        ratio = float(d.sum() / tokens.sum()) if len(d) else float("nan")
        residual = d - ratio * tokens
        n = len(d)
        error = float(np.sqrt(n / (n - 1) * (residual**2).sum()) / tokens.sum()) if n > 1 else float("nan")
    return _student(ratio, error, n)


def compare_outcomes(a: NDArray[Any], b: NDArray[Any]) -> Comparison:
    """Difference of two means on the same documents, e.g. of two accuracies.

    Right-or-wrong outcomes (bool) take Bonett and Price's (2012) adjusted interval for paired proportions, which stays
    honest where few or no documents change sides; numbers take the paired t interval.

    Raises:
        ValueError: the numbers of documents differ.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} documents can't be paired; compare measurements of one task and limit")
    n = len(a)
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    mean = float(d.mean()) if n else float("nan")
    if a.dtype != np.bool_ or b.dtype != np.bool_:
        return _student(mean, float(d.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan"), n)
    if n < 2:
        return _student(mean, float("nan"), n)
    from scipy.stats import norm

    gained, lost = ((d > 0).sum() + 1) / (n + 2), ((d < 0).sum() + 1) / (n + 2)
    centre = float(gained - lost)
    error = float(np.sqrt((gained + lost - centre**2) / (n + 2)))
    half = float(norm.ppf(0.5 + LEVEL / 2)) * error
    # The adjusted centre lies a little nearer to zero; the interval always holds the difference itself.
    return Comparison(difference=mean, low=max(-1.0, centre - half), high=min(1.0, centre + half), stderr=error, n=n)


def can_pair(a: Samples, b: Samples, metric: str) -> bool:
    """Tell whether ``compare`` can: both kept the metric's outcomes, of the same windows or as many documents.

    The same model measured with another window or limit can't be paired.
    """
    names = {"nats", "tokens"} if metric == "loss" else {metric}
    if not (names <= set(a) and names <= set(b)):
        return False
    return np.array_equal(a["tokens"], b["tokens"]) if metric == "loss" else len(a[metric]) == len(b[metric])


def compare(a: Samples, b: Samples, metric: str) -> Comparison:
    """``compare_loss`` for 'loss', ``compare_outcomes`` for a task's metric.

    Raises:
        ValueError: the samples can't be paired.
        KeyError: a measurement kept no outcomes of the metric.
    """
    return compare_loss(a, b) if metric == "loss" else compare_outcomes(a[metric], b[metric])


def compare_mean_loss(pairs: Sequence[tuple[Samples, Samples]], tokenizers: Sequence[Hashable]) -> Comparison:
    """Mean over models of the difference of two losses, a model's weights the same.

    Models of one tokenizer with the same windows are averaged window by window, so that what they share in a window
    counts. Over others the standard errors are averaged: the error of a mean is at most that, however they correlate.

    Args:
        pairs: (a, b) of each model, as in ``compare_loss``.
        tokenizers: of each model, what its tokenizer goes by, e.g. the family. Windows of different tokenizers hold
            different texts even where their numbers of tokens are the same.

    Raises:
        ValueError: no pairs, not as many tokenizers, or a pair is of different windows.
    """
    if not pairs:
        raise ValueError("no models to compare")
    alike: dict[Hashable, list[tuple[Samples, Samples]]] = {}
    for pair, tokenizer in zip(pairs, tokenizers, strict=True):
        alike.setdefault((tokenizer, np.asarray(pair[0]["tokens"], dtype=np.int64).tobytes()), []).append(pair)
    each = [_window_by_window(group) for group in alike.values()]
    models = [len(group) for group in alike.values()]
    with np.errstate(invalid="ignore"):
        difference = float(np.average([c.difference for c in each], weights=models))
        error = float(np.average([c.stderr for c in each], weights=models))
    return _student(difference, error, min(c.n for c in each))


def mean_of_tasks(each: Sequence[Comparison]) -> Comparison:
    """Mean of several tasks' differences, whose documents are independent; of one task its own.

    Its p-value is normal's, and ``n`` that of the task with the fewest documents: a limit counts those of each task.
    """
    if len(each) == 1:
        return each[0]
    error = float(np.sqrt(sum(c.stderr**2 for c in each))) / len(each)
    return normal(float(np.mean([c.difference for c in each])), error, min(c.n for c in each))


def normal(difference: float, error: float, n: int) -> Comparison:
    """Return a difference with the normal interval and p-value (NaN where no error but a difference is left).

    Args:
        difference: first minus second.
        error: its standard error.
        n: samples.
    """
    from scipy.special import ndtr, ndtri

    half = float(ndtri(0.5 + LEVEL / 2)) * error
    p = 1.0 if difference == 0 else float("nan")
    if error != 0:
        p = 2 * float(ndtr(-abs(difference) / error))
    return Comparison(difference=difference, low=difference - half, high=difference + half, stderr=error, n=n, p=p)


def _window_by_window(pairs: Sequence[tuple[Samples, Samples]]) -> Comparison:
    """``compare_loss`` of the mean over models of each window's nats; all of the same windows."""
    if len(pairs) == 1:
        return compare_loss(*pairs[0])
    if any(not can_pair(a, b, "loss") for a, b in pairs):
        raise ValueError(_DIFFERENT_WINDOWS)
    with np.errstate(invalid="ignore"):
        a, b = (np.mean([np.asarray(p[side]["nats"], dtype=np.float64) for p in pairs], axis=0) for side in (0, 1))
    tokens = pairs[0][0]["tokens"]
    return compare_loss({"nats": a, "tokens": tokens}, {"nats": b, "tokens": tokens})


def _student(mean: float, error: float, n: int) -> Comparison:
    from scipy.stats import t

    if n < 2 or not np.isfinite(error):
        return Comparison(difference=mean, low=float("nan"), high=float("nan"), stderr=error, n=n)
    half = float(t.ppf(0.5 + LEVEL / 2, n - 1)) * error
    p = 2 * float(t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Comparison(difference=mean, low=mean - half, high=mean + half, stderr=error, n=n, p=p)
