"""The mirror's process as the study holds it: whatever it does, the study waits for its end alone, for so long."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from sweeps.files import open_log, require_directory
from sweeps.provenance import import_environment
from sweeps.tracking.messages import Answer, Job, Trouble, answer

_OF_ONE_RUN: Final = (
    *("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RUN_GROUP", "WANDB_NAME", "WANDB_JOB_TYPE", "WANDB_SWEEP_ID"),
    *("WANDB_MODE", "WANDB_DISABLED"),
)
"""What a W&B run around the study may have left in the environment; not for our runs."""


class MirrorProcess:
    """``sweeps.tracking.mirror`` as a child, which is told its job at once and its end by ``close``.

    Args:
        job: what it does; the configuration's 'dir' is where it logs.
        on_answer: called with what it says, from a thread of its own.
    """

    def __init__(self, job: Job, on_answer: Callable[[Answer], None]) -> None:
        self.log_file = _log_of(job)
        self._on_answer = on_answer
        self._child: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        try:
            job = _with_place(job)
            self.log_file = _log_of(job)
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
            self._thread.start()
        except (OSError, RuntimeError) as error:  # the latter where there may be no thread more
            if self._child is not None:
                kill_with_children(self._child.pid)
                self._child.wait()
                self._child = None
            on_answer(Trouble(reason=f"the mirror's process can't start: {error}"))
            return
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended; the reader tells
            self._child.stdin.write(job.to_line())
            self._child.stdin.flush()

    def finish(self) -> None:
        """Have it look a last time, and end."""
        if self._child is not None and self._child.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.close()

    def wait(self, timeout: float) -> bool:
        """Wait for its end; whether that came within `timeout` seconds."""
        try:
            return self._child is None or self._child.wait(timeout) is not None
        except subprocess.TimeoutExpired:
            return False

    def close(self, timeout: float) -> bool:
        """Ends it; whether it was done within `timeout` seconds. What it said has then been told."""
        if self._child is None:
            return True
        self.finish()
        in_time = self.wait(timeout)
        if not in_time:
            kill_with_children(self._child.pid)
        self._thread.join(5)
        return in_time

    def _read(self) -> None:
        child = self._child
        assert child is not None
        assert child.stdout is not None
        for line in child.stdout:
            self._on_answer(answer(line))
        if child.wait() > 0:  # negative is our own kill
            reason = f"the mirror's process ended with exit code {child.returncode}, see {self.log_file}"
            self._on_answer(Trouble(reason=reason))


def _log_of(job: Job) -> Path:
    return Path(str(job.tracking["dir"])) / "mirror.log"


def _with_place(job: Job) -> Job:
    """Have what is written beside a results directory be elsewhere where this user may only read it, or it is gone."""
    try:
        require_directory(Path(job.out))
        open_log(_log_of(job)).close()
    except OSError:
        return replace(job, tracking={**job.tracking, "dir": tempfile.mkdtemp(prefix="kbit-mirror-")})
    return job


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
