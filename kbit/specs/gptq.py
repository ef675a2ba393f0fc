"""The spec of GPTQ: rounding that corrects the columns to come (Frantar et al. 2022). Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, get_args

from kbit.axes import axes_of, axis, like
from kbit.data_types import data_type
from kbit.errors import SpecError
from kbit.specs.base import ROW
from kbit.specs.blockwise import QuantSpec

FIT_BYTES: Final = 50
"""Of a weight, that fitting a codebook takes: 46 by Lloyd's rounds were seen."""
GroupScales = Literal["fresh", "reference"]
LAZY_COLUMNS: Final = 128
"""Columns that are corrected at once; the rest of the weight is corrected after each so many (section 3, "Lazy Batch-
Updates")."""


@dataclass(frozen=True, kw_only=True)
class GptqSpec(QuantSpec):
    """GPTQ with any codebook of block-wise quantization. Its blocks are of a row.

    Attributes:
        scheme: 'group'.
        blocksize: columns that share an absmax, or 'row'.
        act_order: columns go in the order of their inputs' squares, the largest first, and are grouped so.
        static_groups: absmax from the original weight, in its own order of columns.
        group_scales: absmax of a group 'fresh', from the corrected weight when its first column is reached; or
            'reference', as in the published code, which leaves out corrections by columns of the same 128.

    Raises:
        SpecError: an axis has a value that is not allowed.
    """

    method_name: ClassVar[str] = "gptq"
    runs: ClassVar[str] = "kbit.methods.gptq:quantize_layers"
    calibrates: ClassVar[bool] = True
    calibrates_on: ClassVar[Literal["original", "quantized"] | None] = "quantized"
    effort: ClassVar[float] = 50.0
    product_bytes: ClassVar[int] = 4
    takes: ClassVar[frozenset[str]] = frozenset({"rotation"})
    refuses: ClassVar[Mapping[str, str]] = {
        "center": "a mean is not corrected for",
        "outlier_fraction": "all columns are quantized",
    }

    scheme: str = like(QuantSpec, "scheme", "group")
    act_order: bool = axis(
        False, type="bool", doc="columns in the order of their inputs' squares", neutral=False, since=3
    )
    static_groups: bool = axis(
        False, type="bool", doc="absmax of groups from the original weight", neutral=False, since=3
    )
    group_scales: str = axis(
        "fresh",
        type="string",
        doc="absmax of a group: fresh, or as the published code has it (reference)",
        neutral="fresh",
        since=3,
        label="{}-scales",
    )

    def _validate(self) -> None:
        super()._validate()
        for name in ("act_order", "static_groups"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(name, getattr(self, name), "true or false")
        if self.group_scales not in get_args(GroupScales):
            raise SpecError("group_scales", self.group_scales, "one of " + ", ".join(get_args(GroupScales)))
        if self.is_baseline:
            return
        of = "with method=gptq"
        if self.scheme != "group":
            raise SpecError("scheme", self.scheme, f"group {of}: a block of the flattened tensor spans rows")
        if self.blocksize is None:
            raise SpecError("blocksize", None, f"row, or a whole number of at least 1, {of}: blocks are of a row")
        if self.absmax_dtype == "nested":
            allowed = f"float16 or float32 {of}: nested absmax needs all of them before the first column"
            raise SpecError("absmax_dtype", self.absmax_dtype, allowed)
        if self.rotation is not None and self.permutes:
            allowed = (
                f"null {of} and act_order=true: its columns would go in an order that is not the inputs' (rotated "
            )
            allowed += "back, they need static_groups=true, or blocksize=row)"
            raise SpecError("rotation", self.rotation, allowed)

    def _normalise(self) -> None:
        super()._normalise()
        set_ = object.__setattr__
        if self.blocksize == ROW:  # its absmax is the original's, whatever the order
            set_(self, "static_groups", False)
        if self.static_groups or self.blocksize == ROW or (self.blocksize or 1) % LAZY_COLUMNS == 0:
            set_(self, "group_scales", "fresh")  # no group begins within a lazy block

    @property
    def permutes(self) -> bool:
        """Whether groups are of permuted columns, so that the order is stored."""
        return self.act_order and not self.static_groups and self.blocksize != ROW

    def working_bytes(self, hidden: int, inner: int) -> int:
        """The sums of one block's inputs, three of `hidden`, and three matrices that the widest is factored with.

        Or, where that is more, its factor and what a codebook is fitted with.
        """
        widest = max(hidden, inner) ** 2
        factoring = 4 * (3 * hidden**2 + 4 * widest)
        if self.is_baseline or not data_type(str(self.dtype), self.codebook).data_dependent:
            return factoring
        return max(factoring, 4 * (3 * hidden**2 + 2 * widest) + FIT_BYTES * hidden * max(inner, 3 * hidden))

    def blockwise(self, in_features: int) -> QuantSpec:
        """Return the spec of what is stored of a layer: blocks, codebook and absmax as without the correction."""
        plain = QuantSpec(**{name: getattr(self, name) for name in axes_of(QuantSpec)})
        return plain.of_row(in_features)
