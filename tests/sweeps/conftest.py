"""What tests of launches share."""

from __future__ import annotations

import pytest


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have launches of this process start workers that make up results, where nobody looks at these."""
    monkeypatch.setattr("sweeps.worker.pool.WORKER", "tests.sweeps.made_up")
