"""Scaling laws: what a metric is at a given number of model bits, and what fits into a memory.

interpolation  linear between measured models over the logarithm of total bits, the paper's choice
points         the cells that laws are fitted to
offsets        curves as one base function and an offset per precision, and whether they are parallel
power_laws     of size and precision together; of the loss that post-training quantization adds
effective      the 16-bit model that is as good as a quantized one
robust         linear regression by Huber's loss, of values and of bounds
law            the protocol: fit, prediction, intervals over models, error on the largest size left out
laws           every law fitted to every family
pareto         cells that no other beats in size and metric
budgets        the best precision for a number of bits, and how sure that is
memory         the best cell for a memory
"""

from analysis.scaling.budgets import best_by_budget
from analysis.scaling.effective import effective_parameters
from analysis.scaling.interpolation import best_precision, budget_grid, common_range, interpolate, scaling_points
from analysis.scaling.laws import LAWS, fit_laws, flat_laws, law_parameters
from analysis.scaling.memory import Best, Cache, Use, best_for_memory, comparable_metric
from analysis.scaling.offsets import Parallel, parallel_curves
from analysis.scaling.pareto import pareto
from analysis.scaling.points import LawPoints, law_points

__all__ = [
    "LAWS",
    "Best",
    "Cache",
    "LawPoints",
    "Parallel",
    "Use",
    "best_by_budget",
    "best_for_memory",
    "best_precision",
    "budget_grid",
    "common_range",
    "comparable_metric",
    "effective_parameters",
    "fit_laws",
    "flat_laws",
    "interpolate",
    "law_parameters",
    "law_points",
    "parallel_curves",
    "pareto",
    "scaling_points",
]
