"""The live line of a run says what matters at every width."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.spinner import Spinner

from sweeps.events import Measured
from sweeps.results.progress import BAR_WIDTHS, Line, RunView

RUNNING = Line(
    done=57,
    total=129,
    left="2:13",
    rate="41/min",
    elapsed="1:23",
    failed="3 failed",
    current="neox-xs 4-bit int b64 | neox-s 3-bit quantile b64",
)
LONG = Line(done=12057, total=35129, left="102:10:13", rate="41/min", elapsed="31:01:23", current="模型 4-bit int " * 9)
STARTING = Line(done=0, total=129, left="?", elapsed="0:03", current="starting workers")


def drawn(line: Line, width: int, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(width=width, file=file, force_terminal=True, color_system=None, legacy_windows=False)
    console.print(line.drawn(width, Spinner("line")))
    file.seek(0)
    (text,) = file.read().splitlines()
    return text


@pytest.mark.parametrize("width", range(30, 121))
@pytest.mark.parametrize("line", [RUNNING, LONG, STARTING], ids=["running", "long", "starting"])
def test_the_line_fits_and_keeps_its_numbers(line: Line, width: int) -> None:
    text = drawn(line, width)
    assert cell_len(text) <= width
    assert f"{line.done}/{line.total}" in text
    assert f"left {line.left}" in text


@pytest.mark.parametrize("width", range(40, 121))
@pytest.mark.parametrize("line", [RUNNING, LONG], ids=["running", "long"])
def test_there_is_a_bar_from_40_columns_on(line: Line, width: int) -> None:
    bar, _ = line.fit(width)
    assert BAR_WIDTHS[0] <= bar <= BAR_WIDTHS[1]
    assert "━" in drawn(line, width)


def test_the_current_cells_go_first_then_what_counts_least() -> None:
    shown = {width: [text for text, _ in RUNNING.fit(width)[1]] for width in (30, 40, 50, 80, 120)}
    assert shown[30] == ["57/129", "left 2:13"]
    assert shown[40] == ["57/129", "3 failed", "left 2:13"]
    assert shown[50] == ["57/129", "3 failed", "41/min", "left 2:13"]
    assert shown[80] == ["57/129 cells", "3 failed", "41/min", "left 2:13", "1:23"]
    assert shown[120][:5] == shown[80]
    assert shown[120][5].startswith("neox-xs 4-bit int b64 | neox-s")


def test_more_room_never_shows_less() -> None:
    lengths = [len(RUNNING.fit(width)[1]) for width in range(30, 121)]
    assert lengths == sorted(lengths)


def test_a_terminal_without_unicode_has_a_bar_too() -> None:
    assert "-----" in drawn(RUNNING, 80, "ascii")


def view_of(cells: int, console: Console, left: float = 0.0) -> RunView:
    return RunView(console=console, cells={f"cell{n}": 2 for n in range(cells)}, left=lambda: left)


def measured(cell: int) -> Measured:
    return Measured(row={"key": f"cell{cell}", "status": "done"})


@pytest.mark.parametrize(("seconds", "left"), [(9.7, "0:10"), (70, "1:10"), (970, "16:10"), (9990, "2:46:30")])
def test_a_time_is_shown_from_the_beginning(seconds: float, left: str) -> None:
    assert view_of(3, Console(file=io.StringIO()), seconds)._line().left == left


def test_a_cell_is_done_once_all_its_measurements_are() -> None:
    view = view_of(3, Console(file=io.StringIO()))
    counts = []
    for cell in (0, 1, 1, 0, 7, 2):
        view.on_event(measured(cell), 0)
        counts.append(view._line().done)
    assert counts == [0, 0, 1, 2, 2, 2]
    assert view.measured == 5  # of the seventh the launch had nothing left
