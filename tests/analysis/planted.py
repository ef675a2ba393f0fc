"""Cells that follow a law exactly, up to noise that a test chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

SIZES = (70e6, 160e6, 410e6, 1e9, 1.4e9, 2.8e9, 6.9e9, 12e9)
QUANTIZED = 0.8
"""Share of the parameters that is quantized."""


def planted(
    loss: Callable[[float, float, float], float],
    *,
    sizes: Sequence[float] = SIZES,
    tokens: Sequence[float] = (float("nan"),),
    bits: Sequence[int] = (3, 4, 5, 6, 8),
    noise: Callable[[], float] = lambda: 0.0,
) -> pd.DataFrame:
    """``LawPoints.cells`` with a loss of (parameters, tokens, bits a weight), and noise added to quantized ones."""
    rows = []
    for i, size in enumerate(sizes):
        for d in tokens:
            base = loss(size, d, 16.0)
            for k in (16, *bits):
                p = 16.0 if k == 16 else k + 0.25
                value = base if k == 16 else loss(size, d, p) + noise()
                rows.append(
                    {
                        **{"key": f"{i} {d} {k}", "family": "p", "curve": f"p@{d}", "model": f"m{i}"},
                        **{"checkpoint": None, "params": size, "quantized": QUANTIZED * size, "tokens": d, "bits": k},
                        **{"bits_per_param": p, "total_bits": size * (QUANTIZED * p + (1 - QUANTIZED) * 16)},
                        **{"value": value, "stderr": np.nan, "baseline": base, "change": value - base},
                        "diverged": False,
                    }
                )
    return pd.DataFrame(rows)


def sixteen(size: float, tokens: float) -> float:
    """A loss of 16-bit models, Chinchilla's form."""
    return 1.7 + 400 / size**0.34 + (0.0 if np.isnan(tokens) else 1000 / tokens**0.3)


def ouyang(size: float, tokens: float, p: float, scale: float = 1.0) -> float:
    """A loss with ΔL = k D^0.525 / (N^0.226 P^5.497) nats added, of N without embeddings."""
    if p == 16:
        return sixteen(size, tokens)
    d = 1.0 if np.isnan(tokens) else (tokens / 1e9) ** 0.525
    return sixteen(size, tokens) + scale * 50 * d * (QUANTIZED * size / 1e9) ** -0.226 * p**-5.497
