"""What the mirror makes of a W&B-compatible server (openwandb), whatever comes between."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sweeps.errors import AwayError
from sweeps.store.parts import Store
from sweeps.store.schema import Scalar
from sweeps.study.cell import ModelRef
from sweeps.tracking import mirror as mirror_module
from sweeps.tracking import tracker as tracker_module
from sweeps.tracking.artifact import upload_tables
from sweeps.tracking.config import TrackingConfig
from sweeps.tracking.messages import Answer, Mirrored, Trouble
from sweeps.tracking.mirror import Mirror
from sweeps.tracking.runs import Run, summary
from sweeps.tracking.server import RemoteRun
from sweeps.tracking.tracker import SyncReport, Tracker, sync
from tests import ROOT
from tests.conftest import Launch
from tests.sweeps.tracking.studies import (
    MODELS,
    SIZES,
    THREE,
    TWENTY,
    evaluation,
    job_of,
    measure,
    mirrored,
    planned,
    processes_naming,
    study,
    wait_for,
)
from tests.sweeps.tracking.wandb_server import WandbServer, busy, free_port


def test_a_study_is_mirrored_while_it_runs(
    server: WandbServer, online: TrackingConfig, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "LOOK_SECONDS", 0.2)
    warnings: list[str] = []
    manifest = planned(sweep=name)
    manifest.save(tmp_path / "out")
    first, *rest = manifest.measurements()
    tracker = Tracker(online, out=tmp_path / "out", sweep=name, warn=warnings.append)
    measure(tmp_path / "out", [first])
    wait_for(lambda: server.losses(name) == [3.0])
    measure(tmp_path / "out", rest, loss=4.0)
    wait_for(lambda: server.losses(name) == [3.0, 4.0, 4.125])
    assert tracker.close(30) is None
    assert warnings == []
    runs = [server.run(run) for run in server.runs(name)]
    assert {(run["config"]["bits"], run["config"].get("dtype"), run["config"].get("blocksize")) for run in runs} == {
        *((16, None, None), (3, "int", 64), (4, "int", 64))
    }
    assert {(run["state"], run["summary"]["done"], run["summary"]["cells"]) for run in runs} == {("finished", 1, 1)}
    before = server.everything()
    assert mirrored(online, tmp_path / "out", name) == Mirrored(runs=3, measurements=3, whole=3, updated=0)
    assert server.everything() == before


def test_many_runs_are_each_what_its_own_cells_are(
    server: WandbServer, online: TrackingConfig, tmp_path: Path, name: str
) -> None:
    manifest = study(tmp_path / "out", *TWENTY, sweep=name)
    seen: list[tuple[int, int]] = []
    report = sync(tmp_path / "out", online, progress=lambda done, total: seen.append((done, total)))
    assert report == SyncReport(runs=20, measurements=20, whole=20, updated=20)
    assert seen == [(n, 20) for n in range(1, 21)]
    losses = {m.cell.quant.label: 3.0 + n / 8 for n, m in enumerate(manifest.measurements())}
    assert {of: said["pile_cc/loss"] for of, said in server.summaries(name).items()} == losses
    axes = {m.cell.quant.label: m.cell.quant.axis_values() for m in manifest.measurements()}
    for run in map(server.run, server.runs(name)):
        assert {k: run["config"][k] for k in ("bits", "dtype", "blocksize")} == {
            k: axes[run["name"]][k] for k in ("bits", "dtype", "blocksize")
        }
    before = server.everything()
    assert mirrored(online, tmp_path / "out", name).updated == 0
    assert server.everything() == before


def test_one_run_that_cannot_be_written_keeps_no_other_back(
    server: WandbServer, online: TrackingConfig, tmp_path: Path, name: str
) -> None:
    study(tmp_path / "out", *TWENTY, sweep=name)
    with busy(server, fails="int3 b64") as (url, _):
        failing = TrackingConfig(mode="online", base_url=url, dir=online.dir, project=online.project)
        warnings: list[str] = []
        said = Tracker(failing, out=tmp_path / "out", sweep=name, warn=warnings.append).close(30)
        assert "W&B: 1 of 20 measurements are not known to be mirrored" in str(said)
        assert "mode=sync" in str(said)
        assert len(warnings) == 1
        report = mirrored(failing, tmp_path / "out", name)
        assert (report.measurements, report.whole, report.updated) == (20, 19, 0)
    assert len(server.summaries(name).keys() - {"int3 b64"}) == 19
    assert mirrored(online, tmp_path / "out", name).whole == 20
    assert len(server.losses(name)) == 20


def dropping(those: range) -> Callable[[str], bool]:
    """Whether to drop the connection of a request: of these, of the writes, counted from 1."""
    count = itertools.count(1)
    return lambda body: "upsertBucket" in body and next(count) in those


def test_a_connection_that_drops_ends_no_look_and_a_server_that_goes_leaves_a_true_report(
    server: WandbServer, online: TrackingConfig, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    study(out, {**TWENTY[0], "blocksize": SIZES[:3]}, sweep=name)
    with busy(server, drops=dropping(range(5, 6))) as (url, _):
        once = replace(online, base_url=url, project=f"{online.project}-once")
        assert mirrored(once, out, name) == Mirrored(runs=12, measurements=12, whole=12, updated=12)
    with busy(server, drops=dropping(range(9, 10**6))) as (url, _):
        gone = replace(online, base_url=url)
        said = str(sync(out, gone))
        assert said.startswith("W&B is known to hold 8 of 12 measurements in 12 runs, 8 brought up to date now; ")
        assert "can't be reached" in said
        closed = str(Tracker(gone, out=out, sweep=name).close(30))
        assert "W&B: 4 of 12 measurements are not known to be mirrored" in closed
    assert mirrored(online, out, name) == Mirrored(runs=12, measurements=12, whole=12, updated=4)


def test_a_mirror_that_is_cut_off_says_so_and_the_next_one_ends_its_work(
    server: WandbServer, online: TrackingConfig, tmp_path: Path, name: str
) -> None:
    """However far it came, nothing is there twice; and a mirror that was killed keeps no other one waiting."""
    study(tmp_path / "out", *TWENTY, sweep=name)
    tracker = Tracker(online, out=tmp_path / "out", sweep=name)
    assert tracker._process is not None
    tracker._process.finish()
    wait_for(lambda: bool(server.runs(name)))
    said = tracker.close(0)
    assert "what was measured is not known to be mirrored" in str(said)
    wait_for(lambda: not processes_naming(tmp_path), 10)
    began = time.monotonic()
    report = sync(tmp_path / "out", online)
    assert time.monotonic() - began < 20
    assert (report.whole, report.error) == (20, None)
    assert 0 < report.updated <= 20
    assert server.losses(name) == [3.0 + n / 8 for n in range(20)]
    assert {server.run(run)["state"] for run in server.runs(name)} == {"finished"}


class Watched(Mirror):
    """A mirror in the test's process, that may be held up before it writes."""

    before_writing: Callable[[], object] = staticmethod(lambda: None)

    def _write(self, run: Run, told: Any) -> RemoteRun:
        self.before_writing()
        return super()._write(run, told)


