"""The words of ``python -m analysis compare``: what they choose, and which are refused by name."""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd
import pytest

from analysis.inputs import Inputs
from analysis.significance.command import add_arguments, run
from kbit.errors import SpecError
from tests.analysis.planted_claims import planted


def compare(a: list[str], b: list[str]) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    df = planted(np.random.default_rng(0), few=True)
    long = pd.DataFrame({"key": df["key"], "measurement": df["key"], "eval": "text"})
    inputs = Inputs(name="x", title="x", df=df, long=long, read_samples=lambda ids: {})
    return run(parser.parse_args(["--a", *a, "--b", *b]), inputs)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["3fa9", "bits=4"], "3fa9"),
        (["bits=4", "3fa9"], "3fa9"),
        (["3fa9", "77c1"], "3fa9, 77c1"),
        (["bits=4", "dtype"], "dtype"),
    ],
)
def test_a_key_beside_other_words_is_refused_by_name(given: list[str], named: str) -> None:
    for side in ("--a", "--b"):
        sides = (given, ["bits=3"]) if side == "--a" else (["bits=3"], given)
        with pytest.raises(SpecError) as refused:
            compare(*sides)
        assert f"{side}={' '.join(given)!r} is not valid: {named} can't stand" in str(refused.value)
        assert "AXIS=VALUE" in str(refused.value)


def test_axes_and_keys_alone_choose_and_no_number_is_cut_in_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert compare(["bits=3", "dtype=int"], ["bits=4", "dtype=int"]) == 0
    said = capsys.readouterr().out
    assert "8 and 8 cells" in said
    assert "…" not in said
    keys = planted(np.random.default_rng(0), few=True)["key"]
    assert compare([keys.iloc[0]], [keys.iloc[1]]) == 0
    assert "1 and 1 cells" in capsys.readouterr().out
