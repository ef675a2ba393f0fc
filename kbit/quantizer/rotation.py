"""Random rotations of a weight's input dimensions: W H^T, and the way back (QuaRot, Ashkboos et al. 2024, section 3).

H is orthogonal: random signs of the inputs, then the same Hadamard matrix in each run of n of them, where n is the
largest power of two that divides their number. Outliers of a few inputs are spread over n. All is additions in one
order and a multiplication in float32, so that every device gives the same.
"""

from __future__ import annotations

from functools import lru_cache
from math import sqrt

import numpy as np
import torch
from torch import Tensor


def rotate(values: Tensor, seed: int) -> Tensor:
    """Return values H^T: the rotation of the last dimension.

    Args:
        values: float32 [..., in_features]; not changed.
        seed: of the signs.
    """
    return _hadamard(values * _signs(values.shape[-1], seed, values.device))


def rotate_back(values: Tensor, seed: int) -> Tensor:
    """Return values H, the inverse of ``rotate``; as its argument float32 [..., in_features]."""
    return _hadamard(values) * _signs(values.shape[-1], seed, values.device)


def rotated_run(in_features: int) -> int:
    """Return how many inputs are mixed with one another: the largest power of two that divides their number."""
    return in_features & -in_features


@lru_cache(maxsize=64)
def _signs(length: int, seed: int, device: torch.device) -> Tensor:
    """Return 1 or -1 per input, float32; the same for all layers of a width. Not to be changed."""
    drawn = np.random.default_rng(seed).integers(0, 2, size=length)
    return torch.from_numpy((2 * drawn - 1).astype(np.float32)).to(device)


def _hadamard(values: Tensor) -> Tensor:
    """Multiply each run of n values by the Hadamard matrix over sqrt(n), which is its own inverse; a fresh tensor."""
    size = rotated_run(values.shape[-1])
    mixed, half = values.contiguous().clone(), 1
    while half < size:
        pairs = mixed.view(-1, 2, half)
        above, below = pairs[:, 0], pairs[:, 1]
        difference = above - below
        above += below
        below.copy_(difference)
        half *= 2
    return mixed.mul_(1 / sqrt(size))
