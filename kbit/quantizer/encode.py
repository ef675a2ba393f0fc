"""Scaled values to codes: the definition, and the same codes several times faster."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

_SHIFT = 16
_CELLS = 1 << (32 - _SHIFT)
_MAX_COMPARES = 4
"""More midpoints than this in one cell, and the binary search is faster."""


def midpoints(codebook: Tensor) -> Tensor:
    """(a + b) / 2 in float32 between neighbouring codebook values: float32 [n - 1], in order."""
    return (codebook[:-1] + codebook[1:]) / 2


def codes_by_definition(y: Tensor, codebook: Tensor) -> Tensor:
    """uint8 codes of float32 values: how many midpoints lie below each, so that a tie goes to the lower code."""
    return torch.bucketize(y, midpoints(codebook), out_int32=True).to(torch.uint8)


class Encoder:
    """The codes of ``codes_by_definition``, from a table on the CPU, where it is several times as fast.

    A float32's upper 16 bits name one of 65,536 cells, each an interval of values. The table holds how many midpoints
    lie below a cell, and the few that lie within it, with which the value is compared.
    """

    def __init__(self, codebook: Tensor) -> None:
        self._take(midpoints(codebook))

    @classmethod
    def of_limits(cls, limits: Tensor) -> Self:
        """Return an encoder whose codes count the limits below a value, float32 in order, in the midpoints' place."""
        encoder = cls.__new__(cls)
        encoder._take(limits)
        return encoder

    def _take(self, limits: Tensor) -> None:
        self._midpoints = limits
        self._below: Tensor | None = None
        if limits.device.type == "cpu":
            self._tabulate(limits + 0.0)  # -0 would lie in another cell than 0

    def _tabulate(self, points: Tensor) -> None:
        cell = _cells(points)
        # Read as whole numbers negative floats run backwards: rank is the cells' order by value.
        half = _CELLS // 2
        order = torch.arange(_CELLS)
        rank = torch.where(order < half, half - 1 - order, order)
        counts = torch.bincount(rank[cell.long()], minlength=_CELLS)
        compares = int(counts.max()) if points.numel() else 0
        if compares > _MAX_COMPARES:
            return
        below = (counts.cumsum(0) - counts)[rank]
        self._within = torch.full((compares, _CELLS), torch.inf, dtype=torch.float32)
        self._within[torch.arange(points.numel()) - below[cell.long()], cell.long()] = points
        self._below = below.to(torch.uint8)

    def __call__(self, y: Tensor) -> Tensor:
        """uint8 codes of float32 values [n]."""
        if self._below is None:
            return torch.bucketize(y, self._midpoints, out_int32=True).to(torch.uint8)
        cell = _cells(y)
        codes = self._below.index_select(0, cell)
        for points in self._within:
            codes += y > points.index_select(0, cell)
        return codes


def _cells(y: Tensor) -> Tensor:
    """Cell of each float32 value: int32 in [0, 65536)."""
    return (y.view(torch.int32) >> _SHIFT).add_(_CELLS // 2)
