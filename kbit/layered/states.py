"""Hidden states between two blocks: where they are kept, and how they get there and back."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from kbit.errors import NoRoomError
from kbit.models.places import Room, host_like, lock_pages

SPARE_OF_HOST: Final = 0.1
"""Of the machine's memory, which stays available beside kept states."""
SPARE_OF_DISK: Final = 0.02
_LEAVING: Final = 2
"""Copies from the GPU that are under way at once: each holds what it copies."""


class StatePlace(StrEnum):
    """Where the hidden states of one forward pass of one cell are kept."""

    DEVICE = "GPU"
    HOST = "host memory"
    FILE = "file"


def place_states(
    sizes: Sequence[int], *, device_free: int, host: Room, disk: Room, directory: Path
) -> tuple[StatePlace, ...]:
    """Decide where hidden states are kept: the rule.

    As many as fit stay on the GPU. If the rest leaves a tenth of the machine's memory available, it is kept in host
    memory, page-locked where there is a GPU; else in a file of the temporary directory, where that leaves 2 % free.

    Args:
        sizes: bytes of the states of each forward pass, in the order in which they are wanted.
        device_free: of the GPU's memory in bytes, without what a block takes; 0 on a CPU.
        host: the machine's memory; ``needed`` is not read.
        disk: of the directory; ``needed`` is not read.
        directory: the temporary directory.

    Raises:
        NoRoomError: they fit nowhere. It names the directory, the bytes and what to do.
    """
    places = []
    for size in sizes:
        places.append(StatePlace.DEVICE if size <= device_free else None)
        device_free -= size if size <= device_free else 0
    rest = sum(size for size, place in zip(sizes, places, strict=True) if place is None)
    other = StatePlace.HOST
    if not Room(needed=rest, free=host.free, total=host.total).leaves(SPARE_OF_HOST):
        other = StatePlace.FILE
        if rest and not Room(needed=rest, free=disk.free, total=disk.total).leaves(SPARE_OF_DISK):
            raise NoRoomError(
                f"the activations of this pass need {rest:,} bytes outside of the GPU: this machine's memory has "
                f"{host.free:,} bytes left, and {directory} {disk.free:,}. Make room there, or set TMPDIR to a "
                "directory with room, or run fewer cells at once (executor.cells_per_job), or less text (eval.tokens, "
                "eval.limit)"
            )
    return tuple(place or other for place in places)


def disk_room(directory: Path) -> Room:
    """Return the room on the disk of a directory."""
    usage = shutil.disk_usage(directory)
    return Room(needed=0, free=usage.free, total=usage.total)


def temporary_directory() -> Path:
    """Return the directory of states that no memory holds: ``TMPDIR``, or the system's."""
    return Path(tempfile.gettempdir())


@dataclass(kw_only=True, eq=False)
class _Kept:
    """The states of one forward pass.

    Attributes:
        values: on the device; or a part of an arena on the host.
        arriving: their copy on the device, with the event at whose end it is there.
        left: the event at whose end the host has them.
    """

    place: StatePlace
    values: Tensor | None = None
    arriving: tuple[Tensor, torch.cuda.Event] | None = None
    left: torch.cuda.Event | None = None


