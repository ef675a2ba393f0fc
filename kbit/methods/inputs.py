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

    def within(self, size: int) -> Tensor:
        """Return the products within groups of `size` columns, [groups, size, size], of those of more columns."""
        assert self.products is not None
        if self.products.shape[1] == size:
            return self.products
        [whole] = self.products
        padded = torch.nn.functional.pad(whole, (0, -len(whole) % size) * 2)
        return torch.stack([padded[i : i + size, i : i + size] for i in range(0, len(padded), size)])


@dataclass(kw_only=True, eq=False)
class SharedInputs:
    """Which layers of a block are given the same tensor, by what each was given in its first batch.

    Attributes:
        shared: by layer, the first layer that is given its input.
        tokens: by layer, how many it was given; none of a layer that no token reached.
    """

    shared: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    # Of the first batch: inputs are held, so that no other tensor comes to lie where one of them lay; with the count of
    # their changes in place, since one that was changed between two layers is not the same to both.
    _held: dict[str, tuple[bool, Tensor, int]] = field(default_factory=dict)

    def is_first(self, layer: Layer, x: Tensor) -> bool:
        """Tell whether a layer is the first of those that are given its input, which is what it is given now.

        Matrices of a stack share with one another alone: what is learned of their inputs is another thing.
        """
        name = layer.name
        if name in self.tokens:  # a second batch
            self.let_go()
        self.tokens[name] = self.tokens.get(name, 0) + len(x)
        if name not in self.shared:
            stacked = layer.stack is not None
            alike = (n for n, (s, held, changes) in self._held.items() if s == stacked and _is_same(x, held, changes))
            first = next(alike, name)
            self.shared[name] = first
            self._held.setdefault(first, (stacked, x, _changes(x)))
        return self.shared[name] == name

    def let_go(self) -> None:
        """Hold no input any more."""
        self._held.clear()


@dataclass(kw_only=True, eq=False)
class BlockInputs(SharedInputs):
    """Inputs of the layers of one block, by what `add`, which watches the block run, has seen.

    Attributes:
        group_size: of the columns whose products are summed, or ``ROW`` for all columns; None sums none.
        of_stacks: the same for matrices of stacks.
    """

    group_size: int | None = None
    of_stacks: int | None = None
    _sums: dict[str, InputSums] = field(default_factory=dict)

    def add(self, layer: Layer, x: Tensor) -> None:
        """Take in the input of a layer, [tokens, in_features], for a batch; no tokens are as if it was not called."""
        if not len(x):
            return
        if self.is_first(layer, x):
            self._take(layer.name, x.float(), self.group_size if layer.stack is None else self.of_stacks)

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

    def _take(self, name: str, x: Tensor, group_size: int | None) -> None:
        sums = self._sums.get(name)
        if sums is None:
            zeros = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
            sums = self._sums[name] = InputSums(magnitudes=zeros, squares=zeros.clone())
        sums.tokens += len(x)
        sums.magnitudes += x.abs().sum(0)
        sums.squares += x.square().sum(0)
        if group_size is not None:
            size = x.shape[1] if group_size == ROW else min(group_size, x.shape[1])
            grouped = torch.nn.functional.pad(x, (0, -x.shape[1] % size)).view(len(x), -1, size).transpose(0, 1)
            products = torch.bmm(grouped.transpose(1, 2), grouped)
            sums.products = products if sums.products is None else sums.products.add_(products)


def _is_same(x: Tensor, held: Tensor, changes: int) -> bool:
    """Tell whether a layer is given the very tensor that another was given, unchanged since."""
    if x.data_ptr() != held.data_ptr():  # of many experts nearly always
        return False
    places = [(t.device, t.shape, t.stride(), t.dtype) for t in (x, held)]
    return places[0] == places[1] and _changes(x) == changes


def _changes(x: Tensor) -> int:
    """Return how often a tensor was changed in place; inference tensors don't count it."""
    return 0 if x.is_inference() else x._version
