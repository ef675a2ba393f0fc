"""What tests of commands share: a small study that ran, once a process, and commands in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sweeps.config import DEMO_DIR
from tests.conftest import Launch

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
def ask(tmp_path: Path, here: Launch) -> Ask:
    """The command in this process, in a directory with a user's files."""
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
        said = here(*arguments)
        return Said(said.returncode, said.stdout, said.stderr)

    return run
