"""Fixtures of the mirror's tests."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sweeps.tracking.wandb_server import KEY, WandbServer, free_port


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    if importlib.util.find_spec("openwandb") is None:
        pytest.skip("openwandb, the W&B server of these tests, isn't installed (pip install openwandb)")
    server = WandbServer(f"http://127.0.0.1:{free_port()}", tmp_path_factory.mktemp("openwandb"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def wandb_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user with a key and nothing else of W&B's, and no home in which tests could leave things."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)
