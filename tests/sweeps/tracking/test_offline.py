"""What the mirror writes for `wandb sync`, where there is no network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from sweeps.tracking.config import TrackingConfig
from sweeps.tracking.messages import Mirrored
from sweeps.tracking.runs import directory_id, divided
from sweeps.tracking.tracker import Tracker
from tests.sweeps.tracking.studies import MODELS, THREE, TWENTY, measure, mirrored, planned, study
from tests.sweeps.tracking.wandb_server import WandbServer


def test_offline_runs_reach_the_server_by_wandbs_own_sync_however_often(
    server: WandbServer, online: TrackingConfig, tmp_path: Path, name: str
) -> None:
    out, place = tmp_path / "out", tmp_path / "wandb"
    offline = TrackingConfig(mode="offline", base_url=server.url, dir=str(place), project=online.project)
    manifest = planned(THREE[0], sweep=name, models=MODELS)
    manifest.save(out)
    first, *rest = manifest.measurements()
    measure(out, [first])
    assert Tracker(offline, out=out, sweep=name).close(30) is None
    (before,) = place.glob("offline-run-*")
    assert server.runs(name) == []
    wandb_sync(server, place, tmp_path)
    assert server.losses(name) == [3.0]
    assert mirrored(offline, out, name).updated == 0
    assert list(place.glob("offline-run-*")) == [before]  # nothing is new
    measure(out, rest, loss=3.5)
    before.rename(before.with_name(f"{before.name}-1"))  # as wandb calls the second one of a second
    assert mirrored(offline, out, name).updated == 1
    for needed in ("mirrored.json", "*.wandb"):  # without either it is not whole
        (cut,) = place.glob("offline-run-*")
        for path in cut.glob(needed):
            path.unlink()
        assert mirrored(offline, out, name) == Mirrored(runs=1, measurements=3, whole=3, updated=1)
        assert cut.exists() == (needed == "mirrored.json")  # another mirror may be at it
        if cut.exists():
            shutil.rmtree(cut)
    assert mirrored(offline, out, name).updated == 0
    wandb_sync(server, place, tmp_path)
    (said,) = server.summaries(name).values()
    assert (said["done"], said["neox_1_1/pile_cc/loss"], said["pile_cc/loss"]) == (3, 3.0, 3.5)
    assert mirrored(online, out, name) == Mirrored(runs=1, measurements=3, whole=3, updated=0)


def wandb_sync(server: WandbServer, place: Path, cwd: Path) -> None:
    runs = [str(run) for run in place.glob("offline-run-*") if run.is_dir()]
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *runs],
        env={**os.environ, "WANDB_BASE_URL": server.url},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_mirrors_that_write_offline_together_leave_each_run_whole(tmp_path: Path, name: str) -> None:
    """As the jobs of a launch do that end in one second, in one wandb directory."""
    out, place = tmp_path / "out", tmp_path / "wandb"
    study(out, *TWENTY, sweep=name)
    offline = TrackingConfig(mode="offline", dir=str(place))
    trackers = [Tracker(offline, out=out, sweep=name) for _ in range(2)]
    for tracker in trackers:
        assert tracker._process is not None
        tracker._process.finish()
    assert [tracker.close(60) for tracker in trackers] == [None, None]
    ids = {run.id for run in divided([planned(*TWENTY, sweep=name)], f"{directory_id(out)} {offline.project}").runs}
    left = [directory.parent for directory in place.glob("offline-run-*/*.wandb")]
    assert {directory.name.split("-")[3] for directory in left if (directory / "mirrored.json").exists()} == ids
    assert mirrored(offline, out, name).updated == 0


def test_what_directories_and_projects_wrote_offline_stays_beside_each_other(tmp_path: Path, name: str) -> None:
    for out in ("a", "b"):
        study(tmp_path / out, THREE[0], sweep=name)
        for project in ("p", "q"):
            config = TrackingConfig(mode="offline", dir=str(tmp_path / "wandb"), project=project)
            assert mirrored(config, tmp_path / out, name).updated == 1
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 4


def test_an_entity_that_is_named_later_has_the_same_runs(
    server: WandbServer, online: TrackingConfig, tmp_path: Path, name: str
) -> None:
    """And what was written offline for another one is written for this one, in its place."""
    out = tmp_path / "out"
    study(out, THREE[0], sweep=name)
    mirrored(online, out, name)
    named = replace(online, entity="default")  # as the server calls the key's own
    assert mirrored(named, out, name) == Mirrored(runs=1, measurements=1, whole=1, updated=0)
    assert len(server.runs(name)) == 1
    for entity, updated in ((None, 1), ("default", 1), ("default", 0)):
        assert mirrored(replace(online, mode="offline", entity=entity), out, name).updated == updated
        assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
