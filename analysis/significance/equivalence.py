"""Claims of no effect: equivalence within a margin, by two one-sided tests."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.metrics import Metric
from analysis.significance.effects import Effect


@dataclass(frozen=True, kw_only=True)
class Margins:
    """What is too small to matter.

    Attributes:
        loss: in nats per token (KL divergence too).
        points: of accuracies, in percentage points.
    """

    loss: float = 0.01
    points: float = 0.5

    def of(self, metric: Metric) -> float | None:
        """Return the margin in the metric's own unit; None for a metric that has none (seconds, megabytes)."""
        if metric.metric in ("loss", "kl", "kl_median"):
            return self.loss
        is_share = not metric.unit and metric.higher_is_better is True and metric.metric != "mcc"
        return self.points / 100 if is_share else None


def tost(effect: Effect, margin: float) -> float:
    """Return the p-value of 'the effect lies outside ± ``margin``': small where it lies inside (Schuirmann, 1987).

    The two one-sided tests each at 5 % say the same as the 90 % interval inside the margins.

    Args:
        effect: with its standard error; NaN comes of one that has none.
        margin: positive, in the effect's unit.
    """
    return max(effect.p_above(-margin), effect.p_below(margin))
