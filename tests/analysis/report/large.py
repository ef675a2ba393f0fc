"""A study of the paper's size, made by formula: models of four families, all data types, bits and block sizes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd

from kbit.spec import QuantSpec
from sweeps.results.frames import ZERO_SHOT


def specs() -> list[QuantSpec]:
    """Quantizations: some 200 of a model, as a study of the whole paper has them."""
    blocks = (64, 128, 256, 512, 1024, 2048, 4096, None)
    every = product(range(3, 9), ("int", "float", "dynamic", "quantile"), blocks)
    exponents = {"float": "paper"}
    return [
        QuantSpec(bits=16),
        *(QuantSpec(bits=b, dtype=d, blocksize=s, exponent_bits=exponents.get(d)) for b, d, s in every),
    ]


def large_study(models: int = 41, cells: int = 8118) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(wide, long) tables of so many cells, each with a text set and the paper's four tasks."""
    rng = np.random.default_rng(0)
    grid = specs()
    rows = []
    for n in range(cells):
        model, spec = n // (cells // models + 1), grid[n % len(grid)]
        repeat = (n % (cells // models + 1)) // len(grid)
        params = int(1.2e8 * 1.6 ** (model % 11))
        family = ("opt", "pythia", "bloom", "gpt2")[model // 11]
        nominal = spec.bits_per_param_nominal
        penalty = 0 if spec.is_baseline else 0.09 * 4.0 ** (4 - spec.bits) * rng.uniform(0.5, 2.0)
        loss = 3.2 - 0.09 * np.log(params / 1e8) + penalty + rng.normal(0, 0.002)
        acc = np.clip(0.72 - 0.12 * (loss - 2.5) + rng.normal(0, 0.01, 4), 0.2, 0.9)
        rows.append(
            {
                "key": f"{rng.integers(1 << 62):016x}" * 4,
                "sweep": "paper_all",
                "status": "done",
                "family": family,
                "model": f"{family}-{model}",
                "model_id": f"hub/{family}-{model}",
                "params": params,
                "method": spec.method,
                "label": spec.label + (f" rotation {repeat}" if repeat else ""),
                **{
                    name: getattr(spec, name, None)
                    for name in ("bits", "dtype", "blocksize", "exponent_bits", "scheme")
                },
                "rotation": repeat or None,
                "bits_per_param": nominal,
                "bits_per_param_nominal": nominal,
                "total_bits": params * nominal,
                "total_bits_nominal": params * nominal,
                "pile_cc_loss": loss,
                "pile_cc_loss_stderr": 0.01 + rng.uniform(0, 0.002),
                "pile_cc_perplexity": np.exp(loss),
                "pile_cc_bits_per_byte": loss / np.log(2) / 4.1,
                "pile_cc_status": "done",
                **{f"{t}_acc": round(a * 1000) / 1000 for t, a in zip(ZERO_SHOT, acc, strict=True)},
                **{f"{t}_acc_stderr": np.sqrt(a * (1 - a) / 999) for t, a in zip(ZERO_SHOT, acc, strict=True)},
                **{f"{t}_status": "done" for t in ZERO_SHOT},
                "zero_shot_mean": round(float(acc.mean()), 5),
                "commit": "0" * 40,
                "device": "cuda (H200)",
            }
        )
    wide = pd.DataFrame(rows).astype(dict.fromkeys(("bits", "blocksize", "exponent_bits", "rotation"), "Int64"))
    about = wide[["key", "status", "model", "commit", "device"]]
    evals = ("pile_cc", *ZERO_SHOT)
    long = pd.concat([about.assign(eval=e, limit=1000, measurement=about["key"] + e) for e in evals], ignore_index=True)
    return wide, long
