"""Doors: entries by name, loaded when asked for; no default; other packages enter through entry points."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kbit.data_types import DTYPES
from kbit.doors import Door
from kbit.errors import SpecError
from kbit.spec import METHODS

Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a package with entry points: its module's source, and the text of entry_points.txt."""

    def of(source: str, points: str) -> None:
        (tmp_path / "a_plugin.py").write_text(source)
        about = tmp_path / "a_plugin-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: a-plugin\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(points)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "a_plugin", raising=False)

    return of


def test_an_entry_is_the_thing_or_where_it_is() -> None:
    door: Door[object] = Door("kbit_sweep.test", "thing", {"here": 7, "there": "kbit.errors:SpecError"})
    assert (door["here"], door["there"]) == (7, SpecError)
    assert list(door) == ["here", "there"]


def test_a_name_that_nobody_entered_is_refused_with_those_that_are() -> None:
    door: Door[int] = Door("kbit_sweep.test", "thing", {"one": 1, "two": 2})
    assert "three" not in door
    with pytest.raises(SpecError, match=r"^thing='three' is not valid: one of one, two$"):
        door["three"]


def test_another_package_enters_by_an_entry_point(install: Install) -> None:
    install("THREE = 3\n", "[kbit_sweep.test]\nthree = a_plugin:THREE\n")
    door: Door[int] = Door("kbit_sweep.test", "thing", {"one": 1})
    assert "three" in door
    assert (list(door), door["three"], len(door)) == (["one", "three"], 3, 2)


def test_a_package_can_not_take_over_a_name_of_ours(install: Install) -> None:
    install("ONE = 3\n", "[kbit_sweep.test]\none = a_plugin:ONE\n")
    door: Door[int] = Door("kbit_sweep.test", "thing", {"one": 1})
    with pytest.raises(SpecError, match=r"the entry point a_plugin:ONE of kbit_sweep.test takes a name of ours"):
        list(door)


@pytest.mark.parametrize("door", [DTYPES, METHODS], ids=lambda d: d.group)
def test_every_entry_can_be_loaded(door: Door[object]) -> None:
    assert all(door[name] is not None for name in door)
