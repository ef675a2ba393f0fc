"""What a study costs is known before anything like it was measured, within a factor of two."""

from __future__ import annotations

import re

from tests.conftest import Launch

DEMO_SECONDS = 189.0
"""What README says of the demo on two cores of a server."""


def test_the_first_prediction_of_the_demo_is_right_within_a_factor_of_two(launch: Launch) -> None:
    said = launch("mode=plan", "executor.device=cpu", "executor.workers=2").stdout
    match = re.search(r"wall time +(\d+) min predicted with 2 cpu", said)
    assert match is not None, said
    assert DEMO_SECONDS / 2 < float(match[1]) * 60 < DEMO_SECONDS * 2
