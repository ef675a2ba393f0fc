"""The files of a SLURM launch: what was submitted, every attempt at it, and what the scheduler reported.

    OUT/launches/LAUNCH/launch.json       shapes and chunks; frozen before anything is claimed or submitted
    OUT/launches/LAUNCH/packs.jsonl       the packs, one per line: a job reads only its own
    OUT/launches/LAUNCH/submitted.json    job ids; written when the launcher has finished submitting
    OUT/launches/LAUNCH/attempts/*.json   one per pack, job and restart: where it ran, what it measures, how it ended
    OUT/launches/LAUNCH/owners/PACK       the job that runs a pack: one submission that was served twice runs it once
    OUT/launches/LAUNCH/ledger.json       the scheduler's last word on each pack (sweeps.launches.job_log)
    OUT/launches/LAUNCH/cancelled.json    when its user cancelled it; cancelled-*.json: some packs of it
    OUT/launches/LAUNCH/preflight-N.json  problems that the preflight of shape N found
    OUT/logs/LAUNCH/CHUNK/                at most two logs a job: its own and its worker's

A job's name carries launch and chunk, and its array index the pack: nothing but this directory is needed to know what a
job is, so a launcher that dies after sbatch loses nothing.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Final

from sweeps.files import JsonObject, clock, list_files, read_json, require_directory, write_atomically
from sweeps.launches.job_settings import JobSettings
from sweeps.plan.pack import Pack
from sweeps.store.schema import Scalar

JOB_PREFIX: Final = "kbit"
FILE: Final = "launch.json"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The resources of a job.

    Attributes:
        gpus: on one node; 0 is a job on CPUs.
        mem_gb: memory of the node, in GiB.
        rung: step of the out-of-memory ladder; each doubled memory or GPUs.
    """

    gpus: int
    cpus: int
    mem_gb: float
    minutes: int
    rung: int = 0


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One job array, or one job: packs of one shape, in the order of their array indices.

    Attributes:
        after: chunk whose jobs must succeed first (a model's baseline); None is none.
    """

    number: int
    shape: int
    packs: tuple[str, ...]
    after: int | None = None

    def share(self, chunks: int, most: int) -> int:
        """Return how many of its jobs may run at once, where ``most`` of all ``chunks`` may; never more than it has."""
        share = max(1, most // chunks + (self.number < most % chunks))
        return min(share, len(self.packs))


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The submissions of one launch, as its directory has them.

    Attributes:
        settings: what every job needs to know.
        offsets: byte offset of each pack's line in packs.jsonl.
        user, cluster: whose jobs they are, and where; '' is unknown.
    """

    out: Path
    id: str
    sweep: str
    shapes: tuple[Shape, ...]
    chunks: tuple[Chunk, ...]
    settings: JobSettings
    offsets: Mapping[str, int]
    launched: float
    user: str = ""
    cluster: str = ""

    @property
    def directory(self) -> Path:
        return launch_dir(self.out, self.id)

    @property
    def file(self) -> Path:
        """Its own file, there from before anything is submitted."""
        return self.directory / FILE

    def logs(self, chunk: int) -> Path:
        return self.out / "logs" / self.id / f"{chunk:03d}"

    def chunk_name(self, number: int) -> str:
        """Return the name of a chunk's jobs."""
        return f"{JOB_PREFIX}-{self.id}-{number}"

    def preflight_name(self, shape: int) -> str:
        return f"{JOB_PREFIX}-{self.id}-preflight{shape}"

    @cached_property
    def places(self) -> dict[str, tuple[str, int]]:
        """(job name, array index) of each pack."""
        return {pack: (self.chunk_name(c.number), i) for c in self.chunks for i, pack in enumerate(c.packs)}

    def chunk_of(self, pack: str) -> Chunk:
        return next(c for c in self.chunks if pack in c.packs)

    def pack(self, pack_id: str) -> Pack:
        """Return one pack, read from its line."""
        with (self.directory / "packs.jsonl").open("rb") as file:
            file.seek(self.offsets[pack_id])
            return Pack.from_dict(json.loads(file.readline()))

    def save(self, packs: Sequence[Pack]) -> None:
        """Write it and its packs."""
        write_atomically(self.directory / "packs.jsonl", b"".join(_lines(packs)))
        data = {k: v for k, v in asdict(self).items() if k not in ("out", "id")}
        write_atomically(self.file, json.dumps(data).encode())

    @classmethod
    def load(cls, out: Path, launch: str) -> Launch:
        """Read a launch.

        Raises:
            FileNotFoundError: there is none of that id.
        """
        data = read_json(launch_dir(out, launch) / FILE)
        chunks = tuple(Chunk(**{**c, "packs": tuple(c["packs"])}) for c in data.pop("chunks"))
        shapes = tuple(Shape(**s) for s in data.pop("shapes"))
        settings = JobSettings.from_dict(data.pop("settings"))
        return cls(out=out, id=launch, shapes=shapes, chunks=chunks, settings=settings, **data)

    def record_submitted(self, jobs: Mapping[str, str]) -> None:
        """The launcher is done: job ids by job name, of what was submitted."""
        write_atomically(self.directory / "submitted.json", json.dumps({"jobs": dict(jobs)}).encode())

    def submitted(self) -> Mapping[str, str] | None:
        """Job ids by job name; None while the launcher is at it, or when it died there."""
        try:
            jobs: Mapping[str, str] = read_json(self.directory / "submitted.json")["jobs"]
        except FileNotFoundError:
            return None
        return jobs

    def cancel(self, packs: Collection[str] | None = None) -> None:
        """Write down that its user cancelled it: what is not submitted yet must not be. Or that only of some packs."""
        if packs is None:
            write_atomically(self.directory / "cancelled.json", json.dumps({"at": time.time()}).encode())
            return
        record = {"at": time.time(), "packs": sorted(packs)}
        write_atomically(self.directory / f"cancelled-{uuid.uuid4().hex}.json", json.dumps(record).encode())

    def cancelled(self) -> bool:
        """Tell whether its user cancelled it. A file of its own: nobody who looks at the jobs can overwrite it."""
        return (self.directory / "cancelled.json").exists()

    def cancelled_packs(self) -> frozenset[str]:
        """Return the packs that its user cancelled, all or one by one."""
        if self.cancelled():
            return frozenset(self.places)
        return frozenset(p for path in list_files(self.directory, "cancelled-*.json") for p in read_json(path)["packs"])

    def attempts(self, packs: Collection[str]) -> dict[str, list[Attempt]]:
        """Read every attempt at some packs, oldest first."""
        found: dict[str, list[Attempt]] = {}
        wanted = set(packs)
        for path in list_files(self.directory / "attempts", "*.json"):
            if path.name.partition("-")[0] not in wanted:
                continue
            try:
                data, touched = read_json(path), path.stat().st_mtime
            except FileNotFoundError:
                continue
            attempt = Attempt(launch=self, **data, touched=touched)
            found.setdefault(attempt.pack, []).append(attempt)
        return {pack: sorted(of_pack, key=lambda a: a.started) for pack, of_pack in found.items()}

    def has_others_at_work(self, pack: str) -> bool:
        """Tell whether another pack of it is at work or to come, by as few files as tell; False where that is unknown.

        The next launch writes the report that a job didn't for one that died without a word.
        """
        submitted = self.submitted()
        if submitted is None:
            return False
        others = {p for c in self.chunks if self.chunk_name(c.number) in submitted for p in c.packs}
        others -= {pack, *self.cancelled_packs()}
        begun = {path.name.partition("-")[0] for path in list_files(self.directory / "attempts", "*.json")}
        if not others <= begun:
            return True
        return any(attempts[-1].goes_on for attempts in self.attempts(others).values())

    def preflight_problems(self, shape: int) -> list[str] | None:
        """Return what the preflight of a shape found; None when it has not run."""
        try:
            problems: list[str] = read_json(self.directory / f"preflight-{shape}.json")["problems"]
        except FileNotFoundError:
            return None
        return problems


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One run of a pack's job: a requeued job makes another.

    Attributes:
        measuring: measurement in flight at the last word; None between measurements.
        end: how it ended, by its own word: {'reason': 'finished' | 'walltime' | 'terminated' | 'gate' | 'data' |
            'error', ...}; None while it runs, and for ever when it was killed.
        touched: when it last said a word, by the store's clock. Times here are all by that clock.
    """

    launch: Launch = field(repr=False)
    pack: str
    job: str
    restart: int
    host: str
    started: float
    log: str
    measuring: str | None = None
    end: JsonObject | None = None
    touched: float = 0.0

    @property
    def goes_on(self) -> bool:
        """Whether it has not ended, or its job comes back from the queue."""
        return self.end is None or bool(self.end.get("requeued"))

    @classmethod
    def begin(cls, launch: Launch, pack: str, *, job: str, restart: int, host: str, log: Path) -> Attempt:
        """Write down that an attempt begins."""
        attempt = cls(
            launch=launch,
            pack=pack,
            job=job,
            restart=restart,
            host=host,
            started=clock(launch.directory),
            log=str(log),
        )
        attempt._write()
        return attempt

    def at(self, measuring: str | None) -> Attempt:
        """Say that it is alive, and what it is measuring."""
        # An older word after a loss of power only blames nothing, or what was measured before, for the node's end.
        return replace(self, measuring=measuring)._write(lasting=False)

    def ended(self, reason: str, **more: Scalar) -> Attempt:
        """Say how it ended."""
        return replace(self, end={"reason": reason, "at": clock(self.launch.directory), **more})._write()

    def _write(self, *, lasting: bool = True) -> Attempt:
        data = {k: getattr(self, k) for k in ("pack", "job", "restart", "host", "started", "log", "measuring", "end")}
        require_directory(self.launch.directory)
        path = self.launch.directory / "attempts" / f"{self.pack}-{self.job}-{self.restart}.json"
        write_atomically(path, json.dumps(data).encode(), lasting=lasting)
        return self


def launch_dir(out: Path, launch: str) -> Path:
    return out / "launches" / launch


def launches(out: Path) -> list[Launch]:
    """Return every launch of a results directory, oldest first."""
    directories = list_files(out / "launches")
    found = [Launch.load(out, d.name) for d in directories if (d / FILE).exists()]
    return sorted(found, key=lambda launch: launch.launched)


def line_offsets(packs: Iterable[Pack]) -> dict[str, int]:
    """Byte offset of each pack's line in packs.jsonl."""
    offsets, at = {}, 0
    for pack, line in zip(packs, _lines(packs), strict=True):
        offsets[pack.id] = at
        at += len(line)
    return offsets


def _lines(packs: Iterable[Pack]) -> list[bytes]:
    return [json.dumps(pack.to_dict()).encode() + b"\n" for pack in packs]
