"""What enters the layers of a block, told while it runs: of linear layers by hooks, of stacks by their products.

A stack (experts) is no module whose calls could be seen: its module multiplies by views of one parameter, expert by
expert, or all at once. So the products of the block are looked at, and those by a stack's matrices are told apart by
where these lie in memory. The block computes what it computes without being watched, by whatever implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kbit.errors import ArchitectureError
from kbit.models.architectures import Layer

Watch = Callable[[Layer, Tensor], None]
"""Told a layer and its input, [tokens, in_features]."""

_GROUPED: Final = frozenset({"_grouped_mm", "grouped_mm", "grouped_mm_fallback"})
"""Products of rows sorted by the matrix that each is multiplied by; `offs`, or the last argument, has their ends."""
_PRODUCTS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("linear", "matmul", "__matmul__", "mm", "bmm", *_GROUPED), 0),
    **dict.fromkeys(("addmm", "baddbmm"), 1),
}
"""torch's products by name, with the place of their left factor."""


@contextmanager
def watching(layers: Sequence[Layer], watch: Watch) -> Iterator[None]:
    """Have `watch` told the inputs of a block's layers for a while (``kbit.methods.protocol.Block.run``).

    Args:
        layers: the block's. While it is watched, their parameters stay where they are.
        watch: told each layer's input per batch; a matrix of a stack only what is sent to it, and nothing where no
            token is. Rows of zeros that one product for all experts has for tokens of others are left out.

    Raises:
        ArchitectureError: a stack's module was called, and multiplied by it in a way that isn't seen.
    """
    stacks: dict[int, _StackProducts] = {}
    for layer in layers:
        if layer.stack is not None:
            stacks.setdefault(id(layer.parameter), _StackProducts(first=layer)).add(layer)
    with ExitStack() as stack:
        for layer in layers:
            if layer.stack is None:
                stack.enter_context(_hooked(layer, watch))
        if stacks:
            for one in stacks.values():
                handle = one.first.module.register_forward_pre_hook(one.note_call, with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(_Products(list(stacks.values()), watch))
        yield
    for one in stacks.values():
        one.check()


@contextmanager
def _hooked(layer: Layer, watch: Watch) -> Iterator[None]:
    def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
        watch(layer, given[0].reshape(-1, given[0].shape[-1]))

    handle = layer.module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@dataclass(kw_only=True, eq=False)
class _StackProducts:
    """The matrices of one stack, and whether products by them are seen.

    Attributes:
        first: a layer of the stack.
        layers: all of them, by their number.
    """

    first: Layer
    layers: dict[int, Layer] = field(default_factory=dict)
    _called: bool = False
    _seen: bool = False

    def add(self, layer: Layer) -> None:
        assert layer.number is not None
        self.layers[layer.number] = layer

    def note_call(self, _: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Note that the stack's module was called with anything (a forward pre-hook)."""
        entering = next((x for x in (*given, *named.values()) if isinstance(x, Tensor)), None)
        self._called = self._called or (entering is not None and entering.numel() > 0)

    def numbers(self, weight: Tensor) -> dict[tuple[int, ...], int] | None:
        """Return the numbers of the matrices that a factor [..., in_features, out_features] is, by leading index.

        None where it is no view of the stack, or one of anything but whole matrices.
        """
        values, matrix = self.first.parameter.detach(), self.first.working
        start = weight.data_ptr() - values.data_ptr()
        if weight.ndim < 2 or weight.device != values.device or not 0 <= start < values.nbytes:
            return None
        if weight.dtype != values.dtype or weight.mT.shape[-2:] != matrix.shape:
            return None
        if weight.mT.stride()[-2:] != matrix.stride():
            return None
        places = {}
        for index in product(*map(range, weight.shape[:-2])):
            offset = start // values.itemsize + sum(i * step for i, step in zip(index, weight.stride(), strict=False))
            number, rest = divmod(offset, matrix.numel())
            if rest or number not in self.layers:
                return None
            places[index] = number
        return places

    def tell(self, watch: Watch, number: int, x: Tensor) -> None:
        """Tell an input [..., in_features] of one of the matrices."""
        self._seen = True
        x = x.reshape(-1, x.shape[-1])
        if len(x):
            watch(self.layers[number], x)

    def check(self) -> None:
        if self._called and not self._seen:
            assert self.first.stack is not None
            name = self.first.name.rpartition(".")[0]
            raise ArchitectureError(
                f"what enters the matrices of {name} can't be seen: {type(self.first.module).__name__} multiplies by "
                "them in a way that kbit.models.entering doesn't know. Use a method that does not calibrate"
            )


class _Products(TorchFunctionMode):
    """Looks at torch's products for those by matrices of stacks."""

    def __init__(self, stacks: Sequence[_StackProducts], watch: Watch) -> None:
        super().__init__()
        self._stacks, self._watch = stacks, watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, named = getattr(func, "__name__", ""), kwargs or {}
        place = _PRODUCTS.get(name)
        if place is not None and len(args) >= place + 2:
            left, right = args[place : place + 2]
            if name in _GROUPED:
                self._look_sorted(left, right, named.get("offs", args[-1]))
            else:
                self._look(left, right.mT if name == "linear" else right)
        return func(*args, **named)

    def _look_sorted(self, rows: Tensor, weight: Tensor, ends: Tensor) -> None:
        for stack in self._stacks:
            numbers = stack.numbers(weight)
            if numbers is None or weight.ndim != 3:
                continue
            first = 0
            for number, end in zip(numbers.values(), ends.tolist(), strict=True):
                stack.tell(self._watch, number, rows[first:end])
                first = end

    def _look(self, left: Tensor, right: Tensor) -> None:
        """Tell the other factor of ``left @ right`` where one is of a stack."""
        for stack in self._stacks:
            if (numbers := stack.numbers(right)) is not None:
                self._tell(stack, numbers, left, right.shape[:-2])
            elif left.ndim > 1 and right.ndim > 1 and (numbers := stack.numbers(left.mT)) is not None:
                self._tell(stack, numbers, right.mT, left.shape[:-2])

    def _tell(
        self, stack: _StackProducts, numbers: Mapping[tuple[int, ...], int], x: Tensor, leading: torch.Size
    ) -> None:
        """Tell each matrix its part of a factor, whose leading dimensions are broadcast with the matrices'."""
        if not leading:
            stack.tell(self._watch, numbers[()], x)
            return
        batch = torch.broadcast_shapes(x.shape[:-2], leading)  # type: ignore[no-untyped-call]
        x = x.expand(*batch, *x.shape[-2:])
        before = [slice(None)] * (len(batch) - len(leading))
        for index, number in numbers.items():
            place = [i if count > 1 else slice(None) for i, count in zip(index, leading, strict=True)]
            part = x[(*before, *place)].flatten(0, -2)
            # Every matrix multiplies every token here: those of others are rows of zeros, if any.
            sent = part.any(1)
            stack.tell(self._watch, number, part if bool(sent.all()) else part[sent])
