"""Statistics of measurements on the same samples.

pairs  the difference of two cells, and its mean over models, with a confidence interval
"""

from analysis.significance.pairs import (
    LEVEL,
    Comparison,
    Samples,
    can_pair,
    compare,
    compare_loss,
    compare_mean_loss,
    compare_outcomes,
)

__all__ = [
    "LEVEL",
    "Comparison",
    "Samples",
    "can_pair",
    "compare",
    "compare_loss",
    "compare_mean_loss",
    "compare_outcomes",
]
