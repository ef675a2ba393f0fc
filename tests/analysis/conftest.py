"""What the tests of ``analysis`` share."""

from __future__ import annotations

import pytest

from tests.analysis.studies import Study, make_study


@pytest.fixture(scope="session")
def study() -> Study:
    return make_study()
