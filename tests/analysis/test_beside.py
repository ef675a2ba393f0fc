"""Cells beside the best rounding of at most as many bits: which are compared, and by how much they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy.stats import t

from analysis.__main__ import COMMANDS
from analysis.beside import BESIDE_COLUMNS, beside_markdown, beside_rounding
from analysis.beside.command import run
from analysis.inputs import Inputs
from analysis.significance import Samples

NATS = np.random.default_rng(0).normal(3.0, 0.3, 24) * 127
SHIFTS = {
    **{"16-bit": 0.0, "int3": 0.5, "int4": 0.1, "int4 g": 0.12, "int5": 0.02, "normal4": 0.05, "int4 clipped": 0.08},
    **{"mixed 4.25": 0.09, "mixed 3.75": 0.3, "hqq4": 0.07, "awq": 0.06, "other mixed": 0.4},
}


def row(label: str, bits: float, **more: object) -> dict[str, object]:
    values = {"key": label, "label": label, "status": "done", "family": "f", "model": "m", "method": "blockwise"}
    about = {"bits": int(bits), "bits_per_param": bits, "dtype": "int", "text_loss": 3.0 + SHIFTS[label]}
    return {**values, **about, **more}


ROWS = [
    row("16-bit", 16.0, method="baseline", dtype=None),
    row("int3", 3.25),
    row("int4", 4.25),
    row("int4 g", 4.25, scheme="group"),
    row("int5", 5.25),
    row("normal4", 4.25, dtype="normal"),
    row("int4 clipped", 4.25, clip=True),
    row("mixed 4.25", 4.25, method="mixed", predicted_loss_change=0.08, calibration="{}"),
    row("mixed 3.75", 3.75, method="mixed", predicted_loss_change=0.2, calibration="{}"),
    row("hqq4", 4.5, method="hqq", dtype=None),
    row("awq", 4.31, method="awq", clip=True, calibration="{}"),
    row("other mixed", 4.0, method="mixed", model="other", calibration="{}"),
]


def outcome(label: str) -> Samples:
    noise: NDArray[np.float64] = np.random.default_rng(len(label)).normal(0, 0.01, 24)
    return {"nats": (NATS + 127 * (SHIFTS[label] + noise)).astype(np.float32), "tokens": np.full(24, 127)}


def inputs() -> Inputs:
    df = pd.DataFrame(ROWS)
    long = pd.DataFrame([{"key": r["key"], "eval": "text", "measurement": f"m-{r['key']}"} for r in ROWS])

    def read(wanted: Sequence[str]) -> Mapping[str, Samples]:
        return {m: outcome(m.removeprefix("m-")) for m in wanted}

    return Inputs(name="s", title="s", df=df, long=long, read_samples=read)


def test_each_cell_is_compared_with_the_best_rounding_of_its_type_that_takes_no_more_bits() -> None:
    found = beside_rounding(inputs())
    assert tuple(found.columns) == BESIDE_COLUMNS
    assert dict(zip(found["label"], found["rounding"], strict=True)) == {
        "int4 clipped": "int4",
        "mixed 4.25": "int4",
        "mixed 3.75": "int3",
        "hqq4": "normal4",  # of no data type: of all
        "awq": "int4",
    }
    of_integers = beside_rounding(inputs(), methods=["hqq", "awq"], dtypes=["int"]).set_index("label")
    assert of_integers["rounding"].to_dict() == {"hqq4": "int4", "awq": "int4"}
    assert found.set_index("label")["predicted"].dropna().to_dict() == {"mixed 4.25": 0.08, "mixed 3.75": 0.2}
    assert found.set_index("label").loc["mixed 3.75", ["bits", "rounding_bits"]].tolist() == [3.75, 3.25]


def test_differences_are_of_the_same_windows() -> None:
    found = beside_rounding(inputs()).set_index("label").loc["mixed 3.75"]
    own, other = (outcome(name)["nats"].astype(np.float64) / 127 for name in ("mixed 3.75", "int3"))
    difference = own - other
    assert found["difference"] == pytest.approx(difference.mean())
    half = t.ppf(0.975, 23) * difference.std(ddof=1) / np.sqrt(24)
    assert (found["low"], found["high"]) == pytest.approx((difference.mean() - half, difference.mean() + half))
    assert found["n"] == 24


def test_the_command_says_where_the_intervals_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from argparse import Namespace

    assert COMMANDS["beside"] == "analysis.beside.command"
    assert run(Namespace(method=[], dtype=[], to=tmp_path / "t.csv"), inputs()) == 0
    said = capsys.readouterr().out
    assert beside_markdown(beside_rounding(inputs())) in said
    assert "mixed 3.75   | 3.750  | int3       | 3.250 " in said
    assert "Of 5 comparisons the interval lies below 0 in 4, above in 1; 0 hold 0." in said
    assert len(pd.read_csv(tmp_path / "t.csv")) == 5
    assert run(Namespace(method=["gptq"], dtype=[], to=None), inputs()) == 0
    assert "nothing to compare" in capsys.readouterr().out
