"""The mirror's process as the study holds it: nothing waits, whatever the process does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from sweeps.files import open_log
from sweeps.leases import end_lease
from sweeps.provenance import import_environment
from sweeps.tracking.messages import Answer, Job, Trouble, answer

_OF_ONE_RUN: Final = (
    *("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RUN_GROUP", "WANDB_NAME", "WANDB_JOB_TYPE", "WANDB_SWEEP_ID"),
    *("WANDB_MODE", "WANDB_DISABLED"),
)
"""What a W&B run around the study may have left in the environment; not for our runs."""


class MirrorProcess:
    """``sweeps.tracking.mirror`` as a child.

    Args:
        job: what it does; the directory of its configuration is where it logs.
        on_answer: called with what it says, from a thread of its own.
    """

    def __init__(self, job: Job, on_answer: Callable[[Answer], None]) -> None:
        self.log_file = Path(str(job.tracking["dir"])) / "mirror.log"
        self._place = Path(job.out) / "tracking"
        self._on_answer = on_answer
        self._child: subprocess.Popen[str] | None = None
        try:
            with open_log(self.log_file) as log:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "sweeps.tracking.mirror"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=_environment(),
                    start_new_session=True,  # Ctrl-C is for the study, which then closes the mirror in order
                )
        except OSError as error:
            on_answer(Trouble(reason=f"the mirror's process can't start: {error}"))
            return
        self._thread = threading.Thread(target=self._read, args=(self._child,), daemon=True)
        self._thread.start()
        self._say(job.to_line())

    def close(self, timeout: float) -> bool:
        """Have it end; return whether it was done within `timeout` seconds."""
        child = self._child
        if child is None:
            return True
        self._say(f"{timeout}\n", end=True)
        try:
            child.wait(timeout)
            return True
        except subprocess.TimeoutExpired:
            kill_with_children(child.pid)
            child.wait()
            with contextlib.suppress(OSError):
                end_lease(self._place, child.pid)
            return False
        finally:
            self._thread.join(5)

    def _say(self, line: str, *, end: bool = False) -> None:
        """Write a line, which a pipe takes at once."""
        assert self._child is not None
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended; the reader tells
            self._child.stdin.write(line)
            self._child.stdin.flush()
        if end:
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.close()

    def _read(self, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            self._on_answer(answer(line))
        if child.wait() > 0:  # negative is our own kill
            reason = f"the mirror's process ended with exit code {child.returncode}, see {self.log_file}"
            self._on_answer(Trouble(reason=reason))


def kill_with_children(pid: int) -> None:
    """End a mirror at once. Its child wandb-core, a session of its own, would outlive it for hours during an outage."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            parent = stat.read_text().rpartition(")")[2].split()[1]
            if int(parent) == pid:
                children.append(int(stat.parent.name))
    # The mirror before its child, whose end it would report; but a process that ends itself does so last.
    for process in sorted([pid, *children], key=lambda p: p == os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _environment() -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in _OF_ONE_RUN}
    # No GPU is wandb's to look at.
    settings = {"WANDB_SILENT": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return env | settings | import_environment()
