"""Where the original weights of a model are kept: the rule, the memory that it asks about, page-locked host memory."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

SPARE_OF_GPU: Final = 0.25
"""Of a GPU's memory, which stays free beside model and originals: for activations, logits and caches of evaluations.
One that needs more has the originals moved off (``Originals.make_room``)."""
SPARE_OF_HOST: Final = 0.1
"""Of the machine's memory, which stays available beside page-locked originals: locked pages can't be swapped out."""
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_PORTABLE: Final = 1
"""cudaHostRegisterPortable: page-locked for every GPU."""


class Place(StrEnum):
    """Where the originals of weights on a GPU are kept. Those of weights on a CPU lie beside them in host memory."""

    GPU = "beside the weights on the GPU"
    LOCKED = "page-locked host memory"
    HOST = "host memory"


@dataclass(frozen=True, kw_only=True)
class Room:
    """Memory in bytes, of a GPU or of the machine.

    Attributes:
        needed: by the originals of the weights there.
        free: without them.
        total: all there is.
    """

    needed: int
    free: int
    total: int

    def leaves(self, share: float) -> bool:
        """Tell whether this share of all stays free beside the originals."""
        return self.free - self.needed >= share * self.total


def place_for(gpus: Sequence[Room], host: Room) -> Place:
    """Decide where the originals of weights on GPUs are kept: the rule.

    On the GPUs where each has a quarter of its memory left then; else in page-locked host memory where the machine has
    a tenth of its memory left; else in host memory as it is, which takes as much as a cell takes without kept
    originals. Against the limit of a control group locked pages count as others do.
    """
    if all(gpu.leaves(SPARE_OF_GPU) for gpu in gpus):
        return Place.GPU
    return Place.LOCKED if host.leaves(SPARE_OF_HOST) else Place.HOST


def gpu_room(device: torch.device, needed: int) -> Room:
    """Return the memory of a GPU; what torch's allocator holds in reserve is free."""
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Room(needed=needed, free=free, total=total)


def host_room(needed: int) -> Room:
    """Return the machine's memory (proc(5), MemAvailable); none is free where that can't be read."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    kilobytes = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines)}
    free, total = (1024 * kilobytes.get(key, 0) for key in ("MemAvailable", "MemTotal"))
    return Room(needed=needed, free=free, total=total)


def host_like(values: Tensor) -> Tensor:
    """Return an empty host tensor of this shape, dtype and order in memory, whose pages hold nothing else.

    A page can't be locked twice, and small tensors would share theirs.
    """
    like = torch.empty_like(values, device="meta")
    memory = torch.empty(_in_pages(like.nbytes) + _PAGE, dtype=torch.uint8)
    first = -memory.data_ptr() % _PAGE
    flat = memory[first : first + like.nbytes].view(like.dtype)
    return flat.as_strided(like.shape, like.stride(), flat.storage_offset())


def lock_pages(host: Tensor, *, owner: object, gpu: torch.device) -> bool:
    """Page-lock the memory of a ``host_like`` tensor as long as its owner lives; tell whether it could be.

    A GPU copies from such memory at the rate of its link. torch's own page-locked allocator rounds sizes up to powers
    of two, and keeps what is freed.
    """
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if cudart.cudaHostRegister(host.data_ptr(), _in_pages(host.nbytes), _PORTABLE) != cudart.cudaError.success:
        # CUDA tells the next who asks of a failure once more: that is torch, after a launch.
        with suppress(RuntimeError):
            torch.zeros(1, device=gpu)
        return False
    # The finalizer holds the tensor: memory is unlocked before it is freed, and not while it is copied from.
    weakref.finalize(owner, _unlock_pages, host, gpu).atexit = False
    return True


def _in_pages(nbytes: int) -> int:
    """Return the bytes of as many whole pages as hold so many."""
    return -(-nbytes // _PAGE) * _PAGE


def _unlock_pages(host: Tensor, gpu: torch.device) -> None:
    torch.cuda.synchronize(gpu)
    torch.cuda.cudart().cudaHostUnregister(host.data_ptr())  # type: ignore[no-untyped-call]