def test_of_two_mirrors_at_once_the_newer_results_stay(
    server: WandbServer, online: TrackingConfig, tmp_path: Path, name: str
) -> None:
    """One read the store; another read it later and wrote; then the first one writes what it had read."""
    out = tmp_path / "out"
    manifest = planned(THREE[0], sweep=name, models=MODELS)
    manifest.save(out)
    first, *left = manifest.measurements()
    measure(out, [first])
    answers: list[Answer] = []
    slow = Watched(job_of(online, out, name), answers.append)
    last = left.pop()

    def another() -> None:
        if left:
            measure(out, [left.pop(0)])
            mirrored(online, out, name)

    slow.before_writing = another
    slow.look(last=True)
    assert [a for a in answers if isinstance(a, Mirrored)] == [Mirrored(runs=1, measurements=1, whole=1, updated=1)]
    (said,) = server.summaries(name).values()
    assert (said["done"], said["cells"]) == (2, 2)
    measure(out, [last])
    assert mirrored(online, out, name) == Mirrored(runs=1, measurements=3, whole=3, updated=1)


def test_a_last_look_ends_while_others_go_on_measuring(
    server: WandbServer, online: TrackingConfig, tmp_path: Path, name: str
) -> None:
    """It looks again once, and says what it knows: what came meanwhile is for those to mirror that measure it."""
    out = tmp_path / "out"
    models = [ModelRef(family="f", name=f"m{n}", params=1, path="/m", weights_hash=str(n)) for n in range(9)]
    manifest = planned(THREE[0], sweep=name, models=models)
    manifest.save(out)
    others = manifest.measurements()
    measure(out, [next(others)])
    answers: list[Answer] = []
    mirror = Watched(job_of(online, out, name), answers.append)
    mirror.before_writing = lambda: measure(out, [next(others)])
    mirror.look(last=True)
    assert [a for a in answers if isinstance(a, Mirrored)] == [Mirrored(runs=1, measurements=1, whole=1, updated=1)]
    assert [said["done"] for said in server.summaries(name).values()] == [2]
    assert len(list(others)) == 6


