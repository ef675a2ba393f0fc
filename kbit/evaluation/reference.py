"""What is kept of the 16-bit model to compare others with: the states that enter its head, and the head.

Logits are never kept: of 524,288 tokens and a vocabulary of 50,000 they would be 52 GB in 16 bits. The states are 2 GB
for a hidden size of 2,048, and the head gives the same logits from them again.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from kbit.models.places import host_like, lock_pages

MEMORY_BYTES: Final = 2**32
"""States of up to 4 GiB lie in the host's memory; more of them in a file of the temporary directory (``TMPDIR``)."""
COMPARED_AT_ONCE: Final = 2**24
SENT_AHEAD: Final = 1
"""Batches of states that are on their way to a GPU while it works on one."""


class KeptHead:
    """A model's head with its weights as they were: those of the model where they still are, else a copy.

    Most methods leave the head alone. That it is unchanged is not believed but looked at: its parameters are compared
    with the copy, which lies in the host's memory (of 50,000 tokens and 2,048 dimensions 200 MB in 16 bits); page-
    locked where a GPU is to read it for every cell.

    Args:
        head: a model's output embeddings, in its 16-bit form.
    """

    def __init__(self, head: nn.Module) -> None:
        self.module = head
        self._kept = {name: self._copied(p.detach()) for name, p in head.named_parameters()}

    def original(self) -> Callable[[Tensor], Tensor]:
        """Return the head as it was, a function from states [..., hidden] to logits [..., vocabulary]."""
        now = dict(self.module.named_parameters())
        if now.keys() == self._kept.keys() and all(_equal(now[name], kept) for name, kept in self._kept.items()):
            return self.module
        device = next(iter(now.values())).device
        weights = {name: kept.to(device) for name, kept in self._kept.items()}
        return lambda states: functional_call(self.module, weights, (states,))

    def _copied(self, weight: Tensor) -> Tensor:
        host = host_like(weight)
        if weight.is_cuda:
            lock_pages(host, owner=self, gpu=weight.device)
        return host.copy_(weight)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """The 16-bit model's predictions for a text's windows, as what gives them.

    Attributes:
        states: what enters the head, [windows, positions, hidden] in the model's compute dtype, on the host.
        head: the head.
        separable: the head alone gives the logits, and the last position of a window, which predicts nothing of it, is
            left out. Else every position is there, as in a forward pass of the whole model.
    """

    states: Tensor
    head: KeptHead
    separable: bool


def host_rows(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor on the host: in memory up to ``MEMORY_BYTES``, above that in a temporary file.

    The file has no name and goes with the tensor, or with the process, however that ends.

    Raises:
        OSError: the temporary directory has no room for the file. It is taken up at once: a write into a mapped file
            that finds none would kill the process.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    if size <= MEMORY_BYTES:
        return torch.empty(shape, dtype=dtype)
    with tempfile.TemporaryFile(prefix="kbit-reference-") as file:
        os.posix_fallocate(file.fileno(), 0, size)
        mapped: Any = np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,))
    return torch.from_numpy(mapped).view(dtype).view(shape)


def sent_ahead(batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield host tensors on a device. A GPU is sent the next ones while it works on one, and never waits for the host
    to have read one.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    under_way: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def arrived() -> Tensor:
        batch, event = under_way.popleft()
        here = torch.cuda.current_stream(device)
        here.wait_event(event)
        batch.record_stream(here)
        return batch

    for batch in batches:
        with torch.cuda.stream(stream):
            under_way.append((batch.pin_memory().to(device, non_blocking=True), stream.record_event()))
        if len(under_way) > SENT_AHEAD:
            yield arrived()
    while under_way:
        yield arrived()


def _equal(weight: Tensor, kept: Tensor) -> bool:
    """Compare value by value, a piece at a time: on a GPU there is never a second head."""
    if weight.shape != kept.shape or weight.dtype != kept.dtype:
        return False
    pieces = zip(*(torch.split(x.reshape(-1), COMPARED_AT_ONCE) for x in (weight, kept)), strict=True)
    return all(torch.equal(a, b.to(a.device, non_blocking=True)) for a, b in pieces)
