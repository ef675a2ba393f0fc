"""Fixtures of the mirror's tests."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeps.tracking.config import TrackingConfig
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


@pytest.fixture
def online(server: WandbServer, tmp_path: Path) -> TrackingConfig:
    """A project of the test's own."""
    return TrackingConfig(mode="online", base_url=server.url, dir=str(tmp_path / "wandb"), project=tmp_path.name)


@pytest.fixture
def name(tmp_path: Path) -> str:
    """A study's name of the test's own: the server is all tests'."""
    return f"of-{tmp_path.name.strip('0123456789_')[-30:]}"
