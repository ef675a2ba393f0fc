"""Memory of a process's control group (cgroups(7), Linux): its limit, and kills by the out-of-memory killer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

_EVENTS: Final = {1: "memory.oom_control", 2: "memory.events"}
_LIMIT: Final = {1: "memory.limit_in_bytes", 2: "memory.max"}
"""Files of a group by the version of control groups."""


def oom_kills(process: Path = Path("/proc/self")) -> int | None:
    """Count the processes that the kernel ever killed in a process's control group because memory ran out.

    A killed process counts in its own group, whichever group's limit it was. So a rise between two calls tells such a
    death from another SIGKILL.

    Args:
        process: a directory like /proc/PID, with the files ``cgroup`` and ``mountinfo``.

    Returns:
        None where there is no memory controller to ask.
    """
    for directory, version in _memory_groups(process):
        try:
            lines = (directory / _EVENTS[version]).read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return None


def memory_limit(process: Path = Path("/proc/self")) -> int | None:
    """Return in bytes the least limit of a process's control group and those above it; None where there is none.

    Args:
        process: as for ``oom_kills``.
    """
    limits = []
    for directory, version in _memory_groups(process):
        for group in (directory, *directory.parents):
            try:
                text = (group / _LIMIT[version]).read_text().strip()
            except OSError:
                continue
            # Version 2 writes 'max' for none, version 1 a number beyond any machine's memory.
            limits += [int(text)] if text.isdigit() and int(text) < 1 << 60 else []
    return min(limits, default=None)


def _memory_groups(process: Path) -> Iterator[tuple[Path, int]]:
    """Yield where a process's memory controller may be, and the version of its files.

    Version 1's come first: both versions can be mounted, and then version 1 has it.
    """
    try:
        groups = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
    except OSError:
        return
    for controllers, kind, version in (("memory", "cgroup", 1), ("", "cgroup2", 2)):
        paths = [path for _, names, path in groups if controllers in names.split(",")]
        for fields in mounts:
            # ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS [OPTIONAL ...] - TYPE SOURCE SUPEROPTIONS
            root, mountpoint, (type_, _, options) = fields[3], fields[4], fields[fields.index("-") + 1 :]
            if type_ == kind and (not controllers or controllers in options.split(",")):
                yield from ((_under(Path(mountpoint), root, path), version) for path in paths)


def _under(mountpoint: Path, root: str, path: str) -> Path:
    """Return a group's directory, where the mount shows the hierarchy from ``root`` on (in a container, say)."""
    group = Path(path)
    return mountpoint / (group.relative_to(root) if group.is_relative_to(root) else group.relative_to("/"))
