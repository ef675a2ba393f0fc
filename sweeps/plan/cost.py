"""What a measurement will cost: seconds by the median of finished ones like it, else by counting operations.

The count is the textbook's: a forward pass takes 2 operations a parameter and token. The rates are what such passes
reach in practice, not peaks; they only have to be right within a factor of two, since finished cells replace them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from sweeps.store.schema import Row
from sweeps.study.cell import Measurement, ModelRef

OPERATIONS_PER_SECOND: Final = {"cpu": 2e10, "cuda": 1.5e14}
"""A core of a CPU in float32; an H100-class GPU in 16 bits."""
QUANTIZE_PER_SECOND: Final = {"cpu": 2e7, "cuda": 2e9}
"""Weights quantized and dequantized a second."""
LOAD_BYTES_PER_SECOND: Final = 5e8
SECONDS_PER_MEASUREMENT: Final = {"cpu": 0.2, "cuda": 1.0}
"""Whatever the size: scheduling, writing, small kernels."""

TEXT_TOKENS: Final = 2_000_000
"""Of a text set without a limit, where its size is not known before it is read."""
TASK_TOKENS: Final = {
    # documents x continuations x tokens of context and continuation, of the full sets
    "lambada_openai": (5153, 90),
    "piqa": (1838, 2 * 40),
    "hellaswag": (10042, 4 * 110),
    "winogrande": (1267, 2 * 30),
}
OTHER_TASK: Final = (5000, 300)
BYTES_PER_TOKEN: Final = 3.5
REPEATED: Final = 2.0
"""A task's file goes through the model about twice: the context is repeated for each continuation."""


def tokens_of(measurement: Measurement) -> int:
    """About how many tokens go through the model."""
    spec = measurement.eval
    size, documents = spec.source.get("bytes"), spec.source.get("documents")
    if spec.kind == "perplexity":
        whole = int(size / BYTES_PER_TOKEN) if size else TEXT_TOKENS
        return min(spec.limit or whole, whole)
    if size and documents:
        each = size / documents / BYTES_PER_TOKEN * REPEATED
    else:
        documents, each = TASK_TOKENS.get(spec.name, OTHER_TASK)
    return int((min(spec.limit, documents) if spec.limit else documents) * each)


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
        """Quantizing (once a measurement, on the safe side) and evaluating."""
        model, spec = measurement.cell.model, measurement.eval
        known = self.history.get((model.label, spec.name, spec.limit))
        if known is not None:
            return known
        params = model.params or 1_000_000_000
        forward = 2.0 * params * tokens_of(measurement) / OPERATIONS_PER_SECOND[self.device]
        quantize = 0.0 if measurement.cell.quant.is_baseline else params / QUANTIZE_PER_SECOND[self.device]
        return forward + quantize + SECONDS_PER_MEASUREMENT[self.device]
