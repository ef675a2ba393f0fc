"""The grids that weights are rounded to a column at a time: a codebook, or whole numbers, and each group's scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kbit.quantizer.asymmetric import divisor, grid_between, nearest_codes
from kbit.quantizer.storage import FLOAT16_MAX
from kbit.spec import QuantSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class Grids:
    """Codes' values, and the scales of each row's groups.

    Attributes:
        spec: blocks of numbered columns, absmax and data type.
        codebook: float32 [2 to 2^k].
        points: float32, its midpoints.
        scale: [out, groups], float16 or float32: absmax, or what goes with zero points.
        zero: float32 [out, groups], zero points; or None.
        storage: dtype that dequantized values are rounded to.
    """

    spec: QuantSpec
    codebook: Tensor
    points: Tensor
    scale: Tensor
    zero: Tensor | None
    storage: torch.dtype

    @property
    def size(self) -> int:
        """Columns of a group."""
        assert self.spec.blocksize is not None
        return self.spec.blocksize

    def measure(self, w: Tensor, group: int) -> None:
        """Set the scales of groups, from `group` on, by their columns: float32 [out, columns], whole groups or less."""
        last = group + -(-w.shape[1] // self.size)
        padded = torch.nn.functional.pad(w, (0, -w.shape[1] % self.size)) if w.shape[1] > self.size else w
        parts = padded.reshape(len(w), last - group, -1)
        if self.zero is not None:
            grid = grid_between(parts.amin(-1), parts.amax(-1), self.spec.bits)
            self.scale[:, group:last], self.zero[:, group:last] = grid.scale, grid.zero.float()
            return
        largest = parts.abs().amax(-1)
        self.scale[:, group:last] = largest.clamp_(max=FLOAT16_MAX) if self.scale.dtype == torch.float16 else largest

    def round(self, x: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Return codes (uint8) and values (float32, as stored) of one column, float32 [out]."""
        scale = self.scale[:, group]
        y = x / divisor(scale)
        if self.zero is None:
            codes = torch.bucketize(y, self.points, out_int32=True)
            values = self.codebook[codes] * scale.float()
        else:
            zero = self.zero[:, group]
            codes = nearest_codes(y, zero, self.spec.bits)
            values = (codes - zero) * scale.float()
        limit = torch.finfo(self.storage).max
        return codes.to(torch.uint8), values.clamp_(-limit, limit).to(self.storage).float()
