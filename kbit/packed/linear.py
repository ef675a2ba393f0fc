"""A linear layer held in k bits: its weight's codes, absmax, zero points and codebook, and no other copy of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from kbit.axes import axes_of
from kbit.data_types import data_type
from kbit.kernels.ops import by_row, matmul_rows, matmul_tiled
from kbit.kernels.tiles import TILE, TiledWeight, lookup_table, why_no_layout
from kbit.packed.layout import check_stored, lay_out, row_major, shapes
from kbit.quantizer.absmax import NESTED_SPEC, NestedAbsmax
from kbit.quantizer.blockwise import QuantizedTensor, dequantize
from kbit.quantizer.codebooks import codebook
from kbit.quantizer.storage import STORAGE_DTYPES
from kbit.spec import QuantSpec

_FIRST_AXES: Final = 2
"""Version of the keys up to which a layer's metadata have every axis."""
LAYER_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
"""Of x, and of the weights that a layer stands for."""


class KBitLinear(nn.Module):
    """y = x · W^T + bias for a quantized W, of which no copy in 16 bits is kept, on the CPU and on a GPU.

    W lies in the kernels' tiles where it has that layout, else in row-major order, the same on every device
    (``kbit.packed.layout``). Everything is a buffer: ``state_dict`` holds what defines the layer, exactly, and one of
    another spec is refused. ``to(dtype)`` changes the bias and the dtype of x to come, never codes, absmax, codebook,
    mean or kept columns. Loading a state dict in place keeps every buffer's address, so that CUDA graphs stay valid.

    Products, kept columns, mean and bias are summed in float32 and rounded to x's dtype once. With centering a W in
    tiles is not rounded to 16 bits after its mean is added, as ``dequantize`` rounds it. A GPU's fused kernel takes x
    of ``dtype``; float32 x, and layers without tiles, go by dequantizing some rows at a time, and so do more than 64
    rows of x (128 or 192 where that is slower), up to about 1 GiB at a time. A layer is for one CUDA stream at a time,
    and for inference: call it under torch.no_grad(), without which torch.compile traces a backward, and that raises
    NotImplementedError. Autocast does not reach into it.

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

    Attributes:
        batch_invariant: whether a row of y depends on no other row of x, nor on how many there are; False at first.

    Raises:
        ValueError: a size, dtype or number of kept columns that is not possible, or a spec of 16 bits.
    """

    codes: Tensor
    scales: Tensor
    absmax: Tensor
    absmax_scale: Tensor
    absmax_offset: Tensor
    absmax_codebook: Tensor
    zero_points: Tensor | None
    order: Tensor | None
    codebook: Tensor
    table: Tensor
    unscale: Tensor
    arrived: Tensor
    mean: Tensor | None
    kept_columns: Tensor | None
    kept_values: Tensor | None
    bias: Tensor | None

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
        super().__init__()
        spec = spec.of_row(in_features)
        if spec.why_not_packed is not None:
            raise ValueError(f"spec={spec.label!r}: {spec.why_not_packed}; quantize and dequantize take it")
        if spec.is_baseline or storage_dtype not in STORAGE_DTYPES:
            raise ValueError(
                f"bits={spec.bits}, storage_dtype={storage_dtype}: 2 to 8 bits of a 16-bit dtype are needed"
            )
        if in_features < 1 or out_features < 1 or not 0 <= kept <= in_features:
            raise ValueError(
                f"in_features={in_features}, out_features={out_features}, kept={kept}: sizes of at least 1, and 0 to "
                "in_features kept columns are needed"
            )
        if float_zeros and not spec.zero_point:
            raise ValueError(f"float_zeros=True with {spec.label!r}: only a spec with zero_point=True has zero points")
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.storage_dtype, self.dtype = storage_dtype, dtype or storage_dtype
        if self.dtype not in LAYER_DTYPES:
            raise ValueError(f"dtype={self.dtype} is not torch.float16, torch.bfloat16 or torch.float32")
        self.batch_invariant = False
        self.float_zeros, self.permuted = float_zeros, permuted
        self._stored = shapes(out_features, in_features, spec, float_zeros=float_zeros)
        self.tiled = "scales" in self._stored
        # Where no code stands for 0, kept columns are left out of the product with the codes by zeros of x.
        self._clears_kept = bool(kept) and not data_type(str(spec.dtype), spec.codebook).has_zero
        optional = {
            "mean": ((), torch.float16) if spec.center else None,
            "kept_columns": ((kept,), torch.int32) if kept else None,
            "kept_values": ((out_features, kept), storage_dtype) if kept else None,
            "order": ((in_features,), torch.int32) if permuted else None,
        }
        self._stored |= {name: stored for name, stored in optional.items() if stored is not None}
        # What follows from the rest, made by ``derive``.
        derived = {"table": ((1 << spec.bits,), self._table_dtype), "unscale": ((1,), torch.float32)}
        if self.tiled:
            derived["arrived"] = ((-(-out_features // TILE),), torch.int32)
        if self._is_nested:
            derived["absmax_codebook"] = ((1 << NESTED_SPEC.bits,), torch.float32)
        for name in (*optional, "zero_points"):
            self.register_buffer(name, None)
        for name, (shape, kind) in {**self._stored, **derived}.items():
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device), persistent=name not in derived)
        self.register_buffer("bias", torch.zeros(out_features, dtype=self.dtype, device=device) if bias else None)

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
        if len(q.shape) != 2 or (bias is not None and bias.shape != q.shape[:1]):
            shape = None if bias is None else list(bias.shape)
            raise ValueError(f"weight {list(q.shape)} and bias {shape}: [out, in] and [out] are needed")
        out_features, in_features = q.shape
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
        for name, tensor in {**lay_out(q), **optional}.items():
            layer._buffers[name] = None if tensor is None else tensor.detach()
        layer.derive()
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] of ``dtype`` or float32 to [..., out_features] of x's dtype.

        Raises:
            ValueError: x has another shape or dtype, or not all of the layer is on x's device.
        """
        autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        if x.shape[-1:] != (self.in_features,) or x.dtype not in (self.table.dtype, torch.float32):
            why = "; autocast made x so: leave it, or give it this dtype" if autocast else ""
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)}: this layer takes [..., {self.in_features}] of {self.table.dtype} or "
                f"float32; layer.to(dtype) changes that{why}"
            )
        device = x.device
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.device != device:
                raise ValueError(
                    f"x is on {device} and this layer's {name} on {buffer.device}: move one of them; what is on meta "
                    "has no values yet: load a state dict, or call layer.derive()"
                )
        flat = x.reshape(-1, self.in_features).contiguous()
        if autocast:
            with torch.autocast(x.device.type, enabled=False):
                y = self._product(flat)
        else:
            y = self._product(flat)
        return y.view(*x.shape[:-1], self.out_features)

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
        y: Tensor
        if self.tiled:
            y = matmul_tiled(
                coded,
                codes=of["codes"],
                scales=of["scales"],
                codebook=of["codebook"],
                table=of["table"],
                unscale=of["unscale"],
                arrived=of["arrived"],
                tensor_scale=None,
                bias=bias,
                addend=addend,
                n=self.out_features,
                bits=self.spec.bits,
                blocksize=self.spec.blocksize,
                storage=self.storage_dtype,
                batch_invariant=self.batch_invariant,
            )
        else:
            y = matmul_rows(
                coded,
                codes=of["codes"],
                absmax=of["absmax"],
                nested=[of["absmax_scale"], of["absmax_offset"], of["absmax_codebook"]] if self._is_nested else [],
                codebook=of["codebook"],
                mean=of["mean"],
                zero_points=of["zero_points"],
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

    def derive(self) -> None:
        """Make the buffers that follow from those of the state dict, once these are there; in place where possible.

        Raises:
            ValueError: a buffer of the state dict is not what this layer stores.
        """
        if any(self._buffers[name].is_meta for name in self._stored):  # type: ignore[union-attr]
            return
        for name, (shape, kind) in self._stored.items():
            check_stored(name, self.get_buffer(name), shape, kind)
        device = self.codes.device
        table, unscale = lookup_table(self.codebook, self._table_dtype, whole=self.spec.zero_point)
        self._keep("table", table)
        self._keep("unscale", unscale)
        if self.tiled:
            self._keep("arrived", torch.zeros(-(-self.out_features // TILE), dtype=torch.int32, device=device))
        if self._is_nested:
            self._keep("absmax_codebook", codebook(NESTED_SPEC, self.codebook))

    def _keep(self, name: str, value: Tensor) -> None:
        old = self.get_buffer(name)
        if (old.shape, old.dtype, old.device) == (value.shape, value.dtype, value.device):
            old.copy_(value)  # where a captured CUDA graph reads it
        else:
            self._buffers[name] = value

    def get_extra_state(self) -> Tensor:
        """Spec and storage dtype, as bytes of JSON: a tensor is what safetensors and weights_only loading take."""
        about: dict[str, Any] = {"spec": spec_as_json(self.spec), "storage_dtype": STORAGE_DTYPES[self.storage_dtype]}
        about |= {name: True for name in ("float_zeros", "permuted") if getattr(self, name)}  # later than the rest
        return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse that of another spec: the same codes would stand for other weights."""
        found, own = (bytes(s.tolist()).decode() for s in (state, self.get_extra_state()))
        if json.loads(found) != json.loads(own):
            raise ValueError(f"a state dict of {found} does not fit a layer of {own}")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Check before anything is copied, since copying would cast."""
        if f"{prefix}_extra_state" in state_dict:
            self.set_extra_state(state_dict[f"{prefix}_extra_state"])
        for name, (shape, kind) in self._stored.items():
            if f"{prefix}{name}" in state_dict:
                check_stored(f"{prefix}{name}", state_dict[f"{prefix}{name}"], shape, kind)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.derive()

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

    @property
    def _table_dtype(self) -> torch.dtype:
        return self.dtype if self.dtype in STORAGE_DTYPES else self.storage_dtype

    def tiled_weight(self) -> TiledWeight:
        """Return the layer's tiles, shared with it, as ``kbit.kernels.matmul`` takes them.

        Raises:
            ValueError: it has none.
        """
        if not self.tiled:
            raise ValueError(
                f"a layer without tiles: {why_no_layout((self.out_features, self.in_features), self.spec)}"
            )
        assert self.spec.blocksize is not None
        return TiledWeight(
            codes=self.codes,
            scales=self.scales,
            codebook=self.codebook,
            table=self.table,
            unscale=self.unscale,
            arrived=self.arrived,
            n=self.out_features,
            k=self.in_features,
            bits=self.spec.bits,
            blocksize=self.spec.blocksize,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        layout = "tiles" if self.tiled else "rows"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.spec.label}, {layout}, {self.dtype}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KBitLinear:  # noqa: ARG002  # torch's signature
        """Move everything; cast the bias alone."""
        before = self._table_dtype
        dtype = fn(torch.empty(1, dtype=self.dtype, device=self.codes.device)).dtype
        if dtype not in LAYER_DTYPES:
            raise TypeError(f"a KBitLinear can't be cast to {dtype}: float16, bfloat16 and float32 are possible")
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer) if name == "bias" else _uncast(fn, buffer)
        self.dtype = dtype
        if self._table_dtype != before:
            self.derive()
        return self


def spec_as_json(spec: QuantSpec) -> dict[str, Any]:
    """Return the axes of a layer's spec; later ones only where they matter, so that earlier layers stay readable."""
    declared = axes_of(type(spec))
    return {
        name: value
        for name, value in asdict(spec).items()
        if not (declared[name].since > _FIRST_AXES and declared[name].is_neutral(value))
    }


def _uncast(fn: Callable[[Tensor], Tensor], buffer: Tensor) -> Tensor:
    """fn, which may move or cast what is floating point, of a buffer that must not be cast."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[buffer.element_size()]
    moved = fn(buffer.view(whole))
    if moved.dtype != whole:
        raise TypeError(f"a KBitLinear's codes can't be cast to {moved.dtype}: use to(dtype), which casts floats alone")
    return moved.view(buffer.dtype)


def wide_product(x: Tensor, *, values: Tensor) -> Tensor:
    """x · values^T in float32, unrounded."""
    if x.is_cuda and x.dtype == values.dtype:
        return torch.mm(x, values.t(), out_dtype=torch.float32)
    # On the CPU there is no such product of 16-bit numbers.
    return torch.mm(x.float(), values.float().t())
