"""A cost model that knows what measurements take, from rows as a store has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sweeps.plan.cost import CostModel
from sweeps.study.cell import ModelRef


def row(model: ModelRef, name: str, limit: int | None, seconds: float, **changes: Any) -> dict[str, Any]:
    """A stored row of a quantized cell, which took next to nothing to quantize."""
    about = {"model": model.label, "params": model.params, "eval": name, "limit": limit, "seconds": seconds}
    cell = {"key": f"{model.label} {name}", "method": "blockwise", "label": "int3 b64", "bits": 3, "dtype": "int"}
    settings = {"eval_kind": "perplexity", "window": 512, "num_fewshot": 0, "compute_dtype": "float32"}
    ran = {"launch": "l", "n_tokens": 1000, "quantize_seconds": 1e-9, "load_seconds": None, "device": "cpu (x86_64)"}
    return {**about, **cell, **settings, **ran, "finished": "2026-01-01", **changes}


def cost_of(seconds: Mapping[tuple[str, str, int | None], float], models: Iterable[ModelRef]) -> CostModel:
    """A cost model of evaluations by model, name and limit; quantizing costs next to nothing."""
    known = {model.label: model for model in models}
    rows = [row(known[model], name, limit, s) for (model, name, limit), s in seconds.items()]
    return CostModel.from_rows(rows, "cpu")
