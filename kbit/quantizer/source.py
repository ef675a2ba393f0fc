"""A weight's values as they are quantized: read piece by piece, in the form that every step of the quantizer takes."""

from __future__ import annotations

import torch
from torch import Tensor

from kbit.quantizer.blocks import Piece
from kbit.quantizer.storage import flattened, non_finite


class Source:
    """A weight's values as they are quantized: stored in 16 bits, less the mean, kept columns zero."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, columns: Tensor | None, mean: Tensor | None) -> None:
        """Take a weight, and the dtype that it is cast to first: 16 bits, or float32 for what was made of 16 bits."""
        self.weight, self.dtype, self.mean = weight.detach(), dtype, mean
        self.columns = None if columns is None else columns.long()
        self.row = None if columns is None else weight.shape[1]
        self.flat = flattened(weight, dtype)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def __getitem__(self, piece: Piece) -> Tensor:
        """float32, flat, a fresh tensor."""
        values = self.flat[piece.start : piece.stop].to(self.dtype)
        values = values.to(torch.float32, copy=self.dtype == torch.float32)
        if self.mean is not None:
            values -= self.mean.float()
        if self.columns is not None and self.row is not None:
            values.view(-1, self.row)[:, self.columns] = 0
        return values


def kept_values(weight: Tensor, dtype: torch.dtype, columns: Tensor | None) -> Tensor | None:
    """Return the values of the kept columns in a 16-bit dtype; None without any.

    Raises:
        WeightError: one is NaN or infinite.
    """
    if columns is None:
        return None
    kept = weight.detach()[:, columns.long()].to(dtype)
    if not bool(kept.isfinite().all()):
        raise non_finite("a kept column of the weight", dtype)
    return kept
