"""The live view counts what is stored and in flight, and ends when nothing is left, or by Ctrl-C."""

from __future__ import annotations

import _thread
import os
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from sweeps.commands import watch
from sweeps.launches.claims import Claims
from sweeps.launches.in_flight import InFlight, read_flight
from sweeps.results.following import Followed
from sweeps.status import State
from sweeps.store.parts import Store
from tests.sweeps.studies import command, store_study, stored_row, study

NOW = datetime(2026, 1, 1, tzinfo=UTC)


Pause = Callable[[Callable[[], object]], None]


@pytest.fixture
def pause(monkeypatch: pytest.MonkeyPatch) -> Pause:
    """Have something happen in the first pause of a view; those that follow are short."""

    def happens(what: Callable[[], object]) -> None:
        to_do = [what]

        def paused(_: float) -> None:
            for each in to_do:
                each()
            to_do.clear()
            time.sleep(0.01)

        monkeypatch.setattr(watch, "sleep", paused)

    return happens


def followed(*, by: tuple[str, ...] = ("model", "bits"), retry: frozenset[State] = frozenset()) -> Followed:
    return Followed(needed=list(study(models=("m-s", "m-m")).measurements()), more=[], by=by, retry=retry)


def test_it_counts_cells_by_axes_and_what_is_left(tmp_path: Path) -> None:
    manifest = study(models=("m-s", "m-m"))
    first, second, third, fourth, *_ = manifest.measurements()
    store = store_study(tmp_path, manifest, wanted=lambda m: m in (first, second))
    store.write({**stored_row(third), "status": "failed", "error_type": "ValueError", "metrics": None})
    flight = InFlight(running={fourth.key})
    now = followed().progress(store, flight)
    groups = {place: (g.done, g.cells, g.failed, g.running) for place, g in now.groups.items()}
    assert groups[("m-s",), "16"] == (1, 1, 0, 0)
    assert groups[("m-s",), "4"] == (0, 1, 1, 1)
    assert groups[("m-m",), "3"] == (0, 1, 0, 0)
    assert (now.left, now.held, now.failures) == (9, 1, [("ValueError", 1)])
    assert followed(retry=frozenset({State.FAILED})).progress(store, flight).left == 10
    assert set(followed(by=("dtype",)).progress(store, flight).groups) == {((), "-"), ((), "int")}


def test_the_rate_is_that_of_late_and_gives_the_time_left(tmp_path: Path) -> None:
    manifest = study(models=("m-s", "m-m"))
    store = Store(out=tmp_path)
    assert followed().progress(store, InFlight(), now=NOW).seconds_left is None
    for age, measurement in zip((7200, 100, 80, 60), manifest.measurements(), strict=False):
        ended = NOW - timedelta(seconds=age)
        store.write({**stored_row(measurement), "started": ended - timedelta(seconds=20), "finished": ended})
    progress = followed().progress(store, InFlight(), now=NOW)
    assert progress.rate == pytest.approx(3 / 120)
    assert progress.seconds_left == pytest.approx(8 * 40)


def test_what_an_earlier_launch_planned_counts_where_it_is_stored_or_in_flight(tmp_path: Path) -> None:
    stored, held, *_ = study(models=("m-l",)).measurements()
    store = store_study(tmp_path, study(models=("m-s", "m-m")))
    store.write(stored_row(stored))
    one = Followed(
        needed=list(study(models=("m-s", "m-m")).measurements()),
        more=list(study(models=("m-l",)).measurements()),
        by=("model", "bits"),
        retry=frozenset(),
    )
    progress = one.progress(store, InFlight(queued={held.key}))
    assert progress.states == {State.DONE: 13, State.QUEUED: 1}
    assert (progress.left, progress.is_done) == (1, False)


