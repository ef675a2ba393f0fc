"""Spec of models that others quantized: what is stored of them is counted, nothing is quantized. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from kbit.axes import axis
from kbit.data_types import MAX_BITS, MIN_BITS
from kbit.errors import SpecError
from kbit.specs.base import Spec

STORED_BITS: Final = "stored_bits"
"""The key of config.json under which python -m kbit.gguf leaves the bits of each quantized layer, and loading does."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSpec(Spec):
    """A model as its files have it: by ``python -m kbit.gguf``, or of a layout of ``kbit.models.prequantized``.

    Attributes:
        bits: of most codes, 2 to 8: what figures and tables name the cell by. Bits are counted from the files.

    Raises:
        SpecError: bits that are not allowed.
    """

    method_name: ClassVar[str] = "checkpoint"
    runs: ClassVar[str] = "kbit.methods.checkpoint:count_layers"
    effort: ClassVar[float] = 0.1
    measures_stored: ClassVar[bool] = True

    bits: int = axis(type="int64", doc="bits per code", unit="bit")

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not MIN_BITS <= self.bits <= MAX_BITS:
            allowed = f"{MIN_BITS} to {MAX_BITS}, the bits of most of the file's codes (4 for Q4_K_M, or for nf4)"
            raise SpecError("bits", self.bits, allowed)

    @property
    def bits_per_param_nominal(self) -> float:
        """The bits of most codes: scales are the file's affair."""
        return float(self.bits)

    @property
    def why_not_packed(self) -> str:
        return "the file's values are dequantized as they are read, and its codes are not held in k bits"

    @property
    def why_not_layered(self) -> str:
        return "method=checkpoint counts embedding and head too, which all cells share in such a pass"

    @property
    def label(self) -> str:
        """A short name for people: 'as stored, 4-bit'."""
        return f"as stored, {self.bits}-bit"
