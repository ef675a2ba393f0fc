"""What tests share: where real models and data are, and the command line, in a process of its own or in this one."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import launch as command
from tests import ROOT
from tests.forks import forks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Beside the tests on SLURM, threads of one operation would wait for each other, spinning: more than twice the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A worker alone on this machine sets more threads, which would spin while they wait for a core that others use: between
# two and three times the work of the same study.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A shell makes what it runs in the background deaf to Ctrl-C, and so what that starts: tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

Launch = Callable[..., "subprocess.CompletedProcess[str]"]


def unreported(args: Sequence[str]) -> list[str]:
    """A command's arguments with ``report=false`` where it runs a study and says nothing of that: they take seconds."""
    is_said = any(a.startswith(("mode=", "report=")) for a in args)
    return list(args) if is_said else [*args, "report=false"]


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real models (models/) and evaluation sets (eval/) outside the project; KBIT_ASSETS says where."""
    path = Path(os.environ.get("KBIT_ASSETS", ROOT.parent / "shared" / "assets"))
    if not (path / "models").is_dir() or not (path / "eval").is_dir():
        pytest.skip(f"no models/ and eval/ in {path}: set KBIT_ASSETS to a directory that has them")
    return path


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Run ``python launch.py ARGS`` in an empty directory, in a process of its own that has imported before."""
    return lambda *args, **more: forks().run(*args, cwd=tmp_path, env={**os.environ, "COLUMNS": "200"}, **more)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Launch]:
    """The same command in this process, in a tenth of the time: for what isn't about processes, signals or imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    # A command owns the logging of its process; other tests read it.
    loggers = {logger: logger.level for logger in (logging.getLogger(), logging.getLogger("analysis"))}
    handlers = logging.getLogger().handlers[:]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["launch.py", *arguments])
        capsys.readouterr()
        try:
            code = command._main()
        except SystemExit as end:
            code = int(end.code or 0)
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    yield run
    logging.getLogger().handlers[:] = handlers
    for logger, level in loggers.items():
        logger.setLevel(level)