def test_what_the_server_answers_to_a_write_need_not_be_what_it_has(
    server: WandbServer, online: TrackingConfig, tmp_path: Path, name: str
) -> None:
    """It is read back: a run is mirrored if it is there, and is not if it isn't."""
    study(tmp_path / "out", *TWENTY, sweep=name)
    for hides, whole in (("KbitMirror", 0), ("upsertBucket", 20)):
        with busy(server, hides=hides) as (url, _):
            config = TrackingConfig(mode="online", base_url=url, dir=online.dir, project=f"{online.project}-{whole}")
            answers: list[Answer] = []
            Mirror(job_of(config, tmp_path / "out", name), answers.append).look(last=True)
            assert answers[-1] == Mirrored(runs=20, measurements=20, whole=whole, updated=whole)
            told = [answer.reason for answer in answers if isinstance(answer, Trouble)]
            assert told == [] if whole else ["the server did not keep what it was told of 20 runs"]
    assert {server.run(run)["state"] for run in server.runs(name)} == {"finished"}


def test_what_w_and_b_does_not_answer_is_left_to_no_other_process(
    server: WandbServer, online: TrackingConfig, tmp_path: Path, name: str
) -> None:
    study(tmp_path / "out", sweep=name)
    down = TrackingConfig(mode="online", base_url=f"http://127.0.0.1:{free_port()}", dir=online.dir)
    with pytest.raises(AwayError):
        Mirror(job_of(down, tmp_path / "out", name), lambda _: None).look(last=False)
    Mirror(job_of(online, tmp_path / "out", name), lambda _: None).look(last=False)
    assert len(server.losses(name)) == 3


