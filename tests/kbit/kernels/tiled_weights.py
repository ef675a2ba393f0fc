"""Weights in the kernels' layout, with the values they stand for."""

from __future__ import annotations

import torch

from kbit import QuantSpec, quantize
from kbit.kernels.tiles import TiledWeight, tile
from kbit.quantizer.packing import unpack


def weight(
    rows: int, columns: int, spec: QuantSpec, device: str = "cpu", dtype: torch.dtype = torch.float16
) -> tuple[TiledWeight, torch.Tensor]:
    """A tiled weight, and in float64 what it stands for: codebook value times absmax, unrounded."""
    generator = torch.Generator().manual_seed(rows + columns + spec.bits)
    w = torch.randn(rows, columns, generator=generator).to(dtype)
    q = quantize(w.to(device), spec)
    assert isinstance(q.absmax, torch.Tensor)
    assert spec.blocksize is not None
    values = q.codebook.double()[unpack(q.codes, spec.bits, q.numel).int()].view(rows, columns)
    exact = values * q.absmax.double().view(rows, -1).repeat_interleave(spec.blocksize, 1)
    return tile(q, dtype), exact


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative Frobenius error."""
    return float((found.double() - exact).norm() / exact.norm())
