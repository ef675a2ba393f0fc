"""What tests of commands share: a small study that ran, once a process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


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
