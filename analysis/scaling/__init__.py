"""Scaling laws: what a metric is at a given number of model bits.

interpolation  linear between measured models over the logarithm of total bits, the paper's choice
"""

from analysis.scaling.interpolation import best_precision, budget_grid, common_range, interpolate, scaling_points

__all__ = ["best_precision", "budget_grid", "common_range", "interpolate", "scaling_points"]
