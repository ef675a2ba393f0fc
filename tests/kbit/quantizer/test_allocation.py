"""Bits per layer under a budget: the optimum of all allocations, ties, what is counted, what can't be."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbit.quantizer.allocation import allocate, mean_bits, parts_of


def by_hand(costs: np.ndarray, bits: list[list[int]], sizes: list[int], budget: float) -> list[int] | None:
    """The best of all allocations: the least cost, then the fewest bits, then more bits in earlier layers."""
    steps = [[round(Fraction(float(c)) * 2**40) for c in own] for own in costs]
    counted = [[-(-64 * b // n) * n for b in own] for own, n in zip(bits, sizes, strict=True)]
    room = 64 * Fraction(str(budget)) * sum(sizes)
    possible = [
        (sum(c[k] for c, k in zip(steps, chosen, strict=True)), needed, [-k for k in chosen])
        for chosen in product(*(range(len(own)) for own in bits))
        if (needed := sum(p[k] for p, k in zip(counted, chosen, strict=True))) <= room
    ]
    return [-k for k in min(possible)[2]] if possible else None


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, list[list[int]], list[int], float]:
    layers, candidates = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 40), min_size=layers, max_size=layers))
    widths = draw(st.lists(st.integers(2, 9), min_size=candidates, max_size=candidates, unique=True).map(sorted))
    overhead = draw(st.lists(st.integers(0, 30), min_size=layers, max_size=layers))
    bits = [[w * n + o for w in widths] for n, o in zip(sizes, overhead, strict=True)]
    few = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0])  # so that there are ties
    cost = draw(st.sampled_from([few, st.floats(0, 100)]))
    costs = draw(st.lists(st.lists(cost, min_size=candidates, max_size=candidates), min_size=layers, max_size=layers))
    budget = draw(st.one_of(st.integers(4, 60).map(lambda n: n / 4), st.integers(20, 150).map(lambda n: n / 10)))
    return np.array(costs), bits, sizes, budget


@settings(deadline=None, max_examples=300)
@given(problem=problems())
def test_no_other_allocation_is_better(problem: tuple[np.ndarray, list[list[int]], list[int], float]) -> None:
    expected = by_hand(*problem)
    if expected is None:
        with pytest.raises(ValueError, match="bits per weight are less than"):
            allocate(*problem)
    else:
        assert allocate(*problem) == expected


def test_ties_go_to_fewer_bits_then_to_the_earlier_layer() -> None:
    bits, sizes = [[20, 30], [20, 30]], [10, 10]
    assert allocate(np.zeros((2, 2)), bits, sizes, 3.0) == [0, 0]
    # One of two equal layers can have more.
    assert allocate(np.array([[1.0, 0.5], [1.0, 0.5]]), bits, sizes, 2.5) == [1, 0]
    assert allocate(np.array([[1.0, 0.5], [1.0, 0.25]]), bits, sizes, 2.5) == [0, 1]


def test_a_budget_is_the_decimal_number_that_it_prints_and_bits_round_up_to_a_64th() -> None:
    costs = np.array([[2.0, 1.0]])
    assert allocate(costs, [[20, 41]], [10], 4.1) == [0]  # 4.1 bits are 263 of 64ths, rounded up: more than 262.4
    assert allocate(costs, [[20, 41]], [10], 4.11) == [1]
    assert allocate(costs, [[128, 272]], [64], 4.25) == [1]
    assert mean_bits(parts_of([[41]], [10]), [10]) == 263 / 64


def test_many_layers_of_a_large_model_take_little_time_and_meet_the_budget() -> None:
    sizes = [4096 * 4096 * (1 + n % 3) for n in range(120)]
    bits = [[k * n + n // 4 for k in range(2, 9)] for n in sizes]
    generator = np.random.default_rng(0)
    costs = generator.exponential(size=(120, 1)) * 4.0 ** -np.arange(7)
    chosen = allocate(costs, bits, sizes, 4.25)
    spent = sum(own[k] for own, k in zip(bits, chosen, strict=True)) / sum(sizes)
    assert 4.2 < spent <= 4.25
    assert costs[range(120), chosen].sum() < costs[:, 2].sum()
