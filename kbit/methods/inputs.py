"""What a method that calibrates learns of the inputs of a block's layers: magnitudes, squares, products within groups.

Layers that are given the same tensor (Q, K and V; a gate and its up projection) share what is learned.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kbit.errors import ActivationError
from kbit.models.architectures import Layer
from kbit.specs.base import ROW


@dataclass(kw_only=True, eq=False)
class InputSums:
    """Sums over the tokens of one input.

    Attributes:
        tokens: how many.
        magnitudes, squares: float64 [in_features], of |x| and x^2.
        products: float32 [groups, size, size], of x x^T within groups of columns; None where they are not asked for.
    """

    magnitudes: Tensor
    squares: Tensor
    products: Tensor | None = None
    tokens: int = 0


@dataclass(kw_only=True, eq=False)
class SharedInputs:
    """Which layers of a block are given the same tensor, by what each was given in its first batch.

    Attributes:
        shared: by layer, the first layer that is given its input.
    """

    shared: dict[str, str] = field(default_factory=dict)
    # Of the first batch: inputs are held, so that no other tensor comes to lie where one of them lay; with the count of
    # their changes in place, since one that was changed between two layers is not the same to both.
    _held: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)

    def is_first(self, layer: str, x: Tensor) -> bool:
        """Tell whether a layer is the first of those that are given its input, which is what it is given now."""
        if layer in self._seen:  # a second batch
            self.let_go()
        self._seen.add(layer)
        if layer not in self.shared:
            first = next((name for name, held in self._held.items() if _is_same(x, *held)), layer)
            self.shared[layer] = first
            self._held.setdefault(first, (x, _changes(x)))
        return self.shared[layer] == layer

    def let_go(self) -> None:
        """Hold no input any more."""
        self._held.clear()


@dataclass(kw_only=True, eq=False)
class BlockInputs(SharedInputs):
    """Inputs of the layers of one block, by what `add`, which watches the block run, has seen.

    Attributes:
        group_size: of the columns whose products are summed, or ``ROW`` for all columns; None sums none.
    """

    group_size: int | None = None
    _sums: dict[str, InputSums] = field(default_factory=dict)

    def add(self, layer: Layer, x: Tensor) -> None:
        """Take in the input of a layer, [tokens, in_features], for a batch; no tokens are as if it was not called."""
        if not len(x):
            return
        if self.is_first(layer.name, x):
            self._take(layer.name, x.float())

    def of(self, layer: str) -> InputSums | None:
        """Return the sums of a layer's input; None where no token reached it.

        Raises:
            ActivationError: they are NaN or infinite.
        """
        self.let_go()
        sums = self._sums.get(self.shared.get(layer, layer))
        if sums is not None and not bool(sums.squares.isfinite().all()):
            raise ActivationError(
                f"inputs of {layer} on calibration data are NaN or infinite, or their squares too large for float32: "
                "compute in a dtype of wider range (calibration.compute_dtype=bfloat16 or float32)"
            )
        return sums

    def means(self, layer: Layer) -> InputSums:
        """Return the means of |x| and x^2 of a layer's input; zeros where no token reached it."""
        sums = self.of(layer.name)
        if sums is None:
            zeros = torch.zeros(layer.shape[1], dtype=torch.float64, device=layer.weight.device)
            return InputSums(magnitudes=zeros, squares=zeros)
        return InputSums(
            magnitudes=sums.magnitudes / sums.tokens, squares=sums.squares / sums.tokens, tokens=sums.tokens
        )

    def groups(self, layers: tuple[Layer, ...]) -> list[list[Layer]]:
        """Return layers in lists of those that share an input, in their order."""
        found: dict[str, list[Layer]] = {}
        for layer in layers:
            found.setdefault(self.shared.get(layer.name, layer.name), []).append(layer)
        return list(found.values())

    def _take(self, name: str, x: Tensor) -> None:
        sums = self._sums.get(name)
        if sums is None:
            zeros = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
            sums = self._sums[name] = InputSums(magnitudes=zeros, squares=zeros.clone())
        sums.tokens += len(x)
        sums.magnitudes += x.abs().sum(0)
        sums.squares += x.square().sum(0)
        if self.group_size is not None:
            size = x.shape[1] if self.group_size == ROW else min(self.group_size, x.shape[1])
            grouped = torch.nn.functional.pad(x, (0, -x.shape[1] % size)).view(len(x), -1, size).transpose(0, 1)
            products = torch.bmm(grouped.transpose(1, 2), grouped)
            sums.products = products if sums.products is None else sums.products.add_(products)


def _is_same(x: Tensor, held: Tensor, changes: int) -> bool:
    """Tell whether a layer is given the very tensor that another was given, unchanged since."""
    places = [(t.device, t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (x, held)]
    return places[0] == places[1] and _changes(x) == changes


def _changes(x: Tensor) -> int:
    """Return how often a tensor was changed in place; inference tensors don't count it."""
    return 0 if x.is_inference() else x._version
