"""Rounds of Lloyd's iteration without waiting for the GPU between them."""

from __future__ import annotations

from torch import Tensor

from kbit.kernels.launching import on
from kbit.kernels.lloyd_jit import cut_at_midpoints
from kbit.quantizer.sorted_values import CHUNK, HIGH_BITS, LOW_BITS, SortedValues


def lloyd_rounds(in_order: SortedValues, values: Tensor, rounds: int) -> Tensor:
    """Run rounds of Lloyd's iteration by Triton's kernel: one launch each, of 2^k programs.

    Args:
        in_order: at least one value.
        values: float64 [m], ascending: those to begin with, on the same device.
        rounds: how many.

    Returns:
        float64 [rounds + 1, 4, m]: of each round its values, then the counts, sums and sums of squares of what is
        nearest to each; the last has values only.
    """
    history = values.new_empty(rounds + 1, 4, len(values))
    history[0, 0] = values
    with on(values.device):
        for number in range(rounds):
            cut_at_midpoints[(len(values),)](
                in_order.values,
                in_order.before,
                history[number],
                history[number + 1],
                in_order.count,
                in_order.before.shape[1],
                in_order.count.bit_length(),
                len(values),
                CHUNK=CHUNK,
                HIGH_BITS=HIGH_BITS,
                LOW_BITS=LOW_BITS,
            )
    return history
