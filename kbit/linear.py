"""A linear layer held in k bits: the codes, absmax and codebook of its weight, and no other copy of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from kbit.blocks import NESTED_SPEC, NestedAbsmax
from kbit.blockwise import QuantizedTensor, dequantize
from kbit.codebooks import codebook
from kbit.kernels.ops import by_row, matmul_rows, matmul_tiled
from kbit.kernels.tiles import (
    TILE,
    TiledWeight,
    lookup_table,
    row_block_chunks,
    untile_absmax,
    untile_codes,
    why_no_layout,
)
from kbit.layout import is_tiled, lay_out, shapes
from kbit.packing import pack
from kbit.spec import QuantSpec
from kbit.storage import STORAGE_DTYPES


class KBitLinear(nn.Module):
    """y = x · W^T + bias for a quantized W, with no copy of W in 16 bits, on the CPU and on a GPU.

    W lies in the kernels' tiles where it has that layout, else in row-major order, the same on every device
    (``kbit.layout``). Everything is a buffer: ``state_dict`` holds what defines the layer, exactly. ``to(dtype)``
    changes the bias and the dtype of x to come, never codes, absmax, codebook, mean or kept columns.

    Products and bias are summed in float32 and rounded to x's dtype; kept columns and the mean are added to that.
    A GPU's fused kernel takes x of ``dtype``; float32 x, and layers without tiles, go by dequantizing some rows at a
    time. A layer is for one CUDA stream at a time, and for inference: a backward raises NotImplementedError.

    Args:
        in_features, out_features: W is [out_features, in_features].
        spec: how it is quantized.
        storage_dtype: float16 or bfloat16, what dequantized values are rounded to; the dtype of kept columns.
        dtype: of the x to come and of the bias: float16, bfloat16 or float32. None is `storage_dtype`.
        kept: number of input dimensions kept in 16 bits.
        bias: whether there is one.
        device: where buffers are made. They hold zeros until a state dict is loaded; ``from_quantized`` fills them.

    Attributes:
        batch_invariant: whether a row's result depends on no other row, nor on how many there are; False at first.
    """

    codes: Tensor
    scales: Tensor
    absmax: Tensor
    absmax_scale: Tensor
    absmax_offset: Tensor
    absmax_codebook: Tensor
    codebook: Tensor
    table: Tensor
    unscale: Tensor
    arrived: Tensor
    mean: Tensor | None
    kept_columns: Tensor | None
    kept_values: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        *,
        storage_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype | None = None,
        kept: int = 0,
        bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if spec.is_baseline or storage_dtype not in STORAGE_DTYPES:
            raise ValueError(
                f"bits={spec.bits}, storage_dtype={storage_dtype}: 2 to 8 bits of a 16-bit dtype are needed"
            )
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.storage_dtype, self.dtype = storage_dtype, dtype or storage_dtype
        self.tiled = is_tiled(out_features, in_features, spec)
        self.batch_invariant = False
        zeros = partial(torch.zeros, device=device)
        for name, (shape, kind) in shapes(out_features, in_features, spec).items():
            self.register_buffer(name, zeros(shape, dtype=kind))
        self.register_buffer("mean", zeros((), dtype=torch.float16) if spec.center else None)
        self.register_buffer("kept_columns", zeros(kept, dtype=torch.int32) if kept else None)
        self.register_buffer("kept_values", zeros(out_features, kept, dtype=storage_dtype) if kept else None)
        self.register_buffer("bias", zeros(out_features, dtype=self.dtype) if bias else None)
        # What follows from the rest.
        self.register_buffer("table", zeros(1 << spec.bits, dtype=self._table_dtype), persistent=False)
        self.register_buffer("unscale", zeros(1, dtype=torch.float32), persistent=False)
        arrived = zeros(-(-out_features // TILE), dtype=torch.int32) if self.tiled else None
        self.register_buffer("arrived", arrived, persistent=False)
        nested = zeros(1 << NESTED_SPEC.bits, dtype=torch.float32) if spec.absmax_dtype == "nested" else None
        self.register_buffer("absmax_codebook", nested, persistent=False)
        self.register_load_state_dict_post_hook(_derive)  # type: ignore[no-untyped-call]

    @classmethod
    @torch.no_grad()
    def from_quantized(
        cls, q: QuantizedTensor, *, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> KBitLinear:
        """The layer of a quantized weight, on its device; the weight's tensors are shared where the layout is its own.

        Args:
            q: of shape [out, in].
            bias: [out], taken as it is; None for none.
            dtype: of the x to come; None is the weight's.

        Raises:
            ValueError: q is no matrix, or bias has another shape.
        """
        if len(q.shape) != 2 or (bias is not None and bias.shape != q.shape[:1]):
            shape = None if bias is None else list(bias.shape)
            raise ValueError(f"weight {list(q.shape)} and bias {shape}: [out, in] and [out] are needed")
        rows, columns = q.shape
        layer = cls(
            columns,
            rows,
            q.spec,
            storage_dtype=q.storage_dtype,
            dtype=dtype or q.dtype,
            kept=0 if q.kept_columns is None else q.kept_columns.numel(),
            bias=bias is not None,
            device="meta",
        )
        optional = {"mean": q.mean, "kept_columns": q.kept_columns, "kept_values": q.kept_values, "bias": bias}
        for name, tensor in {**lay_out(q), **optional}.items():
            layer._buffers[name] = None if tensor is None else tensor.detach()
        layer.derive()
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] of ``dtype`` or float32 to [..., out_features] of x's dtype.

        Raises:
            ValueError: x has another shape or dtype.
        """
        if x.shape[-1] != self.in_features or x.dtype not in (self.table.dtype, torch.float32):
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)}: this layer takes [..., {self.in_features}] of {self.table.dtype} or "
                "float32; layer.to(dtype) changes that"
            )
        flat = x.reshape(-1, self.in_features).contiguous()
        y = self._product(flat)
        if self.kept_columns is not None:
            y = self._with_kept(y, flat.index_select(1, self.kept_columns))
        if self.mean is not None:
            y = y.float() + self._sums(flat) * self.mean.float()
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        """x · W^T + bias without mean and kept columns, whose codes stand for zero."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        rest = (bias, self.out_features, self.spec.bits, self.spec.blocksize)
        how = (self.storage_dtype, self.batch_invariant)
        y: Tensor
        if self.tiled:
            w = (self.codes, self.scales, self.codebook, self.table, self.unscale, self.arrived)
            y = matmul_tiled(x, *w, *rest, *how)
        else:
            nested = [self.absmax_scale, self.absmax_offset, self.absmax_codebook] if self._is_nested else []
            y = matmul_rows(x, self.codes, self.absmax, nested, self.codebook, *rest, self.spec.scheme, *how)
        return y

    def _with_kept(self, y: Tensor, kept: Tensor) -> Tensor:
        """y plus the product of the kept columns of x, rounded once; float32 on the CPU."""
        assert self.kept_values is not None
        # The CPU does not sum all 16-bit products in float32.
        compute = torch.float32 if kept.device.type == "cpu" else kept.dtype
        values = self.kept_values.to(compute).t()
        add = partial(_add_product, values=values)
        return by_row(add, y.to(compute), kept.to(compute), apart=self.batch_invariant)

    def _sums(self, x: Tensor) -> Tensor:
        """What the mean is multiplied by: each row's sum over the columns that are not kept, float32 [rows, 1]."""
        total = partial(torch.sum, dim=1, dtype=torch.float32, keepdim=True)
        sums = by_row(total, x, apart=self.batch_invariant)
        if self.kept_columns is None:
            return sums
        return sums - by_row(total, x.index_select(1, self.kept_columns), apart=self.batch_invariant)

    def derive(self) -> None:
        """Make the buffers that follow from those of the state dict, once these are there."""
        device = self.codes.device
        if device.type == "meta":
            return
        self.table, self.unscale = lookup_table(self.codebook, self._table_dtype)
        if self.tiled:
            self.arrived = torch.zeros(-(-self.out_features // TILE), dtype=torch.int32, device=device)
        if self._is_nested:
            self.absmax_codebook = codebook(NESTED_SPEC).to(device)

    def quantized(self) -> QuantizedTensor:
        """The weight as ``kbit.quantize`` gave it, bit for bit; its dtype is the layer's."""
        absmax: Tensor | NestedAbsmax
        if self.tiled:
            w = self.tiled_weight()
            chunks = row_block_chunks(w.row_blocks, w.columns, self.codes.device)
            codes = torch.cat([pack(untile_codes(w, *chunk).reshape(-1), w.bits) for chunk in chunks])
            absmax = untile_absmax(w).reshape(-1)
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
        )

    def dequantize(self) -> Tensor:
        """The weight that the layer stands for: [out_features, in_features], its dtype the layer's."""
        return dequantize(self.quantized())

    @property
    def _is_nested(self) -> bool:
        return self.spec.absmax_dtype == "nested"

    @property
    def _table_dtype(self) -> torch.dtype:
        return self.dtype if self.dtype in STORAGE_DTYPES else self.storage_dtype

    def tiled_weight(self) -> TiledWeight:
        """The layer's tiles, shared with it, as ``kbit.kernels.matmul`` takes them.

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
            rows=self.out_features,
            columns=self.in_features,
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KBitLinear:
        """Move everything; cast the bias alone."""
        before = self._table_dtype
        self.dtype = fn(torch.empty(1, dtype=self.dtype, device=self.codes.device)).dtype
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer) if name == "bias" else _uncast(fn, buffer)
        if self._table_dtype != before:
            self.derive()
        return self


def _derive(layer: nn.Module, _: object) -> None:
    assert isinstance(layer, KBitLinear)
    layer.derive()


def _uncast(fn: Callable[[Tensor], Tensor], buffer: Tensor) -> Tensor:
    """fn, which may move or cast what is floating point, of a buffer that must not be cast."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[buffer.element_size()]
    moved = fn(buffer.view(whole))
    if moved.dtype != whole:
        raise TypeError(f"a KBitLinear's codes can't be cast to {moved.dtype}: use to(dtype), which casts floats alone")
    return moved.view(buffer.dtype)


def _add_product(y: Tensor, kept: Tensor, *, values: Tensor) -> Tensor:
    return torch.addmm(y, kept, values)
