"""What a disk may hold after power was lost: rebuilt from a log of all that was changed (layer.c), as ALICE does.

Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014), section 3: what was not flushed may be there or
not, each change of a name apart from the others and from the bytes; bytes may be there by half, or be zeros. A flush of
a file is of its bytes, a flush of a directory of the names in it; nothing else is promised by POSIX.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

Name = tuple[str, int | None]
"""A path, and the file that it means from then on; None is none, -1 a directory."""
DIRECTORY = -1


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A change, or what the program said.

    Attributes:
        kind: 'names', 'bytes', 'sync' (of a file), 'syncdir' or 'said'.
        names: what paths mean after it, at once.
        file: whose bytes are written or flushed.
        path: of the directory that is flushed; what was said.
        at, data: where bytes are written, and which.
    """

    kind: str
    names: tuple[Name, ...] = ()
    file: int = 0
    path: str = ""
    at: int = 0
    data: bytes = b""


def read_log(log: Path) -> list[Operation]:
    """Read what the layer noted. Files are numbered, for a file system gives an inode's number again."""
    data, at, made = log.read_bytes(), 0, 0
    found: list[Operation] = []
    files: dict[int, int] = {}
    meant: dict[str, int | None] = {}
    while at < len(data):
        end = data.index(b"\n", at)
        word, _, rest = data[at:end].decode().partition(" ")
        at = end + 1
        if word == "open":
            inode, is_new, _, path = rest.split(" ", 3)
            # What is truncated was empty already: the store never writes into a file that has bytes.
            if is_new == "1":
                made += 1
                files[int(inode)] = meant[path] = made
                found.append(Operation(kind="names", names=((path, meant[path]),)))
        elif word == "write":
            inode, place, length = map(int, rest.split())
            found.append(Operation(kind="bytes", file=files[inode], at=place, data=data[at : at + length]))
            at += length
        elif word == "sync":
            found.append(Operation(kind="sync", file=files[int(rest)]))
        elif word in ("syncdir", "said"):
            found.append(Operation(kind=word, path=rest))
        else:
            names = _names(word, rest, meant)
            meant |= dict(names)
            found.append(Operation(kind="names", names=names))
    return found


def _names(word: str, rest: str, meant: dict[str, int | None]) -> tuple[Name, ...]:
    old, _, new = rest.partition("\t")
    if word == "mkdir":
        return ((old, DIRECTORY),)
    if word in ("unlink", "rmdir"):
        return ((old, None),)
    assert word in ("rename", "link"), f"the replay doesn't know {word}"
    return ((new, meant[old]), *([(old, None)] if word == "rename" else []))


@dataclass(kw_only=True)
class Disk:
    """What was flushed by some moment, and what may have come to the disk since."""

    operations: Sequence[Operation]
    flushed: set[int] = field(default_factory=set)
    pending: list[int] = field(default_factory=list)

    @cached_property
    def directories(self) -> set[str]:
        """Those that were made: what lies in one is there where it is."""
        return {path for done in self.operations for path, file in done.names if file == DIRECTORY}

    def take(self, number: int) -> None:
        """Do the next operation."""
        done = self.operations[number]
        if done.kind in ("names", "bytes"):
            self.pending.append(number)
        elif done.kind in ("sync", "syncdir"):
            now = [n for n in self.pending if self._is_flushed(self.operations[n], done)]
            self.flushed |= set(now)
            self.pending = [n for n in self.pending if n not in self.flushed]

    def _is_flushed(self, change: Operation, by: Operation) -> bool:
        if by.kind == "sync":
            return change.kind == "bytes" and change.file == by.file
        return change.kind == "names" and all(path.rpartition("/")[0] == by.path for path, _ in change.names)

    def states(self, choose: random.Random, randoms: int) -> Iterator[dict[str, bytes | None]]:
        """Yield what may be found after power was lost now: bytes by path; None is a directory."""
        names = [n for n in self.pending if self.operations[n].kind == "names"]
        written = [n for n in self.pending if self.operations[n].kind == "bytes"]
        for chosen in ((), names):
            for kept, torn in (((), ""), (written, ""), (written, "half"), (written, "zeros"), (written, "late")):
                yield self._state({*chosen, *kept}, torn)
        for n in names:
            yield self._state({n}, "")
            yield self._state({*names, *written} - {n}, "")
        for _ in range(randoms if len(self.pending) > 2 else 0):
            some = {n for n in self.pending if choose.random() < 0.5}
            yield self._state(some, choose.choice(("", "half", "zeros", "late")))

    def _state(self, kept: Iterable[int], torn: str) -> dict[str, bytes | None]:
        unsure = set(kept) - self.flushed
        meant: dict[str, int | None] = {}
        held: dict[int, bytearray] = {}
        for n in sorted(self.flushed | unsure):
            done = self.operations[n]
            meant |= dict(done.names)
            if done.kind == "bytes":
                data = _torn(done.data, torn) if n in unsure else done.data
                content = held.setdefault(done.file, bytearray())
                content.extend(bytes(max(0, done.at - len(content))))
                content[done.at : done.at + len(data)] = data
        found: dict[str, bytes | None] = {}
        for path, file in sorted(meant.items()):
            above = path.rpartition("/")[0]
            if file is not None and (above in found or above not in self.directories):
                found[path] = None if file == DIRECTORY else bytes(held.get(file, b""))
        return found


def _torn(data: bytes, how: str) -> bytes:
    """Return what a disk has of bytes that were being written: the first half, zeros, or only the last half."""
    if how == "half":
        return data[: len(data) // 2]
    if how == "zeros":
        return bytes(len(data))
    return bytes(len(data) // 2) + data[len(data) // 2 :] if how == "late" else data


def crashes(
    operations: Sequence[Operation], *, seed: int = 0, randoms: int = 2
) -> Iterator[tuple[list[str], dict[str, bytes | None]]]:
    """Yield what was said by the time power was lost, and what the disk may hold then; each once.

    Power is lost before each flush, when most is open, and after each word, when most is promised.
    """
    disk, said, seen = Disk(operations=operations), list[str](), set[bytes]()
    choose = random.Random(seed)
    for number, done in enumerate(operations):
        disk.take(number)
        if done.kind == "said":
            said.append(done.path)
        following = operations[number + 1].kind if number + 1 < len(operations) else "sync"
        if done.kind != "said" and following not in ("sync", "syncdir"):
            continue
        for state in disk.states(choose, randoms):
            digest = hashlib.sha256(repr((len(said), sorted(state.items()))).encode()).digest()
            if digest not in seen:
                seen.add(digest)
                yield list(said), state


def whole(operations: Sequence[Operation]) -> dict[str, bytes | None]:
    """Return what the disk holds when all has come to it."""
    disk = Disk(operations=operations)
    for number in range(len(operations)):
        disk.take(number)
    return disk._state(disk.pending, "")


def rebuild(state: dict[str, bytes | None], root: str, target: Path) -> None:
    """Write a state's files in ``root`` to another place."""
    for path, content in state.items():
        to = target / Path(path).relative_to(root)
        if content is None:
            to.mkdir(parents=True, exist_ok=True)
        else:
            to.write_bytes(content)
