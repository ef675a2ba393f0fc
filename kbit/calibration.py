"""The calibration data of a method, part of a cell's identity: which data, and how much. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from kbit.compute_dtypes import COMPUTE_DTYPES
from kbit.errors import SpecError
from kbit.sources import Source

MOST: Final = 2**40
WINDOWS_PER_BATCH: Final = 8
"""Windows that run at once: at 2,048 tokens about 16,000, as many as an evaluation's batch."""
CALIBRATION_VERSION: Final = "1"
"""Of how windows are cut and drawn. Raised when a number would change."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Calibration data: `samples` windows of `length` tokens, drawn from a text set.

    Attributes:
        dataset: what identifies the text set: a hub id and commit, or a file's hash.
        samples: windows.
        length: tokens per window, cut to the model's context.
        seed: of the draw.
        compute_dtype: of the arithmetic; 'storage' is the checkpoint's own 16 bits, on every device.
        version: of how windows are cut and drawn.
        name: what people call the text set; not identity.
        source: where it lies; not identity.

    Raises:
        SpecError: a value that is not allowed.
    """

    dataset: str
    samples: int = 128
    length: int = 2048
    seed: int = 0
    compute_dtype: str = "storage"
    version: str = CALIBRATION_VERSION
    name: str = field(default="", compare=False)
    source: Source | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for key, least in (("samples", 1), ("length", 2), ("seed", 0)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
                raise SpecError(f"calibration.{key}", value, f"a whole number of at least {least} (and at most 2^40)")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise SpecError("calibration.compute_dtype", self.compute_dtype, "one of " + ", ".join(COMPUTE_DTYPES))

    def with_seed(self, seed: int) -> Calibration:
        """Return the same but for the draw."""
        return replace(self, seed=seed)

    def canonical(self) -> Mapping[str, Any]:
        """Return what belongs to the identity of a cell, as plain JSON values."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.compare}

    def length_in(self, context: int | None) -> int:
        """Return the tokens of a window of a model with this context; None where that is unknown."""
        return self.length if context is None else min(self.length, context)

    @property
    def label(self) -> str:
        """Words that tell calibrations apart: 'c4 128x2048 seed 0'."""
        dtype = "" if self.compute_dtype == "storage" else f" {self.compute_dtype}"
        return f"{self.name or self.dataset[:20]} {self.samples}x{self.length} seed {self.seed}{dtype}"
