"""Claims: who is computing what, so that two launches on one store never compute a measurement twice.

A claim is a numbered file that names measurements, created by an atomic hard link: exactly one launch gets each
number. A launch reads the claims up to n, plans what none of the live ones holds, and creates number n + 1; if somebody
else was faster it reads again and plans anew (compare and swap). Nothing is locked, so nothing can stay locked.

A claim ends when its launch releases it, or is void when its owner is known to be gone: on the same machine by its
process, from another machine only after its heartbeat has been silent for long.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sweeps.errors import StoreError
from sweeps.store import read_json, write_atomically

HEARTBEAT_SECONDS: Final = 10.0
SILENT_SECONDS: Final = 900.0
"""A claim of another machine is void after this long without a heartbeat (by the store's own clock)."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One launch's hold on measurements."""

    number: int
    launch: str
    sweep: str
    host: str
    pid: int
    pid_started: str
    measurements: frozenset[str]


class ClaimTakenError(Exception):
    """Another launch created this number first: plan again."""


@dataclass(frozen=True, kw_only=True)
class Claims:
    """The claims of one results directory."""

    out: Path

    @property
    def directory(self) -> Path:
        return self.out / "claims"

    def last_number(self) -> int:
        return max((int(p.stem) for p in self.directory.glob("[0-9]*.json")), default=0)

    def live(self) -> list[Claim]:
        """Claims whose owner may still be at work."""
        numbers = sorted(int(p.stem) for p in self.directory.glob("[0-9]*.json"))
        claims = [self._load(n) for n in numbers if not self._path(n, "released").exists()]
        return [c for c in claims if self._is_alive(c)]

    def create(self, number: int, *, launch: str, sweep: str, measurements: Iterable[str]) -> Claim:
        """Take number ``number``.

        Raises:
            ClaimTakenError: another launch was faster.
            StoreError: the file system has no hard links.
        """
        claim = {
            "launch": launch,
            "sweep": sweep,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pid_started": _process_start(os.getpid()),
            "measurements": sorted(measurements),
        }
        temporary = self.directory / f".{uuid.uuid4().hex}.tmp"
        write_atomically(temporary, json.dumps(claim).encode())
        try:
            os.link(temporary, self._path(number, "json"))
        except FileExistsError as error:
            # A network file system may repeat a link that had succeeded; then the file is ours, with two names.
            if temporary.stat().st_nlink != 2:
                raise ClaimTakenError(number) from error
        except OSError as error:
            raise StoreError(
                f"out={str(self.out)!r}: its file system can't make hard links ({error.strerror}), "
                "which keep two launches apart. Choose a directory on a local or cluster file system."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
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

    def lost(self) -> set[str]:
        """Measurements that a launch held when it died without releasing its claim."""
        numbers = (int(p.stem) for p in self.directory.glob("[0-9]*.json"))
        claims = [self._load(n) for n in numbers if not self._path(n, "released").exists()]
        return {m for c in claims if not self._is_alive(c) for m in c.measurements}

    def _load(self, number: int) -> Claim:
        data = read_json(self._path(number, "json"))
        return Claim(number=number, **{**data, "measurements": frozenset(data["measurements"])})

    def _path(self, number: int, suffix: str) -> Path:
        return self.directory / f"{number:08d}.{suffix}"

    def _is_alive(self, claim: Claim) -> bool:
        if claim.host == socket.gethostname():
            return _process_start(claim.pid) == claim.pid_started
        beat = self._path(claim.number, "running")
        last = (beat if beat.exists() else self._path(claim.number, "json")).stat().st_mtime
        return self._store_time() - last < SILENT_SECONDS

    def _store_time(self) -> float:
        """Now, by the clock that stamps the store's files: machines' own clocks differ."""
        probe = self.directory / f".clock-{uuid.uuid4().hex}.tmp"
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            probe.unlink(missing_ok=True)


def _process_start(pid: int) -> str:
    """When a process began, so that a reused pid is not taken for it; '' when there is none (zombies count as none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