class States:
    """Hidden states of many forward passes, each by its number. Copies between host and GPU run beside the blocks.

    Args:
        shapes: [rows, length, hidden] of each.
        dtype: of all.
        device: where they are computed.
        places: of each (``place_states``).
        directory: of the file, if any. It has no name, and goes with this object or with the process.

    Raises:
        OSError: the file's room is gone.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        dtype: torch.dtype,
        device: torch.device,
        places: Sequence[StatePlace],
        directory: Path,
    ) -> None:
        self.shapes, self.dtype, self.device = tuple(shapes), dtype, device
        self.places = tuple(places)
        self._kept = [_Kept(place=place) for place in places]
        self._leaving: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._streams: Any = None
        if device.type == "cuda":
            self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
        self.locked = self._lay_out(StatePlace.HOST, directory)
        self._lay_out(StatePlace.FILE, directory)

    def bytes_at(self, place: StatePlace) -> int:
        """Return the bytes of the states that are kept in a place."""
        return sum(self.nbytes(number) for number, kept in enumerate(self._kept) if kept.place is place)

    def nbytes(self, number: int) -> int:
        """Return the bytes of one forward pass's states."""
        return self.shapes[number].numel() * self.dtype.itemsize

    def ahead(self, number: int) -> None:
        """Begin to copy states to the device that are taken soon."""
        kept = self._kept[number]
        if self._streams is None or kept.arriving is not None or kept.values is None or kept.values.is_cuda:
            return
        coming, _ = self._streams
        values = torch.empty(self.shapes[number], dtype=self.dtype, device=self.device)
        coming.wait_stream(torch.cuda.current_stream(self.device))  # its memory may still be read
        with torch.cuda.stream(coming):
            if kept.left is not None:
                coming.wait_event(kept.left)
            values.copy_(kept.values, non_blocking=True)
            kept.arriving = values, coming.record_event()

    def take(self, number: int) -> Tensor:
        """Return states on the device."""
        kept = self._kept[number]
        assert kept.values is not None, "taken before they were given"
        if kept.place is StatePlace.DEVICE or self._streams is None:
            return kept.values
        self.ahead(number)
        assert kept.arriving is not None
        values, there = kept.arriving
        kept.arriving = None
        torch.cuda.current_stream(self.device).wait_event(there)
        return values

    def give(self, number: int, values: Tensor) -> None:
        """Keep what left a block, in the place of what entered it."""
        kept = self._kept[number]
        if kept.place is StatePlace.DEVICE:
            kept.values = values
            return
        assert kept.values is not None
        if self._streams is None or not values.is_cuda:
            kept.values.copy_(values)
            return
        _, going = self._streams
        going.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(going):
            kept.values.copy_(values, non_blocking=True)
            kept.left = going.record_event()
        self._leaving.append((kept.left, values))
        while len(self._leaving) > _LEAVING:
            self._leaving.popleft()[0].synchronize()

    def settle(self) -> None:
        """Wait until all states are where they are kept."""
        while self._leaving:
            self._leaving.popleft()[0].synchronize()

    def on_host(self, number: int) -> Tensor:
        """Return states on the host, after ``settle``: a copy, or the place itself, to be read only."""
        values = self._kept[number].values
        assert values is not None
        return values.cpu()

    def drop(self, number: int) -> None:
        """Give the device memory of states back that nobody takes any more."""
        kept = self._kept[number]
        if kept.place is StatePlace.DEVICE:
            kept.values = None

    def _lay_out(self, place: StatePlace, directory: Path) -> bool:
        """Make the arena of a place, and cut it up; tell whether its pages are locked."""
        numbers = [number for number, kept in enumerate(self._kept) if kept.place is place]
        if place is StatePlace.DEVICE or not numbers:
            return False
        sizes = [-(-self.nbytes(number) // 64) * 64 for number in numbers]
        locked = False
        if place is StatePlace.HOST:
            arena = host_like(torch.empty(sum(sizes), dtype=torch.uint8, device="meta"))
            if self._streams is not None:
                locked = lock_pages(arena, owner=self, gpu=self.device)
        else:
            arena = mapped_file(sum(sizes), directory)
        first = 0
        for number, size in zip(numbers, sizes, strict=True):
            part = arena[first : first + self.nbytes(number)]
            self._kept[number].values = part.view(self.dtype).view(self.shapes[number])
            first += size
        return locked


def mapped_file(size: int, directory: Path) -> Tensor:
    """Return uint8 [size] in a file of a directory that has no name, and goes with the tensor or the process.

    Raises:
        OSError: the directory has no room. It is taken up at once: a write into a mapped file that finds none would
            kill the process.
    """
    with tempfile.TemporaryFile(prefix="kbit-states-", dir=directory) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        mapped: Any = np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,))
    return torch.from_numpy(mapped)
