"""A demo-shaped study made by formula, for the tests of ``analysis``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.significance import Samples
from kbit.data_types import HEURISTIC_EXPONENT_BITS
from kbit.spec import QuantSpec

MODELS = {"neox-xs": (728928, 331776, 3.74), "neox-s": (1892800, 1228800, 3.46), "neox-m": (5787648, 4718592, 3.21)}
"""Parameters, of which quantized, and 16-bit loss."""
DTYPE_PENALTY = {"int": 1.0, "float": 0.62, "dynamic": 1.45, "quantile": 0.55, "normal": 0.5}
BLOCK_PENALTY = {16: 0.6, 64: 1.0, 256: 1.5, 1024: 2.2, 4096: 3.1, None: 5.0}
WINDOWS, TOKENS, DOCUMENTS = 24, 511, 100


@dataclass(frozen=True, kw_only=True)
class Study:
    wide: pd.DataFrame
    long: pd.DataFrame
    samples: dict[tuple[str, str], Samples]


def demo_specs() -> list[QuantSpec]:
    specs = [QuantSpec(bits=16)]
    for bits in range(3, 9):
        for dtype in ("int", "float", "dynamic", "quantile"):
            exponent = HEURISTIC_EXPONENT_BITS[bits] if dtype == "float" else None
            specs.append(QuantSpec(bits=bits, dtype=dtype, exponent_bits=exponent))
    for bits in (3, 4):
        specs += [
            QuantSpec(bits=bits, dtype=d, blocksize=b) for d in ("int", "quantile") for b in (16, 256, 1024, 4096)
        ]
        specs.append(QuantSpec(bits=bits, dtype="float", exponent_bits="heuristic", outlier_fraction=0.02))
    return specs


def loss_increase(model: str, spec: QuantSpec) -> float:
    """Expected nats a token over 16 bits: falls fourfold a bit, grows with the block size."""
    if spec.is_baseline:
        return 0.0
    fragile = {"neox-xs": 0.8, "neox-s": 1.0, "neox-m": 1.25}.get(model, 1.0)
    increase = (
        0.085 * fragile * 4.0 ** (4 - spec.bits) * DTYPE_PENALTY[spec.dtype or ""] * BLOCK_PENALTY[spec.blocksize]
    )
    return increase * (0.9 if spec.outlier_fraction else 1.0)


def make_study(
    models: dict[str, tuple[int, int, float]] = MODELS, specs: list[QuantSpec] | None = None, family: str = "neox"
) -> Study:
    rng = np.random.default_rng(0)
    texts = rng.normal(0, 0.22, WINDOWS)
    wide, long, samples = [], [], {}
    for model, (params, quantized, base) in models.items():
        for spec in specs or demo_specs():
            key = f"{model} {spec.label}"
            nats = TOKENS * (
                base
                + texts
                + loss_increase(model, spec) * (1 + rng.normal(0, 0.15, WINDOWS))
                + rng.normal(0, 1e-3, WINDOWS)
            )
            outcome = {"nats": nats.astype(np.float32), "tokens": np.full(WINDOWS, TOKENS, dtype=np.int32)}
            samples[key, "jargon"] = outcome
            numbers = {"jargon": _perplexity(outcome), **_accuracies(rng, base + loss_increase(model, spec))}
            cell = _cell(family, model, params, quantized, spec, key)
            flat = {f"{e}_{m}": x for e, (values, _) in numbers.items() for m, x in values.items()}
            flat |= {f"{e}_{m}_stderr": x for e, (_, errors) in numbers.items() for m, x in errors.items()}
            wide.append(cell | flat | {"zero_shot_mean": np.nan, "seconds": 1.0})
            long += [cell | _measurement(key, e, values, errors) for e, (values, errors) in numbers.items()]
    kinds = dict.fromkeys(("params", "bits", "blocksize", "exponent_bits"), "Int64")
    return Study(
        wide=pd.DataFrame(wide).astype(kinds),
        long=pd.DataFrame(long).astype(kinds | {"limit": "Int64"}),
        samples=samples,
    )


def diverge(study: Study, keys: pd.Series) -> Study:
    """The same study with some cells diverged: their loss isn't finite, their accuracies are at chance."""
    wide = study.wide.copy()
    wide.loc[keys, "status"] = "diverged"
    wide.loc[keys, ["jargon_loss", "jargon_perplexity", "jargon_bits_per_byte", "jargon_loss_stderr"]] = np.nan
    return replace(study, wide=wide)


def _perplexity(outcome: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    loss = float(outcome["nats"].sum(dtype=np.float64) / outcome["tokens"].sum())
    error = float((outcome["nats"] / TOKENS).std(ddof=1) / np.sqrt(WINDOWS))
    metrics = {"loss": loss, "perplexity": float(np.exp(loss)), "bits_per_byte": loss / np.log(2) / 2.9}
    return metrics, {
        "loss": error,
        "perplexity": metrics["perplexity"] * error,
        "bits_per_byte": error / np.log(2) / 2.9,
    }


def _accuracies(rng: np.random.Generator, loss: float) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    word, choice = (
        rng.binomial(DOCUMENTS, 0.3 - 0.05 * (loss - 3)) / DOCUMENTS,
        rng.binomial(50, 0.45 - 0.05 * (loss - 3)) / 50,
    )
    error = {"acc": float(np.sqrt(choice * (1 - choice) / 49))}
    return {
        "jargon_lastword": (
            {"acc": word, "perplexity": float(np.exp(loss + 1))},
            {"acc": float(np.sqrt(word * (1 - word) / (DOCUMENTS - 1))), "perplexity": 5.0},
        ),
        "jargon_choice": ({"acc": choice, "acc_norm": choice}, error | {"acc_norm": error["acc"]}),
    }


def _cell(family: str, model: str, params: int, quantized: int, spec: QuantSpec, key: str) -> dict[str, Any]:
    nominal = spec.bits_per_param_nominal
    total = quantized * nominal + (params - quantized) * 16
    return {
        "key": key,
        "sweep": "demo",
        "status": "done",
        "family": family,
        "model": model,
        "model_id": f"local/{model}",
        "revision": None,
        "weights_hash": f"sha256:{model}",
        "params": params,
        "method": spec.method,
        "bits": spec.bits,
        "dtype": spec.dtype,
        "blocksize": spec.blocksize,
        "scheme": None if spec.is_baseline else spec.scheme,
        "exponent_bits": spec.exponent_bits,
        "subnormals": spec.subnormals,
        "dynamic_interval": spec.dynamic_interval,
        "absmax_dtype": None if spec.is_baseline else spec.absmax_dtype,
        "center": spec.center,
        "outlier_fraction": spec.outlier_fraction,
        "label": spec.label,
        "bits_per_param": nominal + (0.001 if spec.dtype == "quantile" else 0.0),
        "bits_per_param_nominal": nominal,
        "total_bits": total + (100 if spec.dtype == "quantile" else 0),
        "total_bits_nominal": total,
    }


def _measurement(key: str, eval_name: str, metrics: dict[str, float], errors: dict[str, float]) -> dict[str, Any]:
    perplexity = eval_name == "jargon"
    return {
        "measurement": f"{key}|{eval_name}",
        "eval": eval_name,
        "eval_kind": "perplexity" if perplexity else "task",
        "eval_version": "1",
        "num_fewshot": 0,
        "window": 512 if perplexity else None,
        "limit": 12000 if perplexity else 100,
        "dataset": f"sha256:{eval_name}",
        "compute_dtype": "float32",
        "metrics": metrics,
        "stderr": errors,
    }
