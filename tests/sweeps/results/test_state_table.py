"""Counts by many axes are readable in terminals of every width, and in a pipe."""

from __future__ import annotations

import io
import re

import pandas as pd
import pytest
from rich.cells import cell_len
from rich.console import Console

from sweeps.results.state_table import StateCounts

AXES = ("model", "bits", "dtype", "blocksize", "exponent_bits", "outlier_fraction")
STATES = ("done", "diverged", "failed", "missing")
RESULTS = pd.DataFrame(
    [
        ("pythia-410m", 16, None, None, None, 0.0, "done"),
        ("pythia-410m", 4, "float", 64, 2, 0.0, "done"),
        ("pythia-410m", 4, "float", 64, 2, 0.0, "failed"),
        ("pythia-410m", 4, "float", 64, 3, 0.0, "missing"),
        ("pythia-410m", 4, "quantile", 64, None, 0.02, "done"),
        ("pythia-1.4b", 4, "quantile", 1024, None, 0.02, "diverged"),
    ],
    columns=[*AXES, "status"],
).astype({"bits": "Int64", "blocksize": "Int64", "exponent_bits": "Int64"})
COUNTS = StateCounts.of(RESULTS, AXES, STATES)


def shown(counts: StateCounts, width: int, *, terminal: bool = True) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=terminal, color_system=None, legacy_windows=False)
    counts.show(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_cells_are_counted_by_every_axis() -> None:
    assert len(COUNTS.rows) == 5
    assert (("pythia-410m", "4", "float", "64", "2", "0.0"), (1, 0, 1, 0)) in COUNTS.rows
    assert (("pythia-410m", "16", "-", "-", "-", "0.0"), (1, 0, 0, 0)) in COUNTS.rows


def test_a_block_of_a_whole_row_is_counted_as_row() -> None:
    counts = StateCounts.of(
        RESULTS.assign(blocksize=pd.array([-1, -1, 64, 64, None, 64], dtype="Int64")), ("blocksize",), STATES
    )
    assert {values for values, _ in counts.rows} == {("row",), ("64",), ("-",)}


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_no_value_is_cut_at_any_width(width: int) -> None:
    lines = shown(COUNTS, width)
    text = "\n".join(lines)
    assert max(map(cell_len, lines)) <= width
    assert "…" not in text
    for value in ("pythia-410m", "pythia-1.4b", "quantile", "float", "1024", "0.02"):
        assert value in text
    assert "diverged" in text
    assert "missing" in text


def test_at_80_columns_each_group_has_one_line() -> None:
    lines = shown(COUNTS, 80)
    (at,) = [i for i, line in enumerate(lines) if "quantile" in line and "pythia-1.4b" in line]
    assert lines[at].split() == ["pythia-1.4b", "4", "quantile", "1024", "-", "0.02", "1", "diverged"]
    assert len(lines) - at == len(COUNTS.rows)
    assert sum("1 done, 1 failed" in line for line in lines) == 1
    # What is as above isn't said again.
    assert sum("pythia-410m" in line for line in lines) == 1


def test_an_axis_that_is_the_same_everywhere_is_said_once_where_room_is_scarce() -> None:
    counts = StateCounts.of(RESULTS[RESULTS["bits"] == 4].assign(family="pythia"), ("family", *AXES), STATES)
    assert shown(counts, 80)[0] == "all with family=pythia, bits=4"
    assert not any("all with" in line for line in shown(counts, 200))


def test_in_a_pipe_each_line_is_whole_whatever_the_width() -> None:
    lines = shown(COUNTS, 40, terminal=False)
    assert [line.split() for line in lines[:1]] == [[*AXES, *STATES, "all"]]
    assert len(lines) == 1 + len(COUNTS.rows)
    assert all(len(line.split()) == len(AXES) + len(STATES) + 1 for line in lines)
    assert ["pythia-410m", "4", "float", "64", "2", "0.0", "1", "0", "1", "0", "2"] in [line.split() for line in lines]
    # Columns are aligned, too.
    assert (
        len({re.search("float|quantile|dtype", line).start() for line in lines if "float" in line or "q" in line}) == 1
    )  # type: ignore[union-attr]


def test_one_group_keeps_its_axes() -> None:
    one = StateCounts.of(RESULTS[:1], ("model",), ("done",))
    for width in (20, 40, 80):
        assert any("pythia-410m" in line for line in shown(one, width))
