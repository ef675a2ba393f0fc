"""A linear layer held in a block-scaled float format: codes and scales as ``kbit.quantizer.block_float`` gives them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kbit.kernels.ops import matmul_rows
from kbit.kernels.tiles import LANES, TILE, element_table, scale_dtype, tiled_codes, tiled_scales, why_no_layout
from kbit.packed.base import BLOCK_FLOAT_VERSION, PackedLinear, matrix_shape
from kbit.packed.layout import Shapes, row_major
from kbit.quantizer.block_float import BlockFloatTensor, code_values, dequantize_block_float
from kbit.quantizer.packing import packed_bytes
from kbit.quantizer.storage import STORAGE_DTYPES
from kbit.specs.block_float import BlockFloatSpec


class BlockFloatLinear(PackedLinear):
    """y = x · W^T + bias for a W in an MX format or NVFP4.

    A ``PackedLinear``. The values of the codes are the format's, so that no codebook is stored.

    Args:
        in_features, out_features: W is [out_features, in_features].
        spec: its format.
        storage_dtype: float16 or bfloat16, what dequantized values are rounded to.
        dtype: of the x to come and of the bias: float16, bfloat16 or float32. None is `storage_dtype`.
        bias: whether there is one.
        device: where buffers are made. They hold zeros until a state dict is loaded; ``from_quantized`` fills them.

    Raises:
        ValueError: a size or dtype that is not possible.
    """

    tensor_scale: Tensor | None
    spec: BlockFloatSpec

    def __init__(  # noqa: PLR0913  # as torch's own layers take them
        self,
        in_features: int,
        out_features: int,
        spec: BlockFloatSpec,
        *,
        storage_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            *(in_features, out_features, spec),
            storage_dtype=storage_dtype,
            dtype=dtype,
            blocksize=spec.element.block,
            why_no_tiles=why_no_layout((out_features, in_features), spec),
        )
        # Bytes are stored, since not every reader of files knows E8M0.
        self._scale_dtype = scale_dtype(spec)
        self.register_buffer("tensor_scale", None)
        values: Shapes = {"codebook": ((1 << spec.bits,), torch.float32)}
        stored = _shapes(out_features, in_features, spec, tiled=self.tiled)
        self._make_buffers(stored, values, bias=bias, device=device)

    @classmethod
    @torch.no_grad()
    def from_quantized(
        cls, q: BlockFloatTensor, *, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> BlockFloatLinear:
        """Make the layer of a quantized weight, on its device; it shares the weight's tensors if the layout fits.

        Args:
            q: of shape [out, in].
            bias: [out], taken as it is; None for none.
            dtype: of the x to come; None is the weight's.

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
            bias=bias is not None,
            device="meta",
        )
        layer._put({**_lay_out(q, tiled=layer.tiled), "bias": bias})
        return layer

    @property
    def format_version(self) -> int:
        return BLOCK_FLOAT_VERSION

    def about(self) -> dict[str, Any]:
        return {"spec": self.spec.canonical(), "storage_dtype": STORAGE_DTYPES[self.storage_dtype]}

    def _product(self, x: Tensor) -> Tensor:
        of = self._buffers
        bias = None if of["bias"] is None else of["bias"].to(x.dtype)
        if self.tiled:
            return self._times_tiles(x, bias)
        y: Tensor = matmul_rows(
            x,
            codes=of["codes"],
            absmax=self._scales(),
            nested=[],
            codebook=of["codebook"],
            mean=None,
            zero_points=None,
            tensor_scale=of["tensor_scale"],
            bias=bias,
            addend=None,
            n=self.out_features,
            bits=self.spec.bits,
            blocksize=self._blocksize,
            scheme="group",
            storage=self.storage_dtype,
            batch_invariant=self.batch_invariant,
        )
        return y

    def _scales(self) -> Tensor:
        return super()._scales().view(self._scale_dtype)

    def _following(self) -> dict[str, Tensor]:
        # Kept apart from what all layers share: a captured CUDA graph reads it where it lies.
        codebook = code_values(self.spec.element, self.codes.device).clone()
        table, unscale = element_table(codebook, self._table_dtype, self.tensor_scale)
        return {"codebook": codebook, "table": table, "unscale": unscale}

    def quantized(self) -> BlockFloatTensor:
        """Return the weight as ``quantize_block_float`` gave it, bit for bit; its dtype is the layer's."""
        codes, scales = self.codes, self.scales
        if self.tiled:
            codes, scales, _ = row_major(self.tiled_weight())
            scales = scales.view(torch.uint8).view(self.out_features, -1)
        return BlockFloatTensor(
            codes=codes,
            scales=scales,
            tensor_scale=None if self.tensor_scale is None else self.tensor_scale.view(()),
            spec=self.spec,
            shape=(self.out_features, self.in_features),
            dtype=self.dtype,
            storage_dtype=self.storage_dtype,
        )

    def dequantize(self) -> Tensor:
        return dequantize_block_float(self.quantized())


def _shapes(n: int, k: int, spec: BlockFloatSpec, *, tiled: bool) -> Shapes:
    """Return shape and dtype of what ``_lay_out`` gives of a W [n, k], by name."""
    of_tensor: Shapes = {"tensor_scale": ((1,), torch.float32)} if spec.element.tensor_scaled else {}
    blocks = -(-k // spec.element.block)
    if not tiled:
        codes = (packed_bytes(n * k, spec.bits),), torch.uint8
        return {"codes": codes, "scales": ((n, blocks), torch.uint8), **of_tensor}
    row_blocks = -(-n // TILE)
    tiles = (row_blocks * (k // TILE), spec.bits, LANES, 4), torch.int32
    return {"codes": tiles, "scales": ((row_blocks, blocks, 8, 8), torch.uint8), **of_tensor}


def _lay_out(q: BlockFloatTensor, *, tiled: bool) -> dict[str, Tensor]:
    """Return a quantized matrix's codes and scales as they are stored; its own tensors where these fit."""
    of_tensor = {} if q.tensor_scale is None else {"tensor_scale": q.tensor_scale.view(1)}
    codes, scales = (tiled_codes(q), tiled_scales(q)) if tiled else (q.codes, q.scales)
    return {"codes": codes, "scales": scales.view(torch.uint8), **of_tensor}