def test_looks_in_between_are_one_processs_and_only_of_what_is_new(
    server: WandbServer, online: TrackingConfig, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    manifest = study(out, *TWENTY, sweep=name)
    made: list[int] = []

    def counting(rows: Any, *about: Any) -> dict[str, Scalar]:
        made.append(len(rows))
        return summary(rows, *about)

    monkeypatch.setattr(mirror_module, "summary", counting)
    one, other = (Mirror(job_of(online, out, name), lambda _: None) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirror_module, "SPACING", 10.0**6)  # so that the next look is as late as one may be
        one.look(last=False)
    assert made == [1] * 20
    (looked,) = (out / "tracking").glob("*.looked")
    store = Store(out=out)
    again = next(manifest.measurements())
    store.drop(store.row_ids([again.key]), "wrong")
    measure(out, [again], loss=9.0)
    for earlier in (0, mirror_module.MOST_PAUSE - 60):  # a look that took long has a long pause after it, for all
        os.utime(looked, (0, looked.stat().st_mtime - earlier))
        other.look(last=False)
        assert len(made) == 20
    os.utime(looked, (0, 0))
    one.look(last=False)
    assert made[20:] == [1]
    redone = server.summaries(name)[again.cell.quant.label]
    assert (redone["pile_cc/loss"], redone["measurements"], redone["done"]) == (9.0, 1, 1)
    assert server.losses(name) == [*(3.0 + n / 8 for n in range(1, 20)), 9.0]
    os.utime(looked, (0, 0))
    monkeypatch.setattr(Mirror, "_runs", lambda _: pytest.fail("nothing is new, and the store was read"))
    one.look(last=False)


def test_an_outage_is_made_up_for(server: WandbServer, online: TrackingConfig, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    manifest = planned(sweep=name)
    manifest.save(out)
    first, second, third = manifest.measurements()
    measure(out, [first])
    mirrored(online, out, name)
    server.stop()
    try:
        measure(out, [second], loss=4.0)
        warnings: list[str] = []
        said = Tracker(online, out=out, sweep=name, warn=warnings.append).close(30)
        assert "not known to be mirrored" in str(said)
        assert "mode=sync" in str(said)
        assert len(warnings) == 1
        assert "run mode=sync again" in str(sync(out, online).error)
    finally:
        server.start()
    measure(out, [third], status="failed")
    assert sync(out, online) == SyncReport(runs=3, measurements=3, whole=3, updated=2)
    assert server.losses(name) == [3.0, 4.0]
    assert sorted(said["failed"] for said in server.summaries(name).values()) == [0, 0, 1]


def test_what_was_dropped_or_is_planned_no_more_is_nowhere(
    server: WandbServer, online: TrackingConfig, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    manifest = planned(*THREE, sweep=name, models=MODELS[:2])
    manifest.save(out)
    these = list(manifest.measurements())
    measure(out, these)
    mirrored(online, out, name)
    store = Store(out=out)
    gone = [m for m in these if m.cell.quant.is_baseline]
    half = next(m for m in these if not m.cell.quant.is_baseline)
    store.drop(store.row_ids([m.key for m in (*gone, half)]), "wrong")
    assert mirrored(online, out, name) == Mirrored(runs=2, measurements=3, whole=3, updated=2)
    said = server.summaries(name)
    assert (said["16-bit"]["done"], said["16-bit"]["measurements"], said["16-bit"]["cells"]) == (0, 0, 0)
    assert not [v for k, v in said["16-bit"].items() if "/" in k and v is not None]
    assert (said[half.cell.quant.label]["done"], said[half.cell.quant.label]["neox_1_1/pile_cc/loss"]) == (1, None)

    planned(*THREE, sweep=name, models=MODELS[:2], evals=[evaluation(tokens=1024)]).save(out)
    mirrored(online, out, name)
    said = server.summaries(name)
    assert sorted((s["done"], s["superseded"]) for s in said.values()) == [(0, 0), (0, 1), (0, 2)]
    assert server.losses(name) == []
    before = server.everything()
    assert mirrored(online, out, name).updated == 0
    assert server.everything() == before


def test_a_results_directory_that_was_moved_is_not_made_again(
    server: WandbServer, online: TrackingConfig, tmp_path: Path, name: str
) -> None:
    """Neither where that was before a look, nor in the middle of one, nor before the mirror starts."""
    out, moved = tmp_path / "out", tmp_path / "moved"
    study(out, sweep=name)
    answers: list[Answer] = []
    mirror = Watched(job_of(online, out, name), answers.append)
    mirror.before_writing = lambda: out.exists() and out.rename(moved)
    with pytest.raises(FileNotFoundError, match="it is gone"):
        mirror.look(last=True)
    assert answers[-1] == Mirrored(runs=3, measurements=3, whole=3, updated=3)  # as the store was when it was read
    for last in (False, True):
        with pytest.raises(FileNotFoundError, match="it is gone"):
            mirror.look(last=last)
    beside = replace(online, dir=str(out / "wandb"))
    assert "it is gone" in str(Tracker(beside, out=out, sweep=name).close(30))
    assert "t.csv" in str(upload_tables(beside, name, [out / "tables" / "t.csv"]))
    with pytest.raises(FileNotFoundError, match=r"t\.csv"):  # moved since its process began
        Mirror(job_of(beside, out, name), answers.append).upload(name, [str(out / "tables" / "t.csv")])
    assert not out.exists()
    assert len(server.losses(name)) == 3


def test_results_of_no_planned_study_are_no_success(here: Launch, tmp_path: Path) -> None:
    measure(tmp_path / "out", planned().measurements())
    said = here("mode=sync", "out=out", f"tracking.base_url=http://127.0.0.1:{free_port()}")
    assert said.returncode == 2
    assert "manifests/*.json" in said.stdout + said.stderr


def test_what_others_may_only_read_is_mirrored_by_them(
    server: WandbServer, online: TrackingConfig, tmp_path: Path, name: str
) -> None:
    study(tmp_path / "out", sweep=name)
    mount = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh", str(tmp_path / "out"), sys.executable]
    if shutil.which("unshare") is None or subprocess.run([*command[:3], "true"], check=False).returncode:
        pytest.skip("this machine lets nobody mount (unshare --mount)")
    keys = ["mode=sync", "out=out", f"tracking.base_url={server.url}", f"tracking.project={online.project}"]
    done = subprocess.run(
        [*command, str(ROOT / "launch.py"), *keys], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "W&B holds 3 of 3 measurements in 3 runs, 3 brought up to date now" in done.stdout
    assert server.losses(name) == [3.0, 3.125, 3.25]
    assert server.artifacts(f"{name}-results") == [(f"{name}-results", "results")]
    assert not (tmp_path / "out" / "tracking").exists()
