"""Claims: who is computing what, so that two launches on one store never compute a measurement twice.

A claim is a numbered file that names measurements, created by an atomic hard link: exactly one launch gets each
number. A launch reads the claims up to n, plans what none of the live ones holds, and creates number n + 1; if somebody
else was faster it reads and plans again (compare and swap). Nothing is locked, so nothing can stay locked.

A claim of workers on this machine ends when its launch releases it, or is void when its owner is known to be gone: on
the same machine by its process, from another machine only after its heartbeat has been silent for long. A claim of
jobs that outlive their launch ends pack by pack, by what is written down of them (sweeps.launches.in_flight).
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from sweeps.errors import ClaimTakenError, LinkError, StoreError
from sweeps.files import clock, create_exclusively, list_files, read_json, write_atomically

SILENT_SECONDS: Final = 900.0
"""A claim of another machine is void after this long without a heartbeat (by the store's own clock)."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One launch's hold on measurements.

    Attributes:
        executor: 'local' where the work ends with the process that launched it; else whose jobs outlive it.
        host, pid, pid_started: the process that launched it.
        packs: measurement keys by pack.
    """

    number: int
    launch: str
    sweep: str
    executor: str
    host: str
    pid: int
    pid_started: str
    packs: Mapping[str, tuple[str, ...]]

    @property
    def detached(self) -> bool:
        """Whether its work outlives the process that launched it: its launch's directory then says how that does."""
        return self.executor != "local"

    @cached_property
    def measurements(self) -> frozenset[str]:
        return frozenset(m for keys in self.packs.values() for m in keys)


@dataclass(frozen=True, kw_only=True)
class Claims:
    """The claims of one results directory."""

    out: Path

    @property
    def directory(self) -> Path:
        return self.out / "claims"

    def last_number(self) -> int:
        return max((int(p.stem) for p in list_files(self.directory, "[0-9]*.json")), default=0)

    def open(self, *, after: int = 0) -> list[Claim]:
        """Claims that were not released, in their order; only those with a number above ``after``."""
        numbers = sorted(int(p.stem) for p in list_files(self.directory, "[0-9]*.json"))
        return [self._load(n) for n in numbers if n > after and not self._path(n, "released").exists()]

    def create(
        self,
        number: int,
        *,
        launch: str,
        sweep: str,
        packs: Mapping[str, Iterable[str]],
        executor: str = "local",
    ) -> Claim:
        """Take a number.

        Args:
            number: to take.
            launch: id of the launch that takes it.
            sweep: name of its study.
            packs: measurement keys by pack.
            executor: name of what runs them.

        Raises:
            ClaimTakenError: another launch was faster.
            StoreError: the file system has no hard links.
        """
        claim = {
            "launch": launch,
            "sweep": sweep,
            "executor": executor,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pid_started": _process_start(os.getpid()),
            "packs": {pack: sorted(keys) for pack, keys in packs.items()},
        }
        try:
            is_ours = create_exclusively(self._path(number, "json"), json.dumps(claim).encode())
        except LinkError as error:
            raise StoreError(
                f"out={str(self.out)!r}: its file system can't make hard links ({error.strerror}), "
                "which keep two launches apart. Choose a directory on a local or cluster file system."
            ) from error
        if not is_ours:
            raise ClaimTakenError(number)
        return self._load(number)

    def release(self, claim: Claim) -> None:
        """End a claim; what it held and did not finish may be planned again."""
        write_atomically(self._path(claim.number, "released"), b"")
        self._path(claim.number, "running").unlink(missing_ok=True)

    def heartbeat(self, claim: Claim, running: Sequence[str]) -> None:
        """Say that the launch is alive and what it is measuring."""
        write_atomically(self._path(claim.number, "running"), json.dumps({"running": list(running)}).encode())

    def running(self, claim: Claim) -> set[str]:
        """Measurements in flight by the last heartbeat."""
        try:
            return set(read_json(self._path(claim.number, "running"))["running"])
        except FileNotFoundError:
            return set()

    def _load(self, number: int) -> Claim:
        data = read_json(self._path(number, "json"))
        packs = {pack: tuple(keys) for pack, keys in data.pop("packs").items()}
        return Claim(number=number, packs=packs, **data)

    def _path(self, number: int, suffix: str) -> Path:
        return self.directory / f"{number:08d}.{suffix}"

    def is_alive(self, claim: Claim) -> bool:
        """Tell whether the process that launched it may still be at work."""
        if claim.host == socket.gethostname():
            return _process_start(claim.pid) == claim.pid_started
        beat = self._path(claim.number, "running")
        last = (beat if beat.exists() else self._path(claim.number, "json")).stat().st_mtime
        return clock(self.directory) - last < SILENT_SECONDS


def _process_start(pid: int) -> str:
    """When a process began, so that a reused pid is not taken for it; '' when there is none (zombies count as none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
