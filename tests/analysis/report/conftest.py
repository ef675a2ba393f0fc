"""What the tests of reports share: laws are fitted without the time that their intervals take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def few_draws() -> Iterator[None]:
    """Fit laws once for their values and twice for their intervals."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("analysis.report.sections.DRAWS", 2)
        yield
