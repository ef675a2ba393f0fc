"""Spec of LLM.int8(): 8-bit weights and activations, with outlier dimensions in 16 bits. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from kbit.axes import axis
from kbit.errors import SpecError
from kbit.specs.base import Spec

BITS: Final = 8
SCALE_BITS: Final = 16
"""Of an output row's float16 absmax."""
THRESHOLD: Final = 6.0
"""Magnitude from which an input dimension is an outlier (Dettmers et al. 2022, section 3.2)."""


@dataclass(frozen=True, kw_only=True)
class LlmInt8Spec(Spec):
    """int8 weights with a scale per output row, int8 activations with a scale per token, outlier dimensions in 16 bits.

    Attributes:
        bits: 8.
        threshold: an input dimension in which a sequence reaches this magnitude is multiplied in 16 bits for that
            sequence.

    Raises:
        SpecError: an axis has a value that is not allowed.
    """

    method_name: ClassVar[str] = "llm_int8"
    runs: ClassVar[str] = "kbit.methods.llm_int8:quantize_layers"
    packs: ClassVar[bool] = True
    replaces_layers: ClassVar[bool] = True

    bits: int = axis(BITS, type="int64", doc="bits per code", unit="bit")
    threshold: float = axis(
        THRESHOLD,
        type="float64",
        doc="magnitude from which an input dimension is multiplied in 16 bits; of llm_int8",
        since=3,
        neutral=THRESHOLD,
        optional=True,
        label="threshold {:.12g}",
    )

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits != BITS:
            raise SpecError("bits", self.bits, f"{BITS} with method=llm_int8: leave it out")
        value = self.threshold
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise SpecError("threshold", value, f"a number above 0; {THRESHOLD:g} is the paper's")
        object.__setattr__(self, "threshold", float(value))

    @property
    def bits_per_param_nominal(self) -> float:
        """Bits of a code; a row's scale is counted by layer."""
        return float(BITS)

    @property
    def nominal_by_layer(self) -> bool:
        return True

    def nominal_bits(self, in_features: int) -> float:
        return BITS + SCALE_BITS / in_features

    @property
    def why_not_layered(self) -> str:
        return "its layers quantize what they are given, which such a pass does not do"

    @property
    def label(self) -> str:
        return " ".join(["llm_int8", *self._words("bits")])