@pytest.mark.parametrize(("status", "code"), [("done", 0), ("failed", 1)])
def test_it_ends_by_itself_when_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pause: Pause, status: str, code: int
) -> None:
    manifest = study()
    last, *_ = manifest.measurements()
    store = store_study(tmp_path, manifest, wanted=lambda m: m != last)
    row = {**stored_row(last), "status": status, "error_type": "ValueError" if code else None}
    pause(lambda: store.write(row))
    assert command("mode=status", f"out={tmp_path}", "watch=true") == code
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("5/6 measurements")
    assert said[-1] == ("5/6 measurements  1 failed" if code else "6/6 measurements")


def test_ctrl_c_ends_the_view_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], pause: Pause) -> None:
    store_study(tmp_path, study(), wanted=lambda m: m.eval.kind == "task")
    before = sorted(tmp_path.rglob("*"))
    pause(_thread.interrupt_main)
    assert command("mode=status", f"out={tmp_path}", "watch=true") == 0
    assert capsys.readouterr().out.startswith("3/6 measurements")
    assert sorted(tmp_path.rglob("*")) == before


def drawn(out: Path, *, width: int = 80, height: int = 24) -> list[str]:
    """The picture of a terminal of this size."""
    manifest = study(models=[f"m-{i}" for i in range(20)])
    one = Followed(needed=list(manifest.measurements()), more=[], by=watch.BY, retry=frozenset())
    progress = one.progress(Store(out=out), read_flight(out))
    console = Console(file=StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    console.print(watch._drawn(progress, watch.BY, [], console))
    file = console.file
    assert isinstance(file, StringIO)
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.fixture(scope="module")
def all_but_one_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 models, of which the fourteenth has one measurement, which failed."""
    out = tmp_path_factory.mktemp("watched")
    manifest = study(models=[f"m-{i}" for i in range(20)])
    store = store_study(out, manifest, wanted=lambda m: m.cell.model.name != "m-13")
    failed = next(m for m in manifest.measurements() if m.cell.model.name == "m-13" and m.cell.quant.bits == 4)
    store.write({**stored_row(failed), "status": "failed", "error_type": "ValueError", "metrics": None})
    return out


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60), (60, 12)])
def test_the_picture_fits_the_terminal_with_what_is_not_done_first(
    all_but_one_model: Path, width: int, height: int
) -> None:
    lines = drawn(all_but_one_model, width=width, height=height)
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    rows = [line for line in lines if re.match(r"m-\d+ ", line)]
    of_13 = next(line for line in rows if line.startswith("m-13 "))
    assert re.split(r" {2,}", of_13) == ["m-13", "0/1", "0/1 1!", "0/1"]
    assert rows[0] == of_13 or len(rows) == 20
    assert any("nobody is at it: 5 measurements" in line for line in lines)
    assert any("1 failed with ValueError" in line for line in lines)


def test_plans_are_read_again_when_a_launch_adds_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pause: Pause
) -> None:
    manifest, more = study(), study(sweep="t", models=("m-l",))
    last, *_ = manifest.measurements()
    store = store_study(tmp_path, manifest, wanted=lambda m: m != last)

    def launch() -> None:
        store_study(tmp_path, more)
        os.utime(more.path(tmp_path), (time.time() + 5,) * 2)
        store.write(stored_row(last))

    pause(launch)
    assert command("mode=status", f"out={tmp_path}", "watch=true") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "12/12 measurements"


def test_what_is_being_measured_is_shown(tmp_path: Path) -> None:
    manifest = study(models=[f"m-{i}" for i in range(20)])
    _, done, *_ = manifest.measurements()
    keys = [m.key for m in manifest.measurements()]
    store = store_study(tmp_path, manifest, wanted=lambda m: False)
    claims = Claims(out=tmp_path)
    claims.heartbeat(claims.create(1, launch="l", sweep="s", packs={"p": keys}), [keys[0]])
    first = drawn(tmp_path)[0]
    assert "0/120 measurements  1 running  119 queued" in first
    ended = datetime.now(UTC)
    store.write({**stored_row(done), "started": ended - timedelta(seconds=60), "finished": ended})
    first = drawn(tmp_path)[0]
    assert re.search(r"1/120 measurements  (0.9\d+|1) a minute  left [12]\d\d min|left 2.\d h", first), first
