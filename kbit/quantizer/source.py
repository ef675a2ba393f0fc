"""A weight's values as they are quantized: read piece by piece, in the form that every step of the quantizer takes."""

from __future__ import annotations

import torch
from torch import Tensor

from kbit.quantizer.blocks import Piece
from kbit.quantizer.storage import flattened, non_finite


class Source:
    """A weight's values as they are quantized: stored in 16 bits, less the mean, kept columns zero."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, columns: Tensor | None, mean: Tensor | None) -> None:
        self.weight, self.dtype, self.mean = weight.detach(), dtype, mean
        self.columns = None if columns is None else columns.long()
        self.row = None if columns is None else weight.shape[1]
        self.flat = flattened(weight, dtype)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def __getitem__(self, piece: Piece) -> Tensor:
        """float32, flat, a fresh tensor."""
        values = self.flat[piece.start : piece.stop].to(self.dtype).float()
        if self.mean is not None:
            values -= self.mean.float()
        if self.columns is not None and self.row is not None:
            values.view(-1, self.row)[:, self.columns] = 0
        return values

    def kept(self) -> Tensor | None:
        """16-bit values of the kept columns."""
        if self.columns is None:
            return None
        kept = self.weight[:, self.columns].to(self.dtype)
        if not bool(kept.isfinite().all()):
            raise non_finite("a kept column of the weight", self.dtype)
        return kept
