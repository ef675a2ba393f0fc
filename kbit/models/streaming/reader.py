"""Read tensors from files in a given order: threads read ahead into chunks, page-locked for a GPU.

No file is mapped, and none is read whole. Each thread has one chunk: it reads the next piece of the order into it,
waits until the tensor that the piece belongs to has its memory, and copies it there; on a GPU by a stream of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from torch import Tensor

from kbit.errors import CheckpointError
from kbit.models.streaming.extents import Extent

CHUNK: Final = 1 << 24
"""Bytes that are read at once: a power of two, in which torch hands out page-locked memory."""
THREADS: Final = 16
"""Threads that read, on any machine: they wait for the disk, not for a core."""


@dataclass(kw_only=True, eq=False)
class _Arriving:
    """A tensor on its way: its bytes' memory, once it is there, and how many of its pieces are not yet in it.

    Threads that have a piece of it wait at ``begins`` for the memory.
    """

    extent: Extent
    device: torch.device
    missing: int
    begins: threading.Condition
    memory: Tensor | None = None
    copies: list[torch.cuda.Event] = field(default_factory=list)


class Reading:
    """Tensors as they are read, in order; a context manager, at whose end the threads end.

    Args:
        order: the tensors, each with the device where it goes.
        ahead: bytes of later tensors that may have memory on their devices while an earlier one is taken. What is read
            beyond them waits in the threads' chunks, at most ``threads`` of them.
        threads: how many read.
    """

    def __init__(self, order: Sequence[tuple[Extent, torch.device]], *, ahead: int = 0, threads: int = THREADS) -> None:
        self._lock = threading.Lock()
        # Threads wait for one tensor's memory, and the caller for a tensor: each is woken for its own reason alone. Who
        # is woken for nothing takes the interpreter's time, and that is what a load from memory takes.
        self._arrives = threading.Condition(self._lock)
        self._order = [
            _Arriving(
                extent=extent,
                device=device,
                missing=-(-extent.nbytes // CHUNK),
                begins=threading.Condition(self._lock),
            )
            for extent, device in order
        ]
        self._pieces = self._cut()
        self._ahead = ahead
        self._begun = self._taken = 0  # tensors that have their memory, and that were given out
        self._error: BaseException | None = None
        self._ended = False
        self._files = _Files()
        self._streams = {
            device: torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for device in {a.device for a in self._order}
            if device.type == "cuda"
        }
        pieces = sum(a.missing for a in self._order)
        self._threads = [
            threading.Thread(target=self._read, name=f"reader-{n}", daemon=True) for n in range(min(threads, pieces))
        ]

    def __enter__(self) -> Reading:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._ended = True
            for arriving in self._order:
                arriving.begins.notify_all()
        for thread in self._threads:
            thread.join()
        self._files.close()

    def take(self) -> Tensor:
        """Return the next tensor of the order, as it lies in its file, once it is there: its memory is the caller's.

        On a GPU the current stream waits for it.

        Raises:
            CheckpointError: a file is shorter than its header says, or can't be read.
            torch.OutOfMemoryError: no memory for it.
        """
        number = self._taken
        arriving = self._order[number]
        self._begin_up_to(number)
        with self._lock:
            self._arrives.wait_for(lambda: self._error is not None or not arriving.missing)
            if self._error is not None:
                raise self._error
        self._taken += 1
        if arriving.copies:
            current = torch.cuda.current_stream(arriving.device)
            for copy in arriving.copies:
                current.wait_event(copy)
        assert arriving.memory is not None
        values = arriving.extent.tensor(arriving.memory)
        arriving.memory = None
        return values

    def _begin_up_to(self, number: int) -> None:
        """Give memory to the tensors up to this one, and to those after it that may be ahead."""
        begun: list[tuple[_Arriving, Tensor]] = []
        for last in range(self._begun, len(self._order)):
            following = self._order[number + 1 : last + 1]
            if last > number and sum(a.extent.nbytes for a in following) > self._ahead:
                break
            arriving = self._order[last]
            with torch.inference_mode(mode=False):  # other threads write to it
                memory = torch.empty(arriving.extent.nbytes, dtype=torch.uint8, device=arriving.device)
            begun.append((arriving, memory))
        for device in {arriving.device for arriving, _ in begun} & self._streams.keys():
            # What was freed before may still be read by what the current stream has to do.
            self._streams[device].wait_stream(torch.cuda.current_stream(device))
        with self._lock:
            self._begun += len(begun)
            for arriving, memory in begun:
                arriving.memory = memory
                arriving.begins.notify_all()

    def _cut(self) -> Iterator[tuple[_Arriving, int, int]]:
        """Yield the pieces in order: tensor, first byte and length within it."""
        for arriving in self._order:
            nbytes = arriving.extent.nbytes
            yield from ((arriving, first, min(CHUNK, nbytes - first)) for first in range(0, nbytes, CHUNK))

    def _read(self) -> None:
        try:
            chunk = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=bool(self._streams))
            for stream in self._streams.values():
                torch.cuda.set_stream(stream)  # this thread's, for its device
            copied: torch.cuda.Event | None = None
            while True:
                with self._lock:
                    piece = None if self._ended else next(self._pieces, None)
                if piece is None:
                    break
                arriving, first, length = piece
                if copied is not None:
                    copied.synchronize()
                self._files.read_into(chunk[:length], arriving.extent, first)
                with self._lock:
                    arriving.begins.wait_for(lambda: self._ended or arriving.memory is not None)  # noqa: B023
                    memory = arriving.memory
                if memory is None:
                    break
                copied = self._copy(chunk[:length], memory[first : first + length], self._streams.get(arriving.device))
                memory = None  # the next piece may be long in coming, and the tensor dropped meanwhile
                with self._lock:
                    if copied is not None:
                        arriving.copies.append(copied)
                    arriving.missing -= 1
                    if not arriving.missing:
                        self._arrives.notify()
            if copied is not None:
                copied.synchronize()  # before the chunk is given back
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
                self._arrives.notify()

    def _copy(self, chunk: Tensor, memory: Tensor, stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
        if stream is None:
            memory.copy_(chunk)
            return None
        memory.copy_(chunk, non_blocking=True)  # by the thread's stream, which is this
        copied: torch.cuda.Event = stream.record_event()
        return copied


class _Files:
    """Files that several threads read at once, each opened once."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._stack = ExitStack()

    def close(self) -> None:
        self._stack.close()

    def read_into(self, chunk: Tensor, extent: Extent, first: int) -> None:
        """Fill a chunk, uint8 on the host, with the bytes of an extent from `first` on."""
        into: Any = memoryview(chunk.numpy())  # type: ignore[arg-type]
        position, done = extent.start + first, 0
        try:
            file = self._file(extent.file)
            while done < len(into):
                got = os.preadv(file, [into[done:]], position + done)
                if not got:
                    raise CheckpointError(f"{extent.file} ends before byte {position + len(into)}: fetch it again")
                done += got
        except OSError as error:
            raise CheckpointError(f"{extent.file} can't be read: {error}") from error

    def _file(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._stack.callback(os.close, self._open[path])
                # The kernel then reads twice as far ahead of each position.
                os.posix_fadvise(self._open[path], 0, 0, os.POSIX_FADV_SEQUENTIAL)
            return self._open[path]
