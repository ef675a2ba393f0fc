"""Detect kills by the kernel's out-of-memory killer, from its control groups (cgroups(7), Linux)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def oom_kills(process: Path = Path("/proc/self")) -> int | None:
    """Count the processes that the kernel ever killed in a process's control group because memory ran out.

    A killed process counts in its own group, whichever group's limit it was. So a rise between two calls tells such a
    death from another SIGKILL.

    Args:
        process: a directory like /proc/PID, with the files ``cgroup`` and ``mountinfo``.

    Returns:
        None where there is no memory controller to ask.
    """
    for directory, counter in _memory_groups(process):
        try:
            lines = (directory / counter).read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return None


def _memory_groups(process: Path) -> Iterator[tuple[Path, str]]:
    """Yield where a process's memory controller may be, and the file that counts.

    Version 1's come first: both versions can be mounted, and then version 1 has it.
    """
    try:
        groups = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
    except OSError:
        return
    for controllers, kind, counter in (("memory", "cgroup", "memory.oom_control"), ("", "cgroup2", "memory.events")):
        paths = [path for _, names, path in groups if controllers in names.split(",")]
        for fields in mounts:
            # ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS [OPTIONAL ...] - TYPE SOURCE SUPEROPTIONS
            root, mountpoint, (type_, _, options) = fields[3], fields[4], fields[fields.index("-") + 1 :]
            if type_ == kind and (not controllers or controllers in options.split(",")):
                yield from ((_under(Path(mountpoint), root, path), counter) for path in paths)


def _under(mountpoint: Path, root: str, path: str) -> Path:
    """Return a group's directory, where the mount shows the hierarchy from ``root`` on (in a container, say)."""
    group = Path(path)
    return mountpoint / (group.relative_to(root) if group.is_relative_to(root) else group.relative_to("/"))
