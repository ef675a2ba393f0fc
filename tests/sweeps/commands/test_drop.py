"""What is dropped is shown first and asked about; the last drop can be taken back."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from sweeps import load_results
from sweeps.store.parts import Store
from tests.conftest import ROOT, Launch
from tests.slurm.test_faults_files import read_only

FLOATS = "where={dtype: float}"


def states(out: Path) -> dict[str, int]:
    return dict(load_results(out)["status"].value_counts())


def at_a_terminal(out: Path, *arguments: str, answer: bytes) -> tuple[int, str]:
    """What the command prints at a terminal, where somebody answers; an empty answer is Ctrl-D."""
    parent, child = pty.openpty()
    command = [sys.executable, str(ROOT / "launch.py"), f"out={out}", *arguments]
    process = subprocess.Popen(
        command, stdin=child, stdout=child, stderr=child, cwd=out.parent, env={**os.environ, "COLUMNS": "120"}
    )
    os.close(child)
    said = b""
    while b"[y/n]" not in said:
        said += os.read(parent, 4096)
    os.write(parent, answer or b"\x04")
    while True:
        try:
            said += os.read(parent, 4096)
        except OSError:  # a terminal without a process
            break
    os.close(parent)
    return process.wait(), said.decode()


@pytest.mark.parametrize("answer", [b"n\n", b"\n", b""], ids=["no", "nothing", "end"])
def test_without_a_yes_nothing_is_dropped(small: Path, answer: bytes) -> None:
    code, said = at_a_terminal(small, "mode=drop", FLOATS, answer=answer)
    assert code == 0, said
    assert "chooses 4 measurements of 4 cells" in said
    assert said.count("jargon done") == 4
    assert "Nothing was dropped" in said
    assert states(small) == {"done": 13}


def test_a_yes_drops_and_undo_takes_the_last_drop_back(small: Path, here: Launch) -> None:
    code, said = at_a_terminal(small, "mode=drop", FLOATS, answer=b"y\n")
    assert (code, "Retired 4 measurements of 4 cells" in said) == (0, True), said
    assert states(small) == {"done": 9, "missing": 4}
    assert here(f"out={small}", "mode=drop", "where={bits: 16}", "yes=true").returncode == 0
    assert states(small) == {"done": 8, "missing": 5}
    for done, of in ((9, "where={bits: 16}"), (13, FLOATS)):
        back = here(f"out={small}", "mode=drop", "undo=true")
        assert f"Took the drop of {of} back" in back.stdout, back.stderr
        assert states(small)["done"] == done
    none = here(f"out={small}", "mode=drop", "undo=true")
    assert none.returncode == 2
    assert "no drop" in none.stderr


def test_where_nobody_can_answer_it_refuses_and_names_the_key(small: Path, here: Launch) -> None:
    refused = here(f"out={small}", "mode=drop", FLOATS)
    assert refused.returncode == 2
    assert "yes=true" in refused.stderr
    assert "4 measurements of 4 cells" in refused.stderr
    assert states(small) == {"done": 13}


def test_results_that_can_not_be_written_are_refused_before_anybody_is_asked(small: Path, here: Launch) -> None:
    with read_only(small):
        dropped = here(f"out={small}", "mode=drop", FLOATS)
        undone = here(f"out={small}", "mode=drop", "undo=true")
    for refused in (dropped, undone):
        assert refused.returncode == 2
        assert "can't be written: Read-only file system" in refused.stderr
        assert "yes=true" not in refused.stderr


def test_undo_is_of_a_whole_drop(small: Path, here: Launch) -> None:
    refused = here(f"out={small}", "mode=drop", "undo=true", FLOATS)
    assert refused.returncode == 2
    assert FLOATS in refused.stderr


def test_drops_of_earlier_versions_can_be_taken_back_too(small: Path) -> None:
    store = Store(out=small)
    ids = store.row_ids(set(store.read(["measurement"])["measurement"].to_pylist()))
    (small / "dropped").mkdir()
    (small / "dropped" / "old.json").write_text('{"row_ids": ["' + ids[0] + '"], "why": "old"}')
    os.utime(small / "dropped" / "old.json", (1e9, 1e9))
    store.drop(ids[1:3], why="new")
    assert [store.undo_drop() for _ in range(3)] == [(2, "new"), (1, "old"), None]
    assert store.read(["row_id"]).num_rows == 13
