"""A linear layer held in k bits: its weight's codes, absmax, zero points and codebook, and no other copy of it."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from kbit.axes import axes_of
from kbit.data_types import data_type
from kbit.kernels.ops import by_row, matmul_rows
from kbit.kernels.tiles import lookup_table, why_no_layout
from kbit.packed.base import FIRST_VERSION, ZERO_POINT_VERSION, PackedLinear, matrix_shape
from kbit.packed.layout import Shapes, lay_out, row_major, shapes
from kbit.quantizer.absmax import NESTED_SPEC, NestedAbsmax
from kbit.quantizer.blockwise import QuantizedTensor, dequantize
from kbit.quantizer.codebooks import codebook
from kbit.quantizer.storage import STORAGE_DTYPES
from kbit.spec import QuantSpec

_FIRST_AXES: Final = 2
"""Version of the keys up to which a layer's metadata have every axis."""
LATER: Final = ("float_zeros", "permuted")
"""Arguments that came later than a layer's others: its state and metadata have those that are true."""


class KBitLinear(PackedLinear):
    """y = x · W^T + bias for a W of codes, absmax per block and a codebook: what ``kbit.quantize`` gives.

    A ``PackedLinear``. Kept columns and mean are added in float32 before the only rounding. With centering a W in tiles
    is not rounded to 16 bits after its mean is added, as ``dequantize`` rounds it.

    Args:
        in_features, out_features: W is [out_features, in_features].
        spec: how it is quantized.
        storage_dtype: float16 or bfloat16, what dequantized values are rounded to; the dtype of kept columns.
        dtype: of the x to come and of the bias: float16, bfloat16 or float32. None is `storage_dtype`.
        kept: number of input dimensions kept in 16 bits.
        float_zeros: the zero points are float16 (HQQ's), not whole numbers; of a spec that has some.
        permuted: what is quantized has its columns in another order than x, which is stored too (GPTQ's act_order).
        bias: whether there is one.
        device: where buffers are made. They hold zeros until a state dict is loaded; ``from_quantized`` fills them.

    Raises:
        ValueError: a size, dtype or number of kept columns that is not possible, or a spec of 16 bits.
    """

    spec: QuantSpec
    absmax: Tensor
    absmax_scale: Tensor
    absmax_offset: Tensor
    absmax_codebook: Tensor
    zero_points: Tensor | None
    order: Tensor | None
    mean: Tensor | None
    kept_columns: Tensor | None
    kept_values: Tensor | None

    def __init__(  # noqa: PLR0913  # as torch's own layers take them
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        *,
        storage_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype | None = None,
        kept: int = 0,
        float_zeros: bool = False,
        permuted: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        spec = spec.of_row(in_features)
        if spec.why_not_packed is not None:
            raise ValueError(f"spec={spec.label!r}: {spec.why_not_packed}; quantize and dequantize take it")
        why_no_tiles = why_no_layout((out_features, in_features), spec)
        super().__init__(
            *(in_features, out_features, spec),
            storage_dtype=storage_dtype,
            dtype=dtype,
            blocksize=spec.blocksize,
            why_no_tiles=why_no_tiles,
        )
        if not 0 <= kept <= in_features:
            raise ValueError(f"in_features={in_features}, kept={kept}: 0 to in_features kept columns are needed")
        if float_zeros and not spec.zero_point:
            raise ValueError(f"float_zeros=True with {spec.label!r}: only a spec with zero_point=True has zero points")
        self.float_zeros, self.permuted = float_zeros, permuted
        # Where no code stands for 0, kept columns are left out of the product with the codes by zeros of x.
        self._clears_kept = bool(kept) and not data_type(str(spec.dtype), spec.codebook).has_zero
        optional: dict[str, tuple[tuple[int, ...], torch.dtype] | None] = {
            "mean": ((), torch.float16) if spec.center else None,
            "kept_columns": ((kept,), torch.int32) if kept else None,
            "kept_values": ((out_features, kept), storage_dtype) if kept else None,
            "order": ((in_features,), torch.int32) if permuted else None,
        }
        for name in (*optional, "zero_points"):
            self.register_buffer(name, None)
        stored = shapes(out_features, in_features, spec, float_zeros=float_zeros)
        used = {name: kind for name, kind in optional.items() if kind is not None}
        nested: Shapes = {"absmax_codebook": ((1 << NESTED_SPEC.bits,), torch.float32)} if self._is_nested else {}
        self._make_buffers({**stored, **used}, nested, bias=bias, device=device)

    @classmethod
    @torch.no_grad()
    def from_quantized(
        cls,
        q: QuantizedTensor,
        *,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        order: Tensor | None = None,
    ) -> KBitLinear:
        """Make the layer of a quantized weight, on its device; it shares the weight's tensors if the layout fits.

        Args:
            q: of shape [out, in].
            bias: [out], taken as it is; None for none.
            dtype: of the x to come; None is the weight's.
            order: int32 [in], the column of x that each column of q is of; None where they are the same.

        Raises:
            ValueError: q is no matrix, or bias has another shape.
        """
        out_features, in_features = matrix_shape(q.shape, bias)
        layer = cls(
            in_features,
            out_features,
            q.spec,
            storage_dtype=q.storage_dtype,
            dtype=dtype or q.dtype,
            kept=0 if q.kept_columns is None else q.kept_columns.numel(),
            float_zeros=q.zero_points is not None and q.zero_points.dtype == torch.float16,
            permuted=order is not None,
            bias=bias is not None,
            device="meta",
        )
        optional = {
            "order": order,
            "mean": q.mean,
            "kept_columns": q.kept_columns,
            "kept_values": q.kept_values,
            "bias": bias,
        }
        layer._put({**lay_out(q), **optional})
        return layer

    def _product(self, x: Tensor) -> Tensor:
        """Return y = x · W^T + bias, of an x [m, in_features].

        The codes of kept columns stand for zero, or else x is zero there. Codes stand for W less its mean: tiles are
        multiplied without it; in row-major order it is added to all columns, the kept ones too.
        """
        of = self._buffers  # attributes of a module take half a microsecond each
        if of["order"] is not None:
            x = x.index_select(1, of["order"])
        bias = None if of["bias"] is None else of["bias"].to(x.dtype)
        addend = None if of["mean"] is None and of["kept_columns"] is None else self._addend(x)
        coded = x
        if self._clears_kept and self.kept_columns is not None:
            coded = x.index_fill(1, self.kept_columns.long(), 0)
        if self.tiled:
            return self._times_tiles(coded, bias, addend)
        y: Tensor = matmul_rows(
            coded,
            codes=of["codes"],
            absmax=of["absmax"],
            nested=[of["absmax_scale"], of["absmax_offset"], of["absmax_codebook"]] if self._is_nested else [],
            codebook=of["codebook"],
            mean=of["mean"],
            zero_points=of["zero_points"],
            tensor_scale=None,
            bias=bias,
            addend=addend,
            n=self.out_features,
            bits=self.spec.bits,
            blocksize=self.spec.blocksize,
            scheme=self.spec.scheme,
            storage=self.storage_dtype,
            batch_invariant=self.batch_invariant,
        )
        return y

    def _addend(self, x: Tensor) -> Tensor | None:
        """Return what the product with the codes lacks of kept columns and mean, float32 [m, out_features], or None."""
        apart, total = self.batch_invariant, partial(torch.sum, dim=1, dtype=torch.float32, keepdim=True)
        kept = None if self.kept_columns is None else x.index_select(1, self.kept_columns)
        addend = sums = None
        if kept is not None:
            assert self.kept_values is not None
            addend = by_row(partial(wide_product, values=self.kept_values), kept, apart=apart)
        if self.mean is None:
            return addend
        # Tiles lack the mean, in all columns but the kept ones; rows have it there too, rounded, but where x is zero.
        if self.tiled:
            sums = by_row(total, x, apart=apart)
        if kept is not None and (self.tiled or not self._clears_kept):
            of_kept = by_row(total, kept, apart=apart)
            sums = -of_kept if sums is None else sums - of_kept
        if sums is None:
            return addend
        part = sums * (self.mean if self.tiled else self.mean.to(self.storage_dtype)).float()
        return part.expand(-1, self.out_features).contiguous() if addend is None else addend + part

    def _following(self) -> dict[str, Tensor]:
        table, unscale = lookup_table(self.codebook, self._table_dtype, whole=self.spec.zero_point)
        nested = {"absmax_codebook": codebook(NESTED_SPEC, self.codebook)} if self._is_nested else {}
        return {"table": table, "unscale": unscale, **nested}

    @property
    def format_version(self) -> int:
        return ZERO_POINT_VERSION if self.spec.zero_point or self.permuted else FIRST_VERSION

    def about(self) -> dict[str, Any]:
        about: dict[str, Any] = {"spec": spec_as_json(self.spec), "storage_dtype": STORAGE_DTYPES[self.storage_dtype]}
        return about | {name: True for name in LATER if getattr(self, name)}

    def quantized(self) -> QuantizedTensor:
        """Return the weight as ``kbit.quantize`` gave it, bit for bit; its dtype is the layer's.

        Columns that were permuted are in the order that they went (`order`).
        """
        absmax: Tensor | NestedAbsmax
        zero_points = self.zero_points
        if self.tiled:
            codes, absmax, zero_points = row_major(self.tiled_weight())
        elif self._is_nested:
            codes = self.codes
            absmax = NestedAbsmax(
                codes=self.absmax, scale=self.absmax_scale, offset=self.absmax_offset, codebook=self.absmax_codebook
            )
        else:
            codes, absmax = self.codes, self.absmax
        return QuantizedTensor(
            codes=codes,
            absmax=absmax,
            codebook=torch.unique_consecutive(self.codebook),
            spec=self.spec,
            shape=(self.out_features, self.in_features),
            dtype=self.dtype,
            storage_dtype=self.storage_dtype,
            mean=self.mean,
            kept_columns=self.kept_columns,
            kept_values=self.kept_values,
            zero_points=zero_points,
        )

    def dequantize(self) -> Tensor:
        """Return the weight that the layer stands for: [out_features, in_features], its dtype the layer's."""
        weight = dequantize(self.quantized())
        return weight if self.order is None else torch.empty_like(weight).index_copy_(1, self.order.long(), weight)

    @property
    def _is_nested(self) -> bool:
        return self.spec.absmax_dtype == "nested"


def spec_as_json(spec: QuantSpec) -> dict[str, Any]:
    """Return the axes of a layer's spec; later ones only where they matter, so that earlier layers stay readable."""
    declared = axes_of(type(spec))
    return {
        name: value
        for name, value in asdict(spec).items()
        if not (declared[name].since > _FIRST_AXES and declared[name].is_neutral(value))
    }


def wide_product(x: Tensor, *, values: Tensor) -> Tensor:
    """x · values^T in float32, unrounded."""
    if x.is_cuda and x.dtype == values.dtype:
        return torch.mm(x, values.t(), out_dtype=torch.float32)
    # On the CPU there is no such product of 16-bit numbers.
    return torch.mm(x.float(), values.float().t())
