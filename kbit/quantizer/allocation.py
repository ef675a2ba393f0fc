"""Bits per layer under a budget of average bits: the exact optimum, by dynamic programming.

A knapsack with one choice per layer (as in Malinovskii et al. 2025, section 5: the loss is the sum of the layers').
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

PARTS_OF_A_BIT: Final = 64
"""Bits per weight are rounded up to a whole number of these parts of a bit."""
COST_STEPS: Final = 40
"""Costs are rounded to whole numbers of 2^-40, so that sums, and with them ties, are exact."""
_LARGEST_COST: Final = 4096.0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Front:
    """Allocations of the last layers of which none needs fewer parts, or as many, at no more cost than another.

    Attributes:
        parts: int64, ascending.
        costs: int64, descending.
        chosen: uint8, the choice for the first of the layers.
    """

    parts: NDArray[np.int64]
    costs: NDArray[np.int64]
    chosen: NDArray[np.uint8]


def allocate(
    costs: NDArray[np.float64], bits: Sequence[Sequence[int]], sizes: Sequence[int], budget: float
) -> list[int]:
    """Choose for each layer one of its candidates: the least sum of costs within the budget.

    Of equal sums the allocation with fewer bits is taken, then the one with more bits in the earlier layer.

    Args:
        costs: [layers, candidates], at least 0; what lies beyond 4,096 counts as that.
        bits: stored bits of each layer with each candidate, ascending in each layer; at most 256 candidates.
        sizes: weights of each layer.
        budget: bits per weight, as the decimal number that it prints.

    Returns:
        The number of the candidate of each layer.

    Raises:
        ValueError: the candidates of the fewest bits need more than the budget.
    """
    need, whole = parts_of(bits, sizes), np.rint(np.minimum(costs, _LARGEST_COST) * 2.0**COST_STEPS).astype(np.int64)
    room = int(PARTS_OF_A_BIT * Fraction(str(float(budget))) * sum(sizes))
    least = need.min(1)
    if int(least.sum()) > room:
        raise ValueError(f"{budget:g} bits per weight are less than the {mean_bits(least, sizes):.6g} that are needed")
    fronts: list[_Front] = []
    before = int(least.sum())
    for own_parts, own_costs in zip(need[::-1], whole[::-1], strict=True):
        before -= int(own_parts.min())
        fronts.append(_joined(own_parts, own_costs, fronts[-1] if fronts else None, room - before))
    fronts.reverse()
    chosen: list[int] = []
    left = room
    for own_parts, front in zip(need, fronts, strict=True):
        # The last that fits costs least.
        choice = int(front.chosen[int(np.searchsorted(front.parts, left, side="right")) - 1])
        chosen.append(choice)
        left -= int(own_parts[choice])
    return chosen


def parts_of(bits: Sequence[Sequence[int]], sizes: Sequence[int]) -> NDArray[np.int64]:
    """Return what is counted of stored bits, in 64ths of a bit: rounded up per weight, times the weights.

    Args:
        bits: [layers][candidates].
        sizes: weights of each layer.
    """
    return np.array(
        [[-(-PARTS_OF_A_BIT * b // n) * n for b in of_layer] for of_layer, n in zip(bits, sizes, strict=True)],
        dtype=np.int64,
    )


def mean_bits(parts: NDArray[np.int64], sizes: Sequence[int]) -> float:
    """Return the bits per weight of one count of parts per layer."""
    return float(Fraction(int(parts.sum()), PARTS_OF_A_BIT * sum(sizes)))


def _joined(own_parts: NDArray[Any], own_costs: NDArray[Any], after: _Front | None, room: int) -> _Front:
    """Return the front of a layer and those after it, within what the layers before it leave."""
    order = range(len(own_parts) - 1, -1, -1)  # of equals the choice with more bits
    nothing = np.zeros(1, dtype=np.int64)
    parts_after, costs_after = (nothing, nothing) if after is None else (after.parts, after.costs)
    parts = np.concatenate([own_parts[k] + parts_after for k in order])
    costs = np.concatenate([own_costs[k] + costs_after for k in order])
    count = len(parts_after)
    chosen = np.repeat(np.array(order, dtype=np.uint8), count)
    fits = np.flatnonzero(parts <= room)
    ordered = fits[np.lexsort((costs[fits], parts[fits]))]  # stable
    parts, costs, chosen = parts[ordered], costs[ordered], chosen[ordered]
    best = np.minimum.accumulate(costs)
    kept = np.concatenate(([True], costs[1:] < best[:-1]))
    return _Front(parts=parts[kept], costs=costs[kept], chosen=chosen[kept])
