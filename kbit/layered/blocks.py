"""Where the blocks of a model come from, one at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kbit.errors import ArchitectureError
from kbit.models.architectures import decoder_blocks, key_of
from kbit.models.streaming.streamed import Streamed


class Blocks(Protocol):
    """A model of which everything but its blocks lies on the device, and the blocks come one after another."""

    @property
    def model(self) -> Any:
        """The model, an nn.Module. The weights of its blocks are elsewhere, or on the meta device."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def on_device(self, number: int) -> AbstractContextManager[nn.Module]:
        """Have a block's 16-bit weights on the device, in the compute dtype.

        At the end its parameters hold the original values again, or it is asked for no more.
        """

    def ahead(self, number: int) -> None:
        """Begin to fetch a block that is wanted next; it may take as much memory again as the one in use."""


class HostBlocks:
    """Blocks of a model that host memory holds whole, and the device doesn't.

    Args:
        model: on the CPU, in the compute dtype. Everything but its blocks is moved to the device.
        device: where it computes; on a CPU nothing is copied.
    """

    def __init__(self, model: nn.Module, device: torch.device | str) -> None:
        self.model, self.device = model, exact(device)
        self._blocks = list(decoder_blocks(model)[1])
        check_apart(model, self._blocks)
        move_rest(model, self._blocks, self.device)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._coming: tuple[int, Future[list[Tensor]]] | None = None

    @contextmanager
    def on_device(self, number: int) -> Iterator[nn.Module]:
        block = self._blocks[number]
        own = {p: p.data for p in block.parameters()}
        for parameter, values in zip(own, self._fetched(number), strict=True):
            parameter.data = values
        try:
            yield block
        finally:
            for parameter, values in own.items():
                parameter.data = values

    def ahead(self, number: int) -> None:
        if self.device.type == "cuda" and number < len(self._blocks):
            self._coming = number, self._thread.submit(self._copies, number)

    def _fetched(self, number: int) -> list[Tensor]:
        coming, self._coming = self._coming, None
        if coming is None:
            return self._copies(number)
        values = coming[1].result()
        return values if coming[0] == number else self._copies(number)

    def _copies(self, number: int) -> list[Tensor]:
        parameters = list(self._blocks[number].parameters())
        if self.device.type == "cpu":
            return [p.data for p in parameters]
        stream: Any = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            values = [p.data.to(self.device) for p in parameters]
        stream.synchronize()
        return values


class StreamedBlocks:
    """Blocks of a model whose weights are read from its files, once a pass; the next ones while one is in use.

    Args:
        streamed: the model. Everything but its blocks is read onto the device at once.
        device: where it computes.
    """

    def __init__(self, streamed: Streamed, device: torch.device | str) -> None:
        self.model, self.device = streamed.model, exact(device)
        self._streamed = streamed
        prefix, modules = decoder_blocks(self.model)
        self._blocks = list(modules)
        check_apart(self.model, self._blocks)
        names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        self._names = [[n for n in names if n.startswith(f"{prefix}.{i}.")] for i in range(len(self._blocks))]
        streamed.fill([name for name in names if not name.startswith(f"{prefix}.")], self.device)
        move_rest(self.model, self._blocks, self.device)
        self._reading: Iterator[Collection[str]] | None = None
        self._next = 0
        self._held: int | None = None

    @contextmanager
    def on_device(self, number: int) -> Iterator[nn.Module]:
        if self._held != number:
            self._leave()
            if self._reading is None or self._next != number:
                self._reading = self._read_from(number)
            next(self._reading)
            self._held, self._next = number, number + 1
        yield self._blocks[number]
        # Kept until another is wanted: the first one is asked for twice.
        if number == len(self._blocks) - 1:
            self._leave()

    def ahead(self, number: int) -> None:
        """Do nothing: what comes next is being read."""

    def _read_from(self, number: int) -> Iterator[Collection[str]]:
        self._reading = None  # ends the threads of the one before
        names = self._names[number:]
        ahead = max(map(self._streamed.nbytes, names))
        return self._streamed.each([(of_block, self.device) for of_block in names], ahead=ahead)

    def _leave(self) -> None:
        if self._held is not None:
            self._streamed.empty(self._names[self._held])
            self._held = None


def exact(device: torch.device | str) -> torch.device:
    """Return a device with its number."""
    found = torch.device(device)
    if str(found) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return found


def check_apart(model: nn.Module, blocks: list[nn.Module]) -> None:
    """Refuse a model whose blocks share weights: a block that is left would leave another's weight changed.

    Raises:
        ArchitectureError: two blocks share a parameter.
    """
    owners: dict[tuple[object, ...], int] = {}
    for number, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            first = owners.setdefault(key_of(parameter), number)
            if first != number:
                raise ArchitectureError(
                    f"{type(model).__name__} can't run layer by layer: its block {number} shares {name} with block "
                    f"{first}"
                )


def move_rest(model: nn.Module, blocks: list[nn.Module], device: torch.device) -> None:
    """Move everything but the parameters of the blocks: also their buffers, which are small."""
    inside = {id(p) for block in blocks for p in block.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
