"""Measure a process: seconds by the clock and of CPUs, memory at its peak."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sweeps.provenance import import_environment


@dataclass(frozen=True, kw_only=True)
class Took:
    """What a process took: seconds by the clock and of CPUs, bytes at its peak; and what it said."""

    seconds: float
    cpu: float
    peak: int
    said: str


def measured(command: Sequence[str], *, programs: Path | None = None) -> Took:
    """Run a command to its end.

    Args:
        command: program and arguments.
        programs: a directory of programs that are found before others.

    Raises:
        CalledProcessError: it failed.
    """
    environment = {**os.environ, **import_environment(), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if programs is not None:
        environment["PATH"] = f"{programs}{os.pathsep}{environment.get('PATH', '')}"
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read().decode(errors="replace")
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command), output=text)
    return Took(seconds=seconds, cpu=usage.ru_utime + usage.ru_stime, peak=usage.ru_maxrss * 1024, said=text)
