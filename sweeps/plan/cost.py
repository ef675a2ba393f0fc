"""Predict the cost of a measurement: seconds by the median of finished ones like it, else by counting operations.

The count is the textbook's: a forward pass takes 2 operations a parameter and token. The rates are what such passes
reach in practice, not peaks; they only have to be right within a factor of two, since finished cells replace them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from kbit.doors import load
from kbit.evaluation.evaluators import EVALUATORS
from sweeps.store.schema import Row
from sweeps.study.cell import Measurement, ModelRef

OPERATIONS_PER_SECOND: Final = {"cpu": 8e10, "cuda": 3e14}
"""A core of a server's CPU in float32; an H100-class GPU in 16 bits: 1.5e14 at 160 million parameters, 4.5e14 at 1.3
billion, 5e14 at 6.7 billion, measured.
"""
QUANTIZE_PER_SECOND: Final = {"cpu": 2e7, "cuda": 3e10}
"""Weights quantized and dequantized a second. On a GPU 1e11 beside their originals and 3e10 from page-locked memory,
measured; fitted data types take longer the first time.
"""
LOAD_BYTES_PER_SECOND: Final = 5e8
SECONDS_PER_MEASUREMENT: Final = {"cpu": 0.2, "cuda": 1.0}
"""Whatever the size: scheduling, writing, small kernels."""


def tokens_of(measurement: Measurement) -> int:
    """Predict how many tokens go through the model."""
    tokens: int = load(EVALUATORS[measurement.eval.kind].tokens)(measurement.eval)
    return tokens


def load_seconds(model: ModelRef) -> float:
    return 2 * (model.params or 0) / LOAD_BYTES_PER_SECOND + 1.0


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Predicts seconds; learns from the store's rows."""

    device: str
    history: Mapping[tuple[str, str, int | None], float] = field(default_factory=dict)

    @classmethod
    def from_rows(cls, rows: Iterable[Row], device: str) -> CostModel:
        """Learn from finished rows (columns model, eval, limit, seconds, quantize_seconds, device) of a device kind."""
        seconds: dict[tuple[str, str, int | None], list[float]] = {}
        for row in rows:
            on_cpu = str(row["device"] or "").startswith("cpu")
            if row["seconds"] is not None and on_cpu == (device == "cpu"):
                total = row["seconds"] + (row["quantize_seconds"] or 0.0)
                seconds.setdefault((row["model"], row["eval"], row["limit"]), []).append(total)
        return cls(device=device, history={k: median(v) for k, v in seconds.items()})

    def seconds(self, measurement: Measurement) -> float:
        """Quantizing (once per measurement, on the safe side) and evaluating."""
        model, spec = measurement.cell.model, measurement.eval
        known = self.history.get((model.label, spec.name, spec.limit))
        if known is not None:
            return known
        params = model.params or 1_000_000_000
        forward = 2.0 * params * tokens_of(measurement) / OPERATIONS_PER_SECOND[self.device]
        quantize = 0.0 if measurement.cell.quant.is_baseline else params / QUANTIZE_PER_SECOND[self.device]
        return forward + quantize + SECONDS_PER_MEASUREMENT[self.device]
