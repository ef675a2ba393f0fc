"""Weights in the kernels' layout, with the values they stand for."""

from __future__ import annotations

import torch

from kbit import QuantSpec, quantize
from kbit.kernels.tiles import TiledWeight, tile
from kbit.quantizer.block_float import code_values, quantize_block_float
from kbit.quantizer.blockwise import zeros_of
from kbit.quantizer.hqq import as_blockwise, quantize_hqq
from kbit.quantizer.packing import unpack
from kbit.specs.block_float import BlockFloatSpec
from kbit.specs.hqq import HqqSpec


def weight(
    rows: int,
    columns: int,
    spec: QuantSpec | HqqSpec | BlockFloatSpec,
    device: str = "cpu",
    dtype: torch.dtype = torch.float16,
) -> tuple[TiledWeight, torch.Tensor]:
    """A tiled weight, and in float64 what it stands for: codebook value, less a zero point, times absmax, unrounded."""
    generator = torch.Generator().manual_seed(rows + columns + spec.bits)
    w = torch.randn(rows, columns, generator=generator).to(dtype)
    if isinstance(spec, BlockFloatSpec):
        w *= torch.logspace(-3, 1, rows).unsqueeze(1).to(dtype)  # scales of many sizes
        floats = quantize_block_float(w.to(device), spec)
        tiled = tile(floats, dtype)
        elements = code_values(spec.element, floats.codes.device).double()
        values = elements[unpack(floats.codes, spec.bits, w.numel()).int()].view(rows, -1, spec.element.block)
        scales = floats.scales.view(tiled.scales.dtype).double()
        factors = scales if floats.tensor_scale is None else scales * floats.tensor_scale.double()
        return tiled, (values * factors.unsqueeze(-1)).view(rows, columns)
    if isinstance(spec, HqqSpec):
        q = as_blockwise(quantize_hqq(w.to(device) + 0.2, spec))
    else:
        q = quantize(w.to(device), spec)
    assert isinstance(q.absmax, torch.Tensor)
    assert spec.blocksize is not None
    values = q.codebook.double()[unpack(q.codes, spec.bits, q.numel).int()].view(rows, -1, spec.blocksize)
    if q.zero_points is not None:
        values -= zeros_of(q).double().view(rows, -1, 1)
    return tile(q, dtype), (values * q.absmax.double().view(rows, -1, 1)).view(rows, columns)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative Frobenius error."""
    return float((found.double() - exact).norm() / exact.norm())
