"""Stores that are joined hold what both had, once; where they disagree it is said, and the user decides."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sweeps import load_results, load_samples
from sweeps.launches.claims import Claims
from sweeps.store.parts import Store
from sweeps.study.cell import Measurement
from sweeps.study.manifest import load_manifests
from tests import ROOT
from tests.conftest import Launch
from tests.sweeps.commands.test_run import SMALL, assert_whole
from tests.sweeps.studies import command, store_study, stored_row, study

EARLIER = ROOT / "tests" / "data" / "earlier_results"
"""Five studies that ran, here and on SLURM, at commit c368867."""


def is_text(measurement: Measurement) -> bool:
    return measurement.eval.kind == "perplexity"


def numbers(out: Path) -> dict[str, tuple[str, tuple[tuple[str, float], ...]]]:
    rows = Store(out=out).read(["measurement", "row_id", "status", "metrics"]).to_pylist()
    return {r["measurement"]: (r["status"], tuple(r["metrics"] or ())) for r in rows}


def files(out: Path) -> dict[str, tuple[bytes, float]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime) for p in out.rglob("*") if p.is_file()}


def test_two_halves_become_a_whole_with_samples_and_nothing_is_left_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = study()
    store_study(tmp_path / "a", manifest, wanted=is_text)
    store_study(tmp_path / "b", manifest, wanted=lambda m: not is_text(m))
    store_study(tmp_path / "whole", manifest)
    source = files(tmp_path / "b")
    assert command("mode=merge", f"out={tmp_path}/a", f"from={tmp_path}/b") == 0
    said = capsys.readouterr().out
    assert "3 measurements joined" in said
    assert "s: nothing to do" in said
    assert files(tmp_path / "b") == source
    joined = load_results(tmp_path / "a", long=True)
    whole = load_results(tmp_path / "whole", long=True)
    shown = ["measurement", "status", "metrics", "stderr", "launch", "versions", "host"]
    assert joined.set_index("measurement")[shown[1:]].equals(whole.set_index("measurement")[shown[1:]])
    keys = list(whole["measurement"])
    ours, theirs = load_samples(tmp_path / "a", keys), load_samples(tmp_path / "whole", keys)
    assert all((ours[k][name] == theirs[k][name]).all() for k in keys for name in theirs[k])


def test_what_both_have_is_not_doubled_and_joining_again_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = study()
    store_study(tmp_path / "a", manifest, wanted=is_text)
    store_study(tmp_path / "b", manifest)
    assert command("mode=merge", f"out={tmp_path}/a", f"from={tmp_path}/b") == 0
    assert "3 measured in both and equal" in capsys.readouterr().out
    before, rows = files(tmp_path / "a"), Store(out=tmp_path / "a").row_ids([m.key for m in manifest.measurements()])
    assert len(rows) == 6
    assert command("mode=merge", f"out={tmp_path}/a", f"from={tmp_path}/b") == 0
    assert "0 measurements joined, 3 measured in both and equal, 3 here before" in capsys.readouterr().out
    assert files(tmp_path / "a") == before


def test_several_real_studies_come_along_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("mode=merge", f"out={tmp_path}/a", f"from={EARLIER}") == 0
    assert numbers(tmp_path / "a") == numbers(EARLIER)
    assert [m.name for m in load_manifests(tmp_path / "a")] == [m.name for m in load_manifests(EARLIER)]
    assert "local_done: nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(("prefer", "code"), [("null", 1), ("mine", 0), ("theirs", 0)])
def test_other_numbers_of_one_measurement_are_named_and_decided_by_the_user_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, prefer: str, code: int
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    manifest = study()
    store_study(tmp_path / "a", manifest, seed=1, wanted=is_text)
    store_study(tmp_path / "b", manifest, seed=2)
    mine, theirs = numbers(tmp_path / "a"), numbers(tmp_path / "b")
    assert command("mode=merge", f"out={tmp_path}/a", f"from={tmp_path}/b", f"prefer={prefer}") == code
    said = capsys.readouterr().out
    assert "3 measurements of both with different numbers" in said
    for measurement in filter(is_text, manifest.measurements()):
        # On one line, however narrow the terminal: a number that is cut over lines can't be copied.
        (line,) = (line for line in said.splitlines() if line.startswith(measurement.key[:10]))
        assert re.search(r"jargon +\S+ +[\d.]+ +[\d.]+ +\d\.\de[-+]\d\d *$", line), line
    assert numbers(tmp_path / "a") == (theirs if prefer == "theirs" else theirs | mine)
    if prefer == "theirs":
        assert command("mode=drop", f"out={tmp_path}/a", "undo=true") == 0
        assert len(Store(out=tmp_path / "a").row_ids([m.key for m in manifest.measurements()])) == 9
        assert command("mode=merge", f"out={tmp_path}/a", f"from={tmp_path}/b", "prefer=theirs") == 0
        assert numbers(tmp_path / "a") == theirs


def test_a_failure_gives_way_to_a_result_on_either_side(tmp_path: Path) -> None:
    manifest = study(bits=(4, 3))
    first, second, *_ = filter(is_text, manifest.measurements())
    for out, failed, done in ((tmp_path / "a", first, second), (tmp_path / "b", second, first)):
        store = store_study(out, manifest, wanted=lambda m, done=done: m == done)
        store.write({**stored_row(failed), "status": "failed", "metrics": None, "error_type": "ValueError"})
    assert command("mode=merge", f"out={tmp_path}/a", f"from={tmp_path}/b") == 0
    assert {key: status for key, (status, _) in numbers(tmp_path / "a").items()} == {
        first.key: "done",
        second.key: "done",
    }


def test_what_was_dropped_there_does_not_come_and_what_came_before_and_was_dropped_since_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = study()
    first, second, *_ = manifest.measurements()
    other = store_study(tmp_path / "b", manifest)
    other.drop(other.row_ids([first.key]), why="wrong")
    assert command("mode=merge", f"out={tmp_path}/a", f"from={tmp_path}/b") == 0
    assert first.key not in numbers(tmp_path / "a")
    other.drop(other.row_ids([second.key]), why="wrong too")
    capsys.readouterr()
    assert command("mode=merge", f"out={tmp_path}/a", f"from={tmp_path}/b") == 1
    assert f"{second.key[:10]}" in (said := capsys.readouterr().out)
    assert "dropped" in said
    assert second.key in numbers(tmp_path / "a")
    assert command("mode=merge", f"out={tmp_path}/a", f"from={tmp_path}/b", "prefer=theirs") == 0
    assert second.key not in numbers(tmp_path / "a")


def test_measurements_that_a_launch_has_here_are_left_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = study()
    store_study(tmp_path / "b", manifest)
    held = next(manifest.measurements()).key
    Claims(out=tmp_path / "a").create(1, launch="l", sweep="s", packs={"p": [held]})
    assert command("mode=merge", f"out={tmp_path}/a", f"from={tmp_path}/b") == 0
    assert "1 measurement left to the launch that has them here" in capsys.readouterr().out
    assert set(numbers(tmp_path / "a")) == {m.key for m in manifest.measurements()} - {held}


def test_the_newest_launch_of_a_study_is_the_newest_of_both(tmp_path: Path) -> None:
    wide, narrow = study(bits=(16, 4, 3)), study(bits=(16, 4))
    for out, first, second in ((tmp_path / "a", wide, narrow), (tmp_path / "b", narrow, wide)):
        for age, manifest in ((300, first), (100, second)):
            manifest.save(out)
            os.utime(manifest.path(out), (time.time() - age - (out.name == "b"),) * 2)
    assert command("mode=merge", f"out={tmp_path}/a", f"from={tmp_path}/b") == 0
    assert [m.name for m in load_manifests(tmp_path / "a")] == [wide.name, narrow.name]
    os.utime(wide.path(tmp_path / "b"))
    assert command("mode=merge", f"out={tmp_path}/a", f"from={tmp_path}/b") == 0
    assert [m.name for m in load_manifests(tmp_path / "a")] == [narrow.name, wide.name]


SLOW_WRITES = """
import os, sys, time
from sweeps.store import joining, parts
joining.ROWS_PER_FILE = 1
write = parts.Store.add
def slowly(*args):
    write(*args)
    print("written", flush=True)
    time.sleep(0.05)
