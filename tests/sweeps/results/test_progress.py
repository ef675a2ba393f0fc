"""The live line of a run says what matters at every width."""

from __future__ import annotations

import io
import time

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.spinner import Spinner

from sweeps.events import Measured, Withheld
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


def view_of(cells: int, console: Console) -> RunView:
    return RunView(console=console, cells={f"cell{n}": 2 for n in range(cells)}, _began=time.monotonic() - 10)


def measured(cell: int) -> Measured:
    return Measured(row={"key": f"cell{cell}", "status": "done"})


@pytest.mark.parametrize(("cells", "left"), [(1, "0:10"), (4, "1:10"), (49, "16:10"), (500, "2:46:30")])
def test_a_time_is_shown_as_soon_as_anything_was_measured(
    cells: int, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    view = view_of(cells, Console(file=io.StringIO()))
    assert view._line().left == "?"
    view.on_event(measured(0), 0)
    assert view._line().left == left


def test_what_was_not_measured_since_its_data_changed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    view = view_of(3, Console(file=io.StringIO()))
    for cell in range(2):
        view.on_event(measured(cell), 0)
        view.on_event(Withheld(pack="p", measurement=f"m{cell}", why="text.txt changed"), 0)
    assert view._line().left == "0:10"
    view.on_event(measured(2), 0)
    view.on_event(measured(2), 0)
    assert view._line().left == "0:00"
