"""Spec of block-scaled floats: the MX formats (OCP Microscaling 1.0) and NVFP4. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from kbit.axes import axis
from kbit.errors import SpecError
from kbit.specs.base import Spec

SCALE_BITS: Final = 8
"""Of a block's scale: E8M0 (MX) or E4M3 (NVFP4)."""
TENSOR_SCALE_BITS: Final = 32
SCALE_ROUNDINGS: Final = ("floor", "ceil")


@dataclass(frozen=True, kw_only=True)
class ElementFormat:
    """A format of elements, each a sign, `exponent_bits` and `fraction_bits`, and of what scales a block of them.

    Attributes:
        exponent_bits, fraction_bits: with gradual underflow, without infinities; the bias is 2^(exponent_bits - 1) - 1.
        largest: the largest magnitude. Codes beyond it are not used (NaN and infinities of the 8-bit formats).
        block: values of a row that share a scale.
        tensor_scaled: a block's scale is E4M3 under one float32 scale of the tensor (NVFP4); else E8M0, a power of two.
    """

    exponent_bits: int
    fraction_bits: int
    largest: float
    block: int = 32
    tensor_scaled: bool = False

    @property
    def bits(self) -> int:
        """Bits of an element."""
        return 1 + self.exponent_bits + self.fraction_bits

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    def magnitudes(self) -> list[float]:
        """Return the magnitudes by code, ascending, up to the largest; the sign is the bit above these codes."""
        steps = 2**self.fraction_bits
        values = [m / steps * 2.0 ** (1 - self.bias) for m in range(steps)]
        values += [
            (1 + m / steps) * 2.0 ** (e - self.bias) for e in range(1, 2**self.exponent_bits) for m in range(steps)
        ]
        return [v for v in values if v <= self.largest]


FORMATS: Final[Mapping[str, ElementFormat]] = {
    "mxfp4": ElementFormat(exponent_bits=2, fraction_bits=1, largest=6.0),
    "nvfp4": ElementFormat(exponent_bits=2, fraction_bits=1, largest=6.0, block=16, tensor_scaled=True),
    "mxfp6_e2m3": ElementFormat(exponent_bits=2, fraction_bits=3, largest=7.5),
    "mxfp6_e3m2": ElementFormat(exponent_bits=3, fraction_bits=2, largest=28.0),
    "mxfp8_e4m3": ElementFormat(exponent_bits=4, fraction_bits=3, largest=448.0),
    "mxfp8_e5m2": ElementFormat(exponent_bits=5, fraction_bits=2, largest=57344.0),
}
"""The formats by name (OCP Microscaling Formats 1.0, section 5.3; NVIDIA's NVFP4)."""


@dataclass(frozen=True, kw_only=True)
class BlockFloatSpec(Spec):
    """Floats of 4, 6 or 8 bits under a scale for each block of a row.

    Attributes:
        bits: of an element, which the format decides; another number is refused.
        format: a name in ``FORMATS``.
        scale_rounding: of MX formats: a block's scale is 2 to the power of floor(log2 absmax) (OCP: what is then beyond
            the largest element saturates) or ceil(log2 absmax) (nothing saturates), less the exponent of the largest
            element. None for nvfp4, whose scale is rounded to nearest.

    Raises:
        SpecError: an axis has a value that is not allowed.
    """

    method_name: ClassVar[str] = "block_float"
    runs: ClassVar[str] = "kbit.methods.block_float:quantize_layers"
    packs: ClassVar[bool] = True

    bits: int = axis(0, type="int64", doc="bits per code", unit="bit")
    format: str = axis(type="string", doc="of a block-scaled float: " + ", ".join(FORMATS), since=3)
    scale_rounding: str | None = axis(
        None,
        type="string",
        doc="of the scales of an MX format: floor or ceil",
        neutral="floor",
        since=3,
        optional=True,
        label="scale-{}",
    )

    def __post_init__(self) -> None:
        if not isinstance(self.format, str) or self.format not in FORMATS:
            raise SpecError("format", self.format, "one of " + ", ".join(FORMATS))
        element = self.element
        if isinstance(self.bits, bool) or self.bits not in (0, element.bits):
            allowed = f"{element.bits}, the bits of format={self.format}: leave it out, or choose another format"
            raise SpecError("bits", self.bits, allowed)
        if self.scale_rounding is not None and self.scale_rounding not in SCALE_ROUNDINGS:
            raise SpecError("scale_rounding", self.scale_rounding, "one of " + ", ".join(SCALE_ROUNDINGS))
        if element.tensor_scaled and self.scale_rounding == "ceil":
            allowed = (
                f"leave it out with format={self.format}, whose scales are rounded to nearest: only MX formats have it"
            )
            raise SpecError("scale_rounding", self.scale_rounding, allowed)
        object.__setattr__(self, "bits", element.bits)
        rounding = None if element.tensor_scaled else self.scale_rounding or "floor"
        object.__setattr__(self, "scale_rounding", rounding)

    @property
    def element(self) -> ElementFormat:
        """The format's elements and blocks."""
        return FORMATS[self.format]

    @property
    def bits_per_param_nominal(self) -> float:
        """Bits of an element and its part of the block's scale: 4.25 (mxfp4), 4.5 (nvfp4), 6.25, 8.25."""
        return self.bits + SCALE_BITS / self.element.block

    @property
    def label(self) -> str:
        return " ".join([self.format, *self._words("bits", "format")])
