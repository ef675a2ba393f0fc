"""Claims: who is computing what, so that two launches on one store never compute a measurement twice.

A claim is a numbered file that names measurements, created by an atomic hard link: exactly one launch gets each
number. A launch reads the claims up to n, plans what none of the live ones holds, and creates number n + 1; if somebody
else was faster it reads and plans again (compare and swap). Nothing is locked, so nothing can stay locked.

A claim of workers on one machine ends when its launch releases it, or is void when its owner is known to be gone: where
its process can be seen (sweeps.processes), by that; from elsewhere only after its heartbeat has been silent for long.
A claim of jobs that outlive their launch ends pack by pack, by what is written down of them
(sweeps.launches.in_flight).
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from sweeps.errors import ClaimTakenError, LinkError, StoreError
from sweeps.files import JsonObject, clock, create_exclusively, list_files, read_json, write_atomically
from sweeps.launches.launch import launches
from sweeps.processes import is_running, seconds_since_restart, this_process

log = logging.getLogger(__name__)

SILENT_SECONDS: Final = 900.0
"""A claim of another machine is void after this long without a heartbeat (by the store's own clock)."""
RESTARTED_SECONDS: Final = 60.0
"""One of this machine is void sooner where the machine has started again since, and several beats would have come."""

_REPORTED: Final[set[Path]] = set()
"""Damaged claims that were already said to be so in this process."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One launch's hold on measurements.

    Attributes:
        executor: 'local' where the work ends with the process that launched it; else whose jobs outlive it.
        owner: what tells the process that launched it from all others, as ``this_process`` said it.
        packs: measurement keys by pack.
    """

    number: int
    launch: str
    sweep: str
    executor: str
    owner: JsonObject
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
        # Whatever stands beside a claim that was moved away: a number is never given twice, for jobs go by it.
        return max((int(p.name.partition(".")[0]) for p in list_files(self.directory, "[0-9]*.*")), default=0)

    def open(self, *, after: int = 0) -> list[Claim]:
        """Claims that were not released, in their order; only those with a number above ``after``."""
        released = {p.stem for p in list_files(self.directory, "[0-9]*.released")}
        files = [p for p in list_files(self.directory, "[0-9]*.json") if p.stem not in released and int(p.stem) > after]
        return [claim for path in files for claim in self._read(path)]

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
            **this_process(),
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
        # Read by who asks what is running, and, for its age alone, by other machines. A machine that loses power loses
        # the launch too: an older word, or none, then only makes the claim void a little sooner.
        beat = json.dumps({"running": list(running)}).encode()
        write_atomically(self._path(claim.number, "running"), beat, lasting=False)

    def running(self, claim: Claim) -> set[str]:
        """Measurements in flight by the last heartbeat."""
        try:
            return set(read_json(self._path(claim.number, "running"))["running"])
        except FileNotFoundError:
            return set()

    def _read(self, path: Path) -> list[Claim]:
        """Return a claim; of a damaged one what the launches' own files say of it.

        Raises:
            StoreError: it is damaged, and no launch's files say what it held.
        """
        try:
            return [self._load(int(path.stem))]
        except StoreError as error:
            rebuilt = self._rebuilt(int(path.stem))
            if not rebuilt:
                raise StoreError(
                    f"{path} is damaged, and no launch's files say what it held, as is so for a run on one machine. "
                    f"If that run still goes on, end it, or it is computed twice; then rename the file to "
                    f"{path.name}.damaged. What is stored stays, what was in flight is measured again"
                ) from error
        if path not in _REPORTED:
            _REPORTED.add(path)
            launches = ", ".join(claim.launch for claim in rebuilt)
            log.warning("%s is damaged: what it held is taken from the files of launch %s", path, launches)
        return rebuilt

    def _rebuilt(self, number: int) -> list[Claim]:
        """Return claims of the launches of jobs that no readable claim names."""
        named = set()
        for path in list_files(self.directory, "[0-9]*.json"):
            with contextlib.suppress(StoreError):
                named.add(self._load(int(path.stem)).launch)
        orphans = [launch for launch in launches(self.out) if launch.id not in named]
        return [
            Claim(
                number=number,
                launch=launch.id,
                sweep=launch.sweep,
                executor="slurm",  # whose launches have such files
                owner={"host": "", "pid": 0, "pid_started": ""},
                packs={p: tuple(m.key for m in launch.pack(p).measurements()) for c in launch.chunks for p in c.packs},
            )
            for launch in orphans
        ]

    def _load(self, number: int) -> Claim:
        data = read_json(self._path(number, "json"))
        packs = {pack: tuple(keys) for pack, keys in data.pop("packs").items()}
        about = {name: data.pop(name) for name in ("launch", "sweep", "executor")}
        return Claim(number=number, **about, owner=data, packs=packs)

    def _path(self, number: int, suffix: str) -> Path:
        return self.directory / f"{number:08d}.{suffix}"

    def is_alive(self, claim: Claim) -> bool:
        """Tell whether the process that launched it may still be at work."""
        runs = is_running(claim.owner)
        return self._silence(claim) < _patience(claim.owner) if runs is None else runs

    def holder(self, claim: Claim) -> str:
        """Return in words whose a claim is; of one that can't be seen from here, too, when it would be void."""
        who = f"launch {claim.launch}, process {claim.owner['pid']} on {claim.owner['host']}"
        if is_running(claim.owner) is not None:
            return who
        return (
            f"{who}, which can't be seen from here: last heard of {self._silence(claim):.0f} s ago, and over after "
            f"{_patience(claim.owner):.0f} s of silence"
        )

    def _silence(self, claim: Claim) -> float:
        """Seconds since its last heartbeat, or since it was made."""
        try:
            last = self._path(claim.number, "running").stat().st_mtime
        except FileNotFoundError:  # it has not begun, or is released just now
            last = self._path(claim.number, "json").stat().st_mtime
        return clock(self.directory) - last


def _patience(owner: JsonObject) -> float:
    """Seconds of silence after which a process that can't be seen from here is gone.

    A machine of this one's name that beats is another one; what fell silent before this one started may be of it.
    """
    restarted = seconds_since_restart(owner)
    return SILENT_SECONDS if restarted is None else min(SILENT_SECONDS, max(RESTARTED_SECONDS, restarted))
