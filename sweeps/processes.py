"""Processes told apart from all others, on whatever machine, though names and numbers are used again.

A pid means something where it was given: under one running kernel, in one namespace of pids. Names of machines don't
say that: containers and machines made from one image have one name and give the same pids, and one that starts again
gives them again. So a process is known by the kernel's boot id and its namespace, too, and where these differ nobody
can say from here whether it runs.
"""

from __future__ import annotations

import functools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
"""Made by the kernel as it starts: random(4)."""
FIRST_NAMESPACE: Final = "pid:[4026531836]"
"""The namespace of pids that a kernel starts with: ``PID_NS_INIT_INO`` of <linux/nsfs.h>. Containers have others."""


def process_start(pid: int) -> str:
    """When a process began, so that a reused pid is not taken for it; '' when there is none (zombies count as none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


@functools.cache
def this_machine() -> str:
    """Return what tells this kernel, since it started, and this namespace of pids from all others; '' if unknown."""
    try:
        status = Path("/proc/self/status").read_text()
        # One number a namespace, from that of /proc to this process's own: with more, /proc shows others' pids.
        if len(status.partition("NSpid:")[2].partition("\n")[0].split()) != 1:
            return ""
        return f"{BOOT_ID.read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def this_process() -> dict[str, str | int]:
    """Return what tells this process from all others: the machine and its name, pid and when it began."""
    return {
        "host": socket.gethostname(),
        "machine": this_machine(),
        "pid": os.getpid(),
        "pid_started": process_start(os.getpid()),
    }


def is_running(process: Mapping[str, Any]) -> bool | None:
    """Tell whether a process runs; None where that can't be seen from here.

    Args:
        process: what ``this_process`` said of it. An earlier version's has no machine: the name stands for it.
    """
    here = this_machine()
    if not here or process["host"] != socket.gethostname() or process.get("machine", here) != here:
        return None
    started = process_start(process["pid"])
    if not started and _is_hidden(process["pid"]):
        return None
    return started == str(process["pid_started"])


def seconds_since_restart(process: Mapping[str, Any]) -> float | None:
    """Return how long this machine has run since it was started again; None where a process may be of another machine.

    Args:
        process: what ``this_process`` said of one that can't be seen from here.
    """
    boot, _, namespace = str(process.get("machine", "")).partition(" ")
    here, _, of_here = this_machine().partition(" ")
    is_again = process["host"] == socket.gethostname() and namespace == of_here == FIRST_NAMESPACE and boot != here
    return time.clock_gettime(time.CLOCK_BOOTTIME) if is_again else None


def _is_hidden(pid: int) -> bool:
    """Tell whether a pid is another user's and /proc shows only one's own (hidepid, as clusters' login nodes have)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not os.access(f"/proc/{pid}/stat", os.R_OK)
    except OSError:
        return False
    return False
