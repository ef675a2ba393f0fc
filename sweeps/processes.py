"""Processes of this machine, told apart though their numbers are used again."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def process_start(pid: int) -> str:
    """When a process began, so that a reused pid is not taken for it; '' when there is none (zombies count as none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def this_process() -> dict[str, str | int]:
    """Return what tells this process from all others: host, pid and when it began."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "pid_started": process_start(os.getpid())}