parts.Store.add = slowly
from tests.sweeps.studies import command
sys.exit(command(*sys.argv[1:]))
"""


def test_a_join_that_is_killed_and_run_again_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.store.records.ROTATE_BYTES", 0)  # a file for each measurement
    manifest = study(models=("m-s", "m-m"))
    store_study(tmp_path / "a", manifest, seed=1, wanted=lambda m: is_text(m) and m.cell.quant.bits == 4)
    store_study(tmp_path / "b", manifest, seed=2)
    arguments = ["mode=merge", f"out={tmp_path}/a", f"from={tmp_path}/b", "prefer=theirs"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITES, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(3)] == ["written\n"] * 3
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = len(numbers(tmp_path / "a"))
    assert before < len(numbers(tmp_path / "b"))
    assert command(*arguments) == 0
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    ids = Store(out=tmp_path / "a").row_ids([m.key for m in manifest.measurements()])
    assert len(set(ids)) == len(ids) == 12 + 2


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program ``ssh`` that knows the host ``lab``: this machine, in another directory."""
    home = tmp_path / "lab"
    home.mkdir()
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n"
        '[ "$1" = -- ] || exit 9\n'
        'if [ "$2" != lab ]; then echo "ssh: Could not resolve hostname $2" >&2; exit 255; fi\n'
        f'cd {home} && exec sh -c "$3"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return home


