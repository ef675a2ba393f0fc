"""Statistics of measurements on the same samples, and of differences over models.

pairs         the difference of two cells, and its mean over models, with a confidence interval
proportions   McNemar's exact test, Wilson's interval
resampling    a bootstrap over windows, documents or clusters; flipped signs
effects       an effect over models (t, signed ranks) and how surely it lies above or below a bound
equivalence   margins, and two one-sided tests of no effect
multiplicity  Holm, and Benjamini and Hochberg
power         the smallest difference that data could have shown; documents and models that it would take
comparing     two cells or two sets of cells on every text set and task; showing: in the terminal
"""

from analysis.significance.effects import Effect, by_ranks, of_samples, over_models, student
from analysis.significance.equivalence import Margins, tost
from analysis.significance.multiplicity import benjamini_hochberg, holm
from analysis.significance.pairs import (
    LEVEL,
    Comparison,
    SampleKey,
    Samples,
    can_pair,
    compare,
    compare_loss,
    compare_mean_loss,
    compare_outcomes,
    mean_of_tasks,
    normal,
    sample_keys,
)
from analysis.significance.power import models_needed, samples_needed, smallest_detectable
from analysis.significance.proportions import McNemar, mcnemar, wilson
from analysis.significance.resampling import bootstrap, sign_flip

__all__ = [
    "LEVEL",
    "Comparison",
    "Effect",
    "Margins",
    "McNemar",
    "SampleKey",
    "Samples",
    "benjamini_hochberg",
    "bootstrap",
    "by_ranks",
    "can_pair",
    "compare",
    "compare_loss",
    "compare_mean_loss",
    "compare_outcomes",
    "holm",
    "mcnemar",
    "mean_of_tasks",
    "models_needed",
    "normal",
    "of_samples",
    "over_models",
    "sample_keys",
    "samples_needed",
    "sign_flip",
    "smallest_detectable",
    "student",
    "tost",
    "wilson",
]
