"""A linear layer of LLM.int8(): int8 weights and activations, outlier dimensions of each sequence in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kbit.packed.linear import wide_product
from kbit.quantizer.int8 import LARGEST_CODE, Int8Rows, dequantize_rows, to_codes
from kbit.quantizer.storage import divided

_LEAST_ROWS: Final = 17
"""Rows from which torch multiplies int8 on a GPU; columns and outputs are multiples of 8 there."""


@dataclass(kw_only=True)
class Sequences:
    """What a model's layers were last given: some of them get their tokens without the batch's shape.

    Attributes:
        count: sequences.
        length: tokens of each.
        share: of their input dimensions that were outliers, when that was last asked; None before.
    """

    count: int = 0
    length: int = 0
    share: float | None = None


_SEQUENCES: Final[WeakKeyDictionary[nn.Module, Sequences]] = WeakKeyDictionary()


def sequences_of(model: nn.Module) -> Sequences:
    """Return what the layers of one model share."""
    return _SEQUENCES.setdefault(model, Sequences())


class Int8Linear(nn.Module):
    """y = x · W^T + bias by LLM.int8() (Dettmers et al. 2022, section 3.2), for inference.

    An input dimension that reaches the threshold anywhere in a sequence is multiplied in 16 bits for that sequence,
    with the dequantized weights; the others in int8 with a scale per token, summed in int32. The published code looks
    at the whole batch at once, so that its results depend on it; here they don't.

    Args:
        q: the weight.
        bias: [out_features], or None.
        dtype: of the x to come, which casting the model changes.
        threshold: magnitude from which a dimension is an outlier.
        sequences: shared by the layers of a model.

    Attributes:
        of_sequences: a sequence is not to be padded, nor to share its beginning (``kbit.evaluation.sharing``).
    """

    of_sequences: ClassVar[bool] = True
    codes: Tensor
    absmax: Tensor
    bias: Tensor | None

    def __init__(
        self, q: Int8Rows, *, bias: Tensor | None, dtype: torch.dtype, threshold: float, sequences: Sequences
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = q.codes.shape
        self.storage_dtype, self.dtype, self.threshold = q.storage_dtype, dtype, threshold
        self._sequences = sequences
        self._outliers: Tensor | None = None
        self._seen = 0
        self.register_buffer("codes", q.codes)
        self.register_buffer("absmax", q.absmax)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [sequences, length, in_features], or the same tokens without the batch's shape, to out_features.

        Raises:
            ValueError: tokens whose sequences are not known.
        """
        tokens = self._by_sequence(x)
        is_outlier = (tokens.abs() >= self.threshold).any(1, keepdim=True)
        self._count(is_outlier)
        rows = tokens.masked_fill(is_outlier, 0).reshape(-1, self.in_features).float()
        scale = rows.abs().amax(1)
        y = int8_product(to_codes(rows, scale), self.codes).float()
        y *= divided(scale, LARGEST_CODE).unsqueeze(1) * divided(self.absmax.float(), LARGEST_CODE)
        columns = is_outlier.any(0).view(-1).nonzero().view(-1)
        if len(columns):
            kept = torch.where(is_outlier, tokens, 0).index_select(-1, columns).reshape(-1, len(columns))
            y += wide_product(kept.to(self.storage_dtype), values=dequantize_rows(self._weight(), columns))
        if self.bias is not None:
            y += self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def take_share(self) -> tuple[float, int]:
        """Return the sequences' outlier dimensions since the last call, and all their dimensions."""
        outliers, seen = 0.0 if self._outliers is None else float(self._outliers), self._seen
        self._outliers, self._seen = None, 0
        return outliers, seen

    def dequantize(self) -> Tensor:
        """Return the weight that the layer stands for: [out_features, in_features] in 16 bits."""
        return dequantize_rows(self._weight())

    def _weight(self) -> Int8Rows:
        return Int8Rows(codes=self.codes, absmax=self.absmax, storage_dtype=self.storage_dtype)

    def _by_sequence(self, x: Tensor) -> Tensor:
        """Return x as [sequences, length, in_features]."""
        known = self._sequences
        if x.ndim == 3:
            known.count, known.length = x.shape[0], x.shape[1]
            return x
        if x.ndim != 2 or x.shape[0] != known.count * known.length:
            raise ValueError(
                f"llm_int8 needs to know which tokens are a sequence's, and this layer got {list(x.shape)}: "
                "this architecture can't be quantized so"
            )
        return x.view(known.count, known.length, -1)

    def _count(self, is_outlier: Tensor) -> None:
        found = is_outlier.sum()
        self._outliers = found if self._outliers is None else self._outliers + found
        self._seen += is_outlier.numel()

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:  # noqa: ARG002  # torch's signature
        """Move everything; cast the bias alone."""
        self.dtype = fn(torch.empty(1, dtype=self.dtype, device=self.codes.device)).dtype
        self.codes, self.absmax = fn(self.codes), fn(self.absmax.view(torch.int16)).view(torch.float16)
        if self.bias is not None:
            self.bias = fn(self.bias)
        return self


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x · weight^T of int8 [m, k] and [n, k] in int32 [m, n], exactly."""
    rows, (outputs, columns) = x.shape[0], weight.shape
    if not x.is_cuda:
        return torch._int_mm(x, weight.t())
    if columns % 8 or outputs % 8:
        return (x.double() @ weight.double().t()).to(torch.int32)  # sums of up to 2^39 such products are exact
    if rows < _LEAST_ROWS:
        x = torch.nn.functional.pad(x, (0, 0, 0, _LEAST_ROWS - rows))
    return torch._int_mm(x, weight.t())[:rows]


def outlier_share(model: nn.Module) -> float | None:
    """Return the share of input dimensions that were outliers since the last call, over layers and sequences.

    Where no layer ran since then it is what was returned then; None where none ever did.
    """
    known = sequences_of(model)
    shares = [module.take_share() for module in model.modules() if isinstance(module, Int8Linear)]
    seen = sum(count for _, count in shares)
    if seen:
        known.share = sum(found for found, _ in shares) / seen
    return known.share
