"""Spec of AWQ: weights scaled by the magnitude of their inputs before rounding (Lin et al. 2023). Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, Self

from kbit.axes import axes_of, like
from kbit.data_types import data_type
from kbit.errors import SpecError
from kbit.specs.base import ROW
from kbit.specs.blockwise import QuantSpec

SEARCH_BYTES: Final = 40
"""Of a weight: ten copies in float32. A search that clips was seen to need 27, and 36 where two layers share inputs."""
QUANTILE_BYTES: Final = 54
FITTED_BYTES: Final = 84
"""The same where each scaled weight gets a codebook of its own: 49 by quantiles and 76 by Lloyd's rounds were seen."""


@dataclass(frozen=True, kw_only=True)
class AwqSpec(QuantSpec):
    """AWQ with any codebook of block-wise quantization, or integers with zero points. Its blocks are of a row.

    Attributes:
        scheme: 'group'.
        blocksize: columns that share an absmax, or 'row'.
        clip: each group's largest magnitude is the best of ten by the error of its part of the output; on by default.

    Raises:
        SpecError: an axis has a value that is not allowed.
    """

    method_name: ClassVar[str] = "awq"
    runs: ClassVar[str] = "kbit.methods.awq:quantize_layers"
    calibrates: ClassVar[bool] = True
    calibrates_on: ClassVar[Literal["original", "quantized"] | None] = "original"
    packs: ClassVar[bool] = False
    effort: ClassVar[float] = 60.0
    passes: ClassVar[float] = 84.0
    product_bytes: ClassVar[int] = 4
    takes: ClassVar[frozenset[str]] = frozenset({"clip"})
    refuses: ClassVar[Mapping[str, str]] = {
        "center": "scaled weights have another mean",
        "outlier_fraction": "inputs that matter are scaled instead",
    }

    scheme: str = like(QuantSpec, "scheme", "group")
    clip: bool = like(QuantSpec, "clip", True)

    def _validate(self) -> None:
        super()._validate()
        if self.is_baseline:
            return
        of = "with method=awq"
        if self.scheme != "group":
            raise SpecError("scheme", self.scheme, f"group {of}: a block of the flattened tensor spans rows")
        if self.blocksize is None:
            raise SpecError("blocksize", None, f"row, or a whole number of at least 1, {of}: blocks are of a row")

    @classmethod
    def from_canonical(cls, values: Mapping[str, Any]) -> Self:
        return super().from_canonical({"clip": False, **values})  # a later axis at its neutral value is in no key

    def working_bytes(self, hidden: int, inner: int) -> int:
        """The products of one block's inputs within groups, and what the largest layer is scaled and clipped with."""
        is_fitted = not self.is_baseline and data_type(str(self.dtype), self.codebook).data_dependent
        of_weight = (QUANTILE_BYTES if self.dtype == "quantile" else FITTED_BYTES) if is_fitted else SEARCH_BYTES
        largest = of_weight * hidden * max(inner, 3 * hidden)
        if not self.clip or self.blocksize is None:
            return largest
        of_hidden, of_inner = (
            width * (width if self.blocksize == ROW else min(width, self.blocksize)) for width in (hidden, inner)
        )
        return largest + 4 * (3 * of_hidden + of_inner)

    def blockwise(self) -> QuantSpec:
        """Return the spec of what is stored of a layer's scaled and clipped weight."""
        return QuantSpec(**{name: getattr(self, name) for name in axes_of(QuantSpec)} | {"clip": False})
