"""Commands in processes of their own that start at once: each is forked from a process that has imported all of them.

``python launch.py`` imports for 0.6 CPU seconds before it does a thing, and the tests run hundreds. What is about
starting, signals, terminals or imports runs the program itself.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).parents[1]
SERVER = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.forks import serve; serve(int(sys.argv[1]))"
NUMBER = 8
"""Bytes of a process' id, and of an exit code."""


@dataclass(frozen=True, kw_only=True)
class Forks:
    """Runs ``python launch.py ARGS``.

    Attributes:
        server: where the process that forks listens.
    """

    server: socket.socket

    def run(
        self, *args: str, cwd: Path, env: Mapping[str, str], together: bool = False, timeout: float = 300.0
    ) -> subprocess.CompletedProcess[str]:
        """Run it and wait, as ``subprocess.run`` would. Threads may do so at the same time.

        Args:
            *args: of the command line.
            cwd: where.
            env: its whole environment; of what Python reads as it starts, the server's counts.
            together: standard error goes to standard output.
            timeout: in seconds; then it is killed.
        """
        ours, theirs = socket.socketpair()
        with ours, theirs, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
            asked = json.dumps({"args": args, "cwd": str(cwd), "env": dict(env)}).encode()
            files = [out.fileno(), (out if together else error).fileno(), theirs.fileno()]
            socket.send_fds(self.server, [asked], files)
            theirs.close()
            ours.settimeout(timeout)
            pid = _number(ours)
            try:
                code = _number(ours)
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                raise
            return subprocess.CompletedProcess(args, code, _text(out), _text(error))


@contextmanager
def forking(python: str = sys.executable, **process: Any) -> Iterator[Forks]:
    """Start a process that forks commands; it ends with the context, or with this process.

    Args:
        python: the interpreter.
        **process: as of ``subprocess.Popen``: whose process it is, and its environment.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    with ours, theirs:
        command = [python, "-P", "-c", SERVER, str(theirs.fileno())]
        server = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True, **process
        )
        theirs.close()
        try:
            yield Forks(server=ours)
        finally:
            ours.close()
            server.wait()


def forks() -> Forks:
    """What runs this process' commands; begun with the first."""
    with _ONE:
        if not _forks:
            stack = ExitStack()
            atexit.register(stack.close)
            _forks.append(stack.enter_context(forking(env=_environment)))
        return _forks[0]


_ONE = threading.Lock()
_forks: list[Forks] = []
_environment = {**os.environ, "OMP_NUM_THREADS": "1"}


def serve(number: int) -> None:
    """Fork a process for each command that is asked for, until nobody can ask any more."""
    import gc
    from importlib import import_module

    import joblib  # noqa: F401
    import pandas as pd  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import rich.table  # noqa: F401

    import launch
    from sweeps.commands.modes import MODES

    for function in MODES.values():
        import_module(function.partition(":")[0])
    # What Hydra and our schema make of themselves in a first command.
    sys.argv = ["launch.py", "mode=status", "out=/dev/null"]
    with redirect_stderr(io.StringIO()):
        launch._main()
    gc.freeze()
    server = socket.socket(fileno=number)
    watching = 0
    while True:
        asked, files, _, _ = socket.recv_fds(server, 1 << 20, 3)
        # Their time counts for this process once it has waited for them.
        while watching and os.waitpid(-1, 0 if not asked else os.WNOHANG)[0]:
            watching -= 1
        if not asked:
            return
        if os.fork() == 0:
            server.close()
            _watch(json.loads(asked), *files)
        watching += 1
        for file in files:
            os.close(file)


def _watch(asked: Mapping[str, Any], out: int, error: int, reply: int) -> NoReturn:
    """Fork the command, and tell its id, and how it ended."""
    pid = os.fork()
    if pid == 0:
        os.close(reply)
        _become(asked, out, error)
    os.write(reply, pid.to_bytes(NUMBER, "big", signed=True))
    _, status = os.waitpid(pid, 0)
    os.write(reply, os.waitstatus_to_exitcode(status).to_bytes(NUMBER, "big", signed=True))
    os._exit(0)


def _become(asked: Mapping[str, Any], out: int, error: int) -> NoReturn:
    import launch

    os.dup2(out, 1)
    os.dup2(error, 2)
    os.closerange(3, max(out, error) + 1)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [str(ROOT / "launch.py"), *asked["args"]]
    launch.main()
    sys.exit()


def _number(reply: socket.socket) -> int:
    data = reply.recv(NUMBER, socket.MSG_WAITALL)
    if len(data) < NUMBER:
        raise ChildProcessError("the process that forks commands has ended")
    return int.from_bytes(data, "big", signed=True)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()
