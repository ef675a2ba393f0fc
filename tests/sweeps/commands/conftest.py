"""What tests of commands share: a small study that ran, once a process, and commands in this process."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import launch as command
from sweeps.config import DEMO_DIR

MODEL = DEMO_DIR / "models" / "neox-xs"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small study, done. Tests leave it as it is."""
    from tests.sweeps.commands.test_run import SMALL, start

    out = tmp_path_factory.mktemp("small") / "results"
    process = start(out, *SMALL)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return out


@pytest.fixture
def small(finished: Path, tmp_path: Path) -> Path:
    """The same in another place, a test's own."""
    return Path(shutil.copytree(finished, tmp_path / "r"))


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    error: str


Ask = Callable[..., Said]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Ask]:
    """The command in this process, in a directory with a user's files: faster than one process per message."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    # A command owns the logging of its process; other tests read it.
    loggers = {logger: logger.level for logger in (logging.getLogger(), logging.getLogger("analysis"))}
    handlers = logging.getLogger().handlers[:]
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "table.json").write_text("[]")
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "misplaced.yaml").write_text("# @package _global_\nsweep: {name: m, quant: [{bits: 16}]}\n")
    shutil.copytree(MODEL, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "wikitext2_raw_test.jsonl").write_text('{"text": "some text"}\n')

    def run(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["launch.py", *arguments])
        try:
            code = command._main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    yield run
    logging.getLogger().handlers[:] = handlers
    for logger, level in loggers.items():
        logger.setLevel(level)
