"""What sbatch is given: pinned word for word, and shown without a cluster."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sweeps.executors.slurm.context import LaunchContext
from sweeps.executors.slurm.sbatch import Scripts
from sweeps.executors.slurm.settings import SlurmSettings
from sweeps.launches.launch import Chunk, Launch
from sweeps.store.parts import Store
from sweeps.study.cell import Cell, ModelRef
from sweeps.study.grid import expand
from sweeps.study.manifest import Manifest
from tests.conftest import Launch as Command
from tests.sweeps.launches.test_in_flight import SETTINGS

HERE = Path(__file__).parent
MODEL = ModelRef(family="f", name="m", params=13 * 10**9, path="/m", weights_hash="0" * 64)
KEYS = {
    "partition": "gpu",
    "account": "research",
    "gpu_type": "h100",
    "time": "02:00:00",
    "constraint": "nvme",
    "max_parallel": 3,
    "setup": ["module load cuda"],
    "extra": {"mail-type": "FAIL"},
}


def scripts(out: Path) -> Scripts:
    """A launch of one baseline and four packs that wait for it."""
    slurm = SlurmSettings.from_config(KEYS)
    cells: tuple[Cell, ...] = expand([{"bits": 16}], [MODEL]).cells
    context = LaunchContext(
        store=Store(out=out),
        manifest=Manifest(sweep="s", cells=cells, evals=(), excluded=(), config={}),
        slurm=slurm,
        device="cuda",
        overrides={},
        job_settings=SETTINGS,
        progress=lambda _: None,
    )
    launch = Launch(
        out=out,
        id="0123456789ab",
        sweep="s",
        shapes=(context.shape(MODEL, 0),),
        chunks=(Chunk(number=0, shape=0, packs=("a",)), Chunk(number=1, shape=0, packs=tuple("bcde"), after=0)),
        settings=replace(SETTINGS, parallel=3),
        offsets={},
        launched=0.0,
    )
    return Scripts(context=context, launch=launch, claim=7, exclude="n3", code=out / "code" / "c0de")


@pytest.mark.parametrize("name", ["preflight", "job", "array"])
def test_the_script_is_this_one(name: str, tmp_path: Path) -> None:
    """After a change that is meant, write the file that the failure names again."""
    made = scripts(tmp_path)
    array = {
        "preflight": made.preflight(0),
        "job": made.chunk(made.launch.chunks[0], ["41"]),
        "array": made.chunk(made.launch.chunks[1], ["41", "42"]),
    }[name]
    text = made.text(array).replace(str(tmp_path), "/OUT").replace(sys.executable, "/PYTHON")
    assert text == (HERE / f"sbatch_{name}.txt").read_text()


def test_a_plan_shows_the_scripts_and_writes_nothing(
    launch: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    result = launch("mode=plan", "executor=slurm", "script=true", "executor.partition=gpu", "executor.preflight=false")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("#!/bin/bash\n")
    for expected in ("#SBATCH --partition=gpu\n", "#SBATCH --array=0-2%3\n", "--launch LAUNCH --claim 1 --chunk 0"):
        assert expected in result.stdout
    assert "dependency" not in result.stdout
    assert not list(tmp_path.iterdir())


def test_only_slurm_has_scripts_to_show(launch: Command) -> None:
    result = launch("mode=plan", "script=true")
    assert result.returncode == 2
    assert "executor=local sends no scripts; executor=slurm does" in result.stderr
