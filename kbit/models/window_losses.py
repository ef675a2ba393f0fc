"""Losses of token windows by a model in memory; from a block on, where what enters it is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kbit.models.activations import Activations


@dataclass(kw_only=True, eq=False)
class WindowLosses:
    """The losses of a model, as it is now, on the same windows again and again.

    Attributes:
        module: the model.
        blocks: its blocks, in order.
        tokens: windows, int64 [windows, length].
        per_batch: windows that run at once.
    """

    module: nn.Module
    blocks: Sequence[nn.Module]
    tokens: Tensor
    per_batch: int
    _others: dict[int, int | None] = field(default_factory=dict)  # by block, what it gives beside hidden states

    def __call__(self, number: int = 0, entering: Activations | None = None) -> Tensor:
        """Return the mean loss of each window, its first token not scored: nats, float64 [windows], on the host.

        Args:
            number: the first block to run.
            entering: what enters it, in batches as here; None runs the whole model.
        """
        device = self.module.get_input_embeddings().weight.device  # type: ignore[operator]
        found = []
        with torch.no_grad():
            for batch_number, batch in enumerate(torch.split(self.tokens, self.per_batch)):
                states = None if entering is None else entering.hidden[batch_number]
                with self._watched() if states is None else self._from(number, states):
                    logits = self.module(batch.to(device), use_cache=False).logits
                targets = batch.to(logits.device)
                for own, of in zip(logits, targets, strict=True):  # logits of a window in float32 are large
                    found.append(nn.functional.cross_entropy(own[:-1].float(), of[1:]))
        return torch.stack(found).double().cpu()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Note the form of what blocks give."""

        def note(block: int) -> Callable[..., None]:
            def hook(_: nn.Module, __: object, out: Any) -> None:
                self._others[block] = len(out) - 1 if isinstance(out, tuple) else None

            return hook

        with ExitStack() as stack:
            for block, module in enumerate(self.blocks):
                stack.callback(module.register_forward_hook(note(block)).remove)
            yield

    @contextmanager
    def _from(self, number: int, states: Tensor) -> Iterator[None]:
        """Have the blocks before one hand on what they are given, and that one take states."""

        def enter(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            own = states.to(next(module.parameters()).device, copy=True)  # a block may write into what it is given
            return ((own, *given[1:]), named) if given else ((), named | {"hidden_states": own})

        with ExitStack() as stack:
            for block, module in enumerate(self.blocks[:number]):
                stack.enter_context(_handing_on(module, self._others[block]))
            handle = self.blocks[number].register_forward_pre_hook(enter, with_kwargs=True)
            stack.callback(handle.remove)
            yield


@contextmanager
def _handing_on(module: nn.Module, others: int | None) -> Iterator[None]:
    """Have a block give what it is given, and None for whatever else it gives."""
    own = module.__dict__.get("forward")  # of a model that is spread over devices

    def forward(*given: Any, **named: Any) -> Any:
        states = given[0] if given else named["hidden_states"]
        return states if others is None else (states, *[None] * others)

    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