def test_a_directory_is_read_over_ssh(tmp_path: Path, ssh: Path) -> None:
    store_study(ssh / "my results", study())
    source = files(ssh)
    assert command("mode=merge", f"out={tmp_path}/a", 'from=["lab:my results"]') == 0
    assert numbers(tmp_path / "a") == numbers(ssh / "my results")
    assert [p.stat().st_mtime for p in tmp_path.glob("a/manifests/*")] == [
        p.stat().st_mtime for p in ssh.glob("*/manifests/*")
    ]
    assert files(ssh) == source


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert command("mode=merge", *arguments) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("error:"), said.err.count("\n")) == ("", 1, 1)
    return said.err


def test_bad_sources_are_refused_by_name(tmp_path: Path, ssh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"out={tmp_path}/a"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (ssh / "nothing").mkdir()
    store_study(tmp_path / "b", study())
    cases = {
        "from=null": "needs from=DIR",
        f"from={tmp_path}/none": f"from={tmp_path}/none does not exist",
        f"from={tmp_path}/file": "is a file",
        f"from={tmp_path}/empty": "is not a results directory",
        f"from=[{tmp_path}/b,{tmp_path}/empty]": "is not a results directory",
        "from=lab:none": "can't be copied",
        "from=lab:nothing": "is not a results directory",
        "from=elsewhere:x": "Could not resolve hostname elsewhere",
    }
    for argument, expected in cases.items():
        assert expected in refused(capsys, out, argument)
    assert not numbers(tmp_path / "a")
    assert "is out= itself" in refused(capsys, f"out={tmp_path}/b", f"from={tmp_path}/b")
    assert "prefer=their is not valid" in refused(capsys, out, f"from={tmp_path}/b", "prefer=their")


def test_files_of_a_newer_version_are_refused_before_anything_is_joined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_study(tmp_path / "b", study())
    store.fold()
    (pack,) = tmp_path.glob("b/packs/*.parquet")
    table = pq.read_table(pack)
    pq.write_table(table.replace_schema_metadata({"schema_version": "999"}), pack.with_name("p2-x.parquet"))
    said = refused(capsys, f"out={tmp_path}/a", f"from={tmp_path}/b")
    assert "p2-x.parquet" in said
    assert "schema 999" in said
    assert not list(tmp_path.glob("a/packs/*"))


def test_a_damaged_file_there_is_named_and_the_rest_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store_study(tmp_path / "b", study())
    (damaged,) = tmp_path.glob("b/parts/*.rows")
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert command("mode=merge", f"out={tmp_path}/a", f"from={tmp_path}/b") == 1
    assert damaged.name in capsys.readouterr().out.replace("\n", "")
    assert len(numbers(tmp_path / "a")) == 5


@pytest.mark.slow
def test_a_study_that_ran_in_two_places_has_nothing_to_do_in_the_joined_one(tmp_path: Path, launch: Launch) -> None:
    """Through the command, with real results: the halves of a study, and all of it run once more."""
    for name, bits in (("a", "[16,3,4]"), ("b", "[5,6]")):
        ran = launch(*SMALL, f"out={tmp_path}/{name}", f"where={{bits: {bits}}}", "report=false")
        assert ran.returncode == 0, ran.stderr
    joined = launch("mode=merge", f"out={tmp_path}/a", f"from={tmp_path}/b")
    assert joined.returncode == 0, joined.stderr
    assert "6 measurements joined" in joined.stdout
    again = launch(*SMALL, f"out={tmp_path}/a")
    assert again.returncode == 0, again.stderr
    assert "13 done" in again.stdout
    assert_whole(tmp_path / "a", 13)
