"""A pass over a model that lies whole in memory: the first implementation of ``kbit.methods.protocol.ModelPass``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor, nn

from kbit.calibration import WINDOWS_PER_BATCH
from kbit.errors import SeenError
from kbit.models.activations import Activations, BlockArguments
from kbit.models.architectures import Layer, block_layers, decoder_blocks, key_of
from kbit.models.entering import watching
from kbit.models.originals import Fitted, Originals
from kbit.models.outliers import outlier_columns
from kbit.models.window_losses import WindowLosses

OUTSIDE: Final = -1
"""The block number of a layer that lies in no block."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WholeBlock:
    """One block of a model in memory.

    Attributes:
        number, layers: see ``kbit.methods.protocol.Block``.
        module: the block.
        dtype: what it computes in; None is its own.
    """

    number: int
    layers: tuple[Layer, ...]
    module: nn.Module
    dtype: torch.dtype | None = None

    def run(self, before: Activations, *, watch: Callable[[Layer, Tensor], None] | None = None) -> Activations:
        after = [parked(out) for out in self.outputs(before, watch=watch)]
        return Activations(hidden=after, arguments=before.arguments)

    def look(self, before: Activations, watch: Callable[[Layer, Tensor], None]) -> None:
        for _ in self.outputs(before, watch=watch):
            pass

    def outputs(self, before: Activations, *, watch: Callable[[Layer, Tensor], None] | None = None) -> Iterator[Tensor]:
        device = next(self.module.parameters()).device
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(computing_in(self.module, self.dtype))
            if watch is not None:
                stack.enter_context(watching(self.layers, watch))
            for hidden, arguments in zip(before.hidden, before.arguments[self.number], strict=True):
                # A copy on a CPU too: a block may write into what it is given, and it is run again on what was kept.
                entering = hidden.to(device, non_blocking=True, copy=True)
                out = self.module(entering, *arguments.rest, **arguments.named)
                yield out[0] if isinstance(out, tuple) else out


@dataclass(frozen=True, kw_only=True, eq=False)
class WholeModel:
    """A causal language model in memory.

    Attributes:
        module: the model.
        storage_dtype: see ``kbit.methods.protocol.ModelPass``.
        compute_dtype: what calibration computes in; None is the model's dtype.
        originals: its weights, where they are kept; None reads the parameters.
    """

    module: nn.Module
    storage_dtype: torch.dtype | None = None
    compute_dtype: torch.dtype | None = None
    originals: Originals | None = None

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers of all blocks, in order; looked for once."""
        return block_layers(self.module) if self.originals is None else self.originals.layers

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype or embedding_dtype(self.module)

    @cached_property
    def fitted(self) -> Fitted:
        return {} if self.originals is None else self.originals.fitted

    def blocks(self) -> Iterator[WholeBlock]:
        of_block: dict[int, list[Layer]] = {}
        for layer in self.layers:
            of_block.setdefault(layer.block, []).append(layer)
        for number, module in enumerate(decoder_blocks(self.module)[1]):
            layers = tuple(of_block.get(number, ()))
            if self.originals is not None:
                self.originals.arrive(layers)
            yield WholeBlock(number=number, layers=layers, module=module, dtype=self.compute_dtype)

    @torch.no_grad()
    def start(self, tokens: Tensor) -> Activations:
        """Run the model once per batch, and keep what enters its blocks: hidden states on the host."""
        if self.originals is not None:
            self.originals.finish()  # what an earlier cell left
        modules = decoder_blocks(self.module)[1]
        hidden: list[Tensor] = []
        arguments: list[list[BlockArguments]] = [[] for _ in modules]

        def keep(number: int) -> Callable[..., None]:
            def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
                states, rest = (given[0], given[1:]) if given else (named["hidden_states"], ())
                if number == 0:
                    hidden.append(parked(states))
                others = {k: v for k, v in named.items() if k != "hidden_states"}
                before = arguments[number][0] if arguments[number] else None
                arguments[number].append(BlockArguments(rest=tuple(rest), named=others).like(before))
                if number == len(modules) - 1:
                    raise SeenError  # what comes after it, the logits above all, is not needed

            return hook

        handles = [m.register_forward_pre_hook(keep(n), with_kwargs=True) for n, m in enumerate(modules)]
        device = self.module.get_input_embeddings().weight.device  # type: ignore[operator]
        try:
            with computing_in(self.module, self.compute_dtype):
                for batch in torch.split(tokens, WINDOWS_PER_BATCH):
                    with suppress(SeenError):
                        self.module(batch.to(device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return Activations(hidden=hidden, arguments=arguments)

    @contextmanager
    def scoring(self, tokens: Tensor) -> Iterator[WindowLosses]:
        if self.originals is not None:
            self.originals.finish()  # what an earlier cell left
        blocks = list(decoder_blocks(self.module)[1])
        with computing_in(self.module, self.compute_dtype):
            yield WindowLosses(module=self.module, blocks=blocks, tokens=tokens, per_batch=WINDOWS_PER_BATCH)

    def outlier_columns(self, fraction: float) -> Mapping[str, Tensor | None]:
        if self.originals is not None:
            return self.originals.outlier_columns(fraction, self.storage_dtype)
        return outlier_columns(self.module, fraction, storage_dtype=self.storage_dtype)

    @property
    def embedding(self) -> Layer | None:
        return self._outside(self.module.get_input_embeddings())  # type: ignore[operator]

    @property
    def head(self) -> Layer | None:
        head, embedding = self._outside(self.module.get_output_embeddings()), self.embedding  # type: ignore[operator]
        if head is None or (embedding is not None and key_of(head.parameter) == key_of(embedding.parameter)):
            return None
        return head

    def outside(self, name: str) -> Layer:
        layer = Layer(name=name, block=OUTSIDE, module=self.module.get_submodule(name))
        return layer if self.originals is None else self.originals.outside(layer)

    def _outside(self, module: nn.Module | None) -> Layer | None:
        name = next((n for n, m in self.module.named_modules() if m is module), None)
        if module is None or name is None:
            return None
        return self.outside(name)


def parked(hidden: Tensor) -> Tensor:
    """Return hidden states on the host, in page-locked memory where they come from a GPU."""
    if not hidden.is_cuda:
        return hidden
    host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
    return host.copy_(hidden)


def embedding_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of a model's input embedding: what the model computes in."""
    found: torch.dtype = module.get_input_embeddings().weight.dtype  # type: ignore[operator]
    return found


@contextmanager
def computing_in(module: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Have a module's parameters in another dtype for a while; buffers, such as rotary frequencies, stay as they are.

    The parameters themselves are kept, and come back as they were: the model then takes half as much memory again.
    Layers held in k bits take inputs of the dtype, and keep their bias the same way.
    """
    from kbit.packed.base import PackedLinear  # what holds layers in k bits stands on models

    before = {p: p.data for p in module.parameters() if dtype is not None and p.dtype != dtype}
    packed = [m for m in module.modules() if isinstance(m, PackedLinear) and dtype is not None and m.dtype != dtype]
    of_packed = [(m, m.dtype, m.bias) for m in packed]
    for parameter in before:
        parameter.data = parameter.data.to(dtype)
    for layer in packed:
        layer.to(dtype)
    try:
        yield
    finally:
        for layer, own_dtype, bias in of_packed:
            layer.to(own_dtype)
            layer.bias = bias
        for parameter, own in before.items():
            parameter.data = own
