"""Processes that the test cluster starts and ends: by id and start time, never by name."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class ClusterError(RuntimeError):
    """The test cluster could not be started or did not get where it should."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process by id and start time (clock ticks since boot), so that a reused id is never taken for it."""

    pid: int
    started: int

    @classmethod
    def find(cls, pid: int) -> Process | None:
        """The process that has this id now, None where there is none or it only waits for its parent to reap it."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in "ZX" else cls(pid=pid, started=int(fields[19]))

    def alive(self) -> bool:
        return Process.find(self.pid) == self

    def end(self, number: signal.Signals = signal.SIGTERM, patience: float = 10.0) -> None:
        """Send a signal and wait until the process has gone; SIGKILL when `patience` seconds did not do."""
        for attempt in (number, signal.SIGKILL):
            if not self.alive():
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, attempt)
            end = time.monotonic() + patience
            while self.alive() and time.monotonic() < end:
                time.sleep(0.02)


def wait_until(what: str, reached: Callable[[], bool], seconds: float = 30.0) -> None:
    """Poll until `reached`; a progress line every five seconds. ClusterError after `seconds`."""
    begin = told = time.monotonic()
    while not reached():
        now = time.monotonic()
        if now - begin > seconds:
            raise ClusterError(f"waited {seconds:.0f} s for {what}")
        if now - told >= 5:
            told = now
            print(f"  waiting for {what} ({now - begin:.0f} s)", file=sys.stderr, flush=True)
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """TCP ports of 127.0.0.1 that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def spawn(path: str, argv: list[str], environment: dict[str, str], log: Path) -> Process:
    """Start a daemon in a session of its own, its output appended to `log`. ClusterError when it ends at once."""
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    process = Process.find(os.posix_spawn(path, argv, environment, file_actions=actions, setsid=True))
    if process is None:
        raise ClusterError(f"{argv[0]} ended at once: see {log}")
    return process


def processes_of_jobs(config: Path, node: str, log: Path) -> list[Process]:
    """A node's slurmstepd, which hold its log open, then the processes of its jobs, told by their environment."""
    steps, tasks = [], []
    marks = {f"SLURM_CONF={config}".encode(), f"SLURMD_NODENAME={node}".encode()}
    for entry in Path("/proc").glob("[0-9]*"):
        # Processes end while they are looked at, and other users' can't be.
        with contextlib.suppress(OSError):
            process = Process.find(int(entry.name))
            if process is None:
                continue
            if marks <= set((entry / "environ").read_bytes().split(b"\0")):
                tasks.append(process)
            elif any(descriptor.readlink() == log for descriptor in (entry / "fd").iterdir()):
                steps.append(process)
    return steps + tasks
