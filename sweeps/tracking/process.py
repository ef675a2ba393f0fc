"""The mirror's process as the study holds it: sending never waits, whatever the process does."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from sweeps.files import open_log
from sweeps.provenance import import_environment
from sweeps.tracking.messages import Answer, Message, Trouble, answer, to_line

_OF_ONE_RUN: Final = (
    *("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RUN_GROUP", "WANDB_NAME", "WANDB_JOB_TYPE", "WANDB_SWEEP_ID"),
    *("WANDB_MODE", "WANDB_DISABLED"),
)
"""What a W&B run around the study may have left in the environment; not for our runs."""


class MirrorProcess:
    """``sweeps.tracking.mirror`` as a child, fed by a thread through a queue without bound.

    Args:
        config: its first message; 'dir' is where it logs.
        on_answer: called with what it says, from a thread of its own.
    """

    def __init__(self, config: Mapping[str, str | None], on_answer: Callable[[Answer], None]) -> None:
        folder = Path(str(config["dir"]))
        self.log_file = folder / "mirror.log"
        self._config, self._on_answer = config, on_answer
        self._queue: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._child: subprocess.Popen[str] | None = None
        self._listening = False
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
        self._listening = True
        for target in (self._write, self._read):
            self._threads.append(threading.Thread(target=target, args=(self._child,), daemon=True))
            self._threads[-1].start()

    def send(self, message: Message) -> None:
        if self._listening:
            self._queue.put(message)

    def close(self, timeout: float) -> bool:
        """Ends it; whether it was done within `timeout` seconds."""
        if self._child is None:
            return True
        self._queue.put(None)
        try:
            self._child.wait(timeout)
            return True
        except subprocess.TimeoutExpired:
            kill_with_children(self._child.pid)
            return False
        finally:
            for thread in self._threads:
                thread.join(5)

    def _write(self, child: subprocess.Popen[str]) -> None:
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended; the reader tells
            child.stdin.write(json.dumps(self._config) + "\n")
            while (message := self._queue.get()) is not None:
                child.stdin.write(to_line(message))
                child.stdin.flush()
        self._listening = False
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()

    def _read(self, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            self._on_answer(answer(line))
        self._listening = False
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
