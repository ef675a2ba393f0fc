"""Studies with a planted truth: a cell's loss is a function of its model's size, its bits and its quantization."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np
import pandas as pd

from kbit.data_types import HEURISTIC_EXPONENT_BITS
from kbit.spec import QuantSpec, Spec, axes, spec_of

FAMILIES: Mapping[str, tuple[float, ...]] = {
    "opt": (125e6, 350e6, 1.3e9, 6.7e9),
    "pythia": (160e6, 410e6, 1.4e9, 6.9e9),
    "bloom": (560e6, 1.7e9, 7.1e9),
    "bloomz": (560e6, 1.7e9, 7.1e9),
}
Worse = Callable[[Spec, float], float]
"""Nats a token that a quantization of a model of some parameters adds to what its bits are worth."""


def paper_specs(precisions: Sequence[int]) -> list[Spec]:
    """A small study with a cell or two for every claim of the paper."""
    float_at = {b: HEURISTIC_EXPONENT_BITS[b] for b in precisions}
    specs: list[Spec] = [spec_of({"bits": 16})]
    for bits in precisions:
        specs += [_one(bits, dtype) for dtype in ("int", "float", "quantile", "dynamic")]
        specs += [_one(bits, "float", blocksize=1024)]
        specs += [QuantSpec(bits=bits, dtype="float", exponent_bits=e) for e in (float_at[bits] - 1,) if e >= 1]
    for bits in (3, 4):
        specs += [_one(bits, "float", outlier_fraction=0.02), _one(bits, "float", center=True)]
    gptq = {"method": "gptq", "dtype": "int", "zero_point": True, "scheme": "group"}
    specs += [spec_of({**gptq, "bits": 2, "blocksize": b}) for b in (64, 1024)]
    specs += [spec_of({**gptq, "bits": 3, "blocksize": b}) for b in ("row", 64)]
    return specs


def _one(bits: int, dtype: str, **more: object) -> Spec:
    exponent = {"exponent_bits": "heuristic"} if dtype == "float" else {}
    return spec_of({"bits": bits, "dtype": dtype, "blocksize": 64, **exponent, **more})


@cache
def frame(few: bool = False) -> tuple[pd.DataFrame, tuple[Spec, ...]]:
    """The cells without values, and each one's quantization; with ``few`` half the models and precisions."""
    rows, specs = [], []
    for family, sizes in FAMILIES.items():
        for params in sizes[-2:] if few else sizes:
            for spec in paper_specs((3, 4, 6) if few else range(3, 9)):
                nominal = 3.0 + 16 / 4096 if spec.axis_values().get("blocksize") == -1 else spec.bits_per_param_nominal
                total = params * (0.9 * nominal + 1.6)
                known = dict.fromkeys(axes()) | spec.axis_values()
                rows.append(
                    known
                    | {
                        "key": f"{family} {params:g} {spec.method} {spec.label}",
                        "status": "done",
                        "family": family,
                        "model": f"{params:g}",
                        "model_id": f"{family}-{params:g}",
                        "params": params,
                        "method": spec.method,
                        "label": spec.label,
                        "bits_per_param_nominal": nominal,
                        "total_bits": total,
                        "total_bits_nominal": total,
                    }
                )
                specs.append(spec)
    kinds = dict.fromkeys(("bits", "blocksize", "exponent_bits"), "Int64")
    return pd.DataFrame(rows).astype(kinds), tuple(specs)


def planted(
    rng: np.random.Generator,
    *,
    noise: float = 0.01,
    bend: float = 0.15,
    worse: Worse = lambda spec, params: 0.0,
    few: bool = False,
) -> pd.DataFrame:
    """A study in which bits of the whole model are worth the same however they are spent, but for ``worse``.

    The loss is a power law of total bits with exponent ``bend`` (0: a straight line in their logarithm), an offset for
    each family, ``worse`` of its quantization, and noise: independent by cell, as rounding's is.
    """
    df, specs = frame(few)
    doublings = np.log2(df["total_bits"].to_numpy(dtype=float) / 1e10)
    curve = -0.15 * doublings if bend == 0 else np.exp2(-bend * doublings)
    offsets = dict(zip(FAMILIES, rng.normal(2.5, 0.2, len(FAMILIES)), strict=True))
    extra = [worse(s, p) for s, p in zip(specs, df["params"], strict=True)]
    loss = curve + df["family"].map(offsets).to_numpy(dtype=float) + extra + rng.normal(0, noise, len(df))
    return df.assign(text_loss=loss, text_loss_stderr=0.02)
