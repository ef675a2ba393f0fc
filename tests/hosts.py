"""Hosts made of namespaces: each has a name, pids, a network, a /proc and a boot id; they share a directory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from tests import ROOT

_SPACES: Final = ("--user", "--uts", "--pid", "--net", "--mount")
_BOOT: Final = """
echo $1 > /proc/sys/kernel/hostname
mount --bind $2/boot_id /proc/sys/kernel/random/boot_id
mount --bind $3 $2/results
mount -t tmpfs tmpfs /dev/shm
echo up
exec sleep 3600
"""


@dataclass(frozen=True, kw_only=True)
class Host:
    """One of them.

    Attributes:
        home: for its temporary files; seen from outside, too.
        init: pid of its first process, as it is outside.
    """

    home: Path
    init: int

    @property
    def out(self) -> Path:
        """Where the shared directory is, on it."""
        return self.home / "results"

    def start(self, *command: str, **more: Any) -> subprocess.Popen[str]:
        """Start Python with these arguments on it."""
        enter = ["nsenter", "--target", str(self.init), *_SPACES, "--preserve-credentials", "--", sys.executable]
        environment = {**os.environ, "TMPDIR": str(self.home / "tmp"), "PYTHONPATH": str(ROOT), "COLUMNS": "400"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **more}
        return subprocess.Popen([*enter, *command], env=environment, cwd=self.home, text=True, **pipes)

    def kill(self) -> None:
        """Let it lose power: all that runs on it is gone at once."""
        os.kill(self.init, signal.SIGKILL)


@contextmanager
def hosts(home: Path, *names: str) -> Iterator[list[Host]]:
    """Start hosts with these names, which may be equal, that share ``home/shared``; skip where this is not allowed."""
    (home / "shared").mkdir()
    with ExitStack() as stack:
        yield [stack.enter_context(_host(home / f"host{n}", name, home / "shared")) for n, name in enumerate(names)]


@contextmanager
def _host(home: Path, name: str, shared: Path) -> Iterator[Host]:
    for directory in ("results", "tmp"):
        (home / directory).mkdir(parents=True)
    (home / "boot_id").write_text(f"{uuid.uuid4()}\n")
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("no unshare and nsenter: apt install util-linux")
    command = ["unshare", *_SPACES, "--map-root-user", "--fork", "--kill-child", "--mount-proc"]
    command += ["sh", "-ec", _BOOT, "sh", name, str(home), str(shared)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            if process.stdout.readline() != "up\n":
                pytest.skip(f"namespaces are not allowed here: {process.stderr.read().strip()}")
            (init,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            yield Host(home=home, init=int(init))
        finally:
            process.kill()
