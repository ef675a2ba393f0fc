"""Snapshots of a pass at a layer boundary, so that one that is cut goes on there.

    DIRECTORY/OF-PACK/block-0012.states   what left block 11, of each cell and forward pass, one after another
    DIRECTORY/OF-PACK/block-0012.json     what is where, with checksums; written last

A snapshot counts as soon as its JSON is there. It is used by any pass of the same model under the same dtype that wants
no more than it holds; a damaged one is passed over.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

VERSION: Final = 1
STALE_SECONDS: Final = 14 * 24 * 3600.0
"""A snapshot that nobody went on from for two weeks is removed."""
_DTYPES: Final = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32)}
_SPARE: Final = 0.02


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """What a pass had when a block was done.

    Attributes:
        block: the next block.
        states: (key, shape, dtype) of each forward pass of each cell -> see ``read``.
        notes: plain JSON values, the pass's own.
    """

    block: int
    notes: Mapping[str, Any]
    file: Path
    states: Mapping[str, Mapping[str, Any]] = field(repr=False)

    def read(self, key: str) -> Tensor:
        """Return states on the host.

        Raises:
            ValueError, OSError: they are damaged, or gone.
        """
        where = self.states[key]
        memory = torch.empty(where["bytes"], dtype=torch.uint8)
        into = memoryview(memory.numpy())  # type: ignore[arg-type]
        with self.file.open("rb") as file:
            file.seek(where["first"])
            done = 0
            while done < len(into):
                got = file.readinto(into[done:])
                if not got:
                    raise ValueError(f"{self.file} is too short")
                done += got
        if zlib.crc32(into) != where["crc32"]:
            raise ValueError(f"{self.file} is damaged")
        return memory.view(_DTYPES[where["dtype"]]).view(where["shape"])


@dataclass(frozen=True, kw_only=True)
class Snapshots:
    """Where a pass keeps its snapshots: one at a time, and for a moment two.

    Attributes:
        directory: shared by all passes, so that another machine can go on.
        of: SHA-256 of what decides the states besides cells and tokens: model, dtype, device, versions.
        pack: of the pass, by which passes of one model at the same time differ.
    """

    directory: Path
    of: str
    pack: str

    @property
    def own(self) -> Path:
        return self.directory / f"{self.of[:16]}-{self.pack}"

    def find(self, wanted: Sequence[str]) -> Iterator[Snapshot]:
        """Yield the snapshots that hold all states of these keys, the latest block first."""
        found = []
        for file in self.directory.glob(f"{self.of[:16]}-*/block-*.json"):
            try:
                data = json.loads(file.read_text())
                ours = data["version"] == VERSION and data["of"] == self.of
                if not ours or not set(wanted) <= data["states"].keys():
                    continue
                found.append(
                    Snapshot(
                        block=int(data["block"]),
                        notes=data["notes"],
                        file=file.with_suffix(".states"),
                        states=data["states"],
                    )
                )
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
        yield from sorted(found, key=lambda snapshot: -snapshot.block)

    def write(self, block: int, states: Iterator[tuple[str, Tensor]], nbytes: int, notes: Mapping[str, Any]) -> None:
        """Write a snapshot, then remove the one before.

        Args:
            block: the next block.
            states: by key, on the host.
            nbytes: of all of them.
            notes: plain JSON values.

        Raises:
            OSError: there is no room, or no permission. The one before is kept.
        """
        self.own.mkdir(parents=True, exist_ok=True)
        usage = shutil.disk_usage(self.own)
        if usage.free - nbytes < _SPARE * usage.total:
            raise OSError(f"{self.own} has {usage.free:,} bytes free, and a snapshot takes {nbytes:,}")
        name = f"block-{block:04}"
        where: dict[str, dict[str, Any]] = {}
        partial = self.own / f"{name}.partial"
        with partial.open("wb") as file:
            for key, values in states:
                flat = values.contiguous().view(-1).view(torch.uint8)
                data = memoryview(flat.numpy())  # type: ignore[arg-type]
                where[key] = {
                    "first": file.tell(),
                    "bytes": len(data),
                    "shape": list(values.shape),
                    "dtype": str(values.dtype).removeprefix("torch."),
                    "crc32": zlib.crc32(data),
                }
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.own / f"{name}.states")
        text = json.dumps({"version": VERSION, "of": self.of, "block": block, "notes": notes, "states": where})
        beside = self.own / f"{name}.json.partial"
        beside.write_text(text)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(self.own / f"{name}.json")
        for old in self.own.iterdir():
            if old.name.split(".")[0] != name:
                old.unlink(missing_ok=True)

    def remove(self, others: Sequence[Path] = ()) -> None:
        """Remove the pass's snapshots, those that it went on from, and stale ones of all passes."""
        for directory in {self.own, *others}:
            shutil.rmtree(directory, ignore_errors=True)
        for directory in self.directory.glob("[0-9a-f]" * 16 + "-*"):
            with_files = [directory, *directory.glob("block-*")]
            newest = max((f.stat().st_mtime for f in with_files if f.exists()), default=time.time())
            if time.time() - newest > STALE_SECONDS:
                shutil.rmtree(directory, ignore_errors=True)
        if self.directory.is_dir() and not any(self.directory.iterdir()):
            self.directory.rmdir()
