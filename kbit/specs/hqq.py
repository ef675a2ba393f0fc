"""Spec of HQQ: half-quadratic quantization, whose zero points are optimised without data. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from kbit.axes import axes_of, axis, like
from kbit.data_types import MAX_BITS, MIN_BITS
from kbit.errors import SpecError
from kbit.specs.base import LARGEST_NUMBER, ROW, Spec
from kbit.specs.blockwise import QuantSpec

SCALE_AND_ZERO_BITS: Final = 32
"""Of a group: a float16 scale and a float16 zero point."""


@dataclass(frozen=True, kw_only=True)
class HqqSpec(Spec):
    """Integers from 0 to 2^bits - 1 with a scale and an optimised zero point for each group of a row.

    Attributes:
        bits: 2 to 8.
        blocksize: values of a row that share a scale and a zero point; 'row' (``kbit.spec.ROW``) is each whole row.

    Raises:
        SpecError: an axis has a value that is not allowed.
    """

    method_name: ClassVar[str] = "hqq"
    runs: ClassVar[str] = "kbit.methods.hqq:quantize_layers"
    packs: ClassVar[bool] = True
    effort: ClassVar[float] = 20.0

    bits: int = axis(type="int64", doc="bits per code", unit="bit")
    blocksize: int = like(QuantSpec, "blocksize", 64)

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocksize", axes_of(HqqSpec)["blocksize"].number(self.blocksize))
        for name, least, most, allowed in (
            ("bits", MIN_BITS, MAX_BITS, f"a whole number from {MIN_BITS} to {MAX_BITS}"),
            (
                "blocksize",
                1,
                LARGEST_NUMBER,
                "a whole number of at least 1 (and at most 2^40), or row: groups lie in rows",
            ),
        ):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int)
                or not (least <= value <= most or (name, value) == ("blocksize", ROW))
            ):
                raise SpecError(name, value, allowed)

    @property
    def bits_per_param_nominal(self) -> float:
        """Bits of a code and its part of the group's scale and zero point."""
        return self.bits + (0.0 if self.nominal_by_layer else SCALE_AND_ZERO_BITS / self.blocksize)

    @property
    def nominal_by_layer(self) -> bool:
        return self.blocksize == ROW

    def nominal_bits(self, in_features: int) -> float:
        return self.bits + SCALE_AND_ZERO_BITS / (in_features if self.nominal_by_layer else self.blocksize)

    def blockwise(self, in_features: int) -> QuantSpec:
        """Return the spec of a layer's codes: integers with zero points, which HQQ's own are but for their place."""
        return QuantSpec(bits=self.bits, dtype="int", scheme="group", blocksize=self.blocksize, zero_point=True).of_row(
            in_features
        )

    @property
    def label(self) -> str:
        return f"hqq{self.bits} {'row' if self.nominal_by_layer else f'g{self.blocksize}'}"
