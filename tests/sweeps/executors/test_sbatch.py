"""What sbatch is given: pinned word for word, and shown without a cluster."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sweeps.executors.slurm.context import LaunchContext
from sweeps.executors.slurm.sbatch import Scripts
from sweeps.executors.slurm.settings import SlurmSettings
from sweeps.launches.launch import Chunk, Launch
from sweeps.provenance import ROOT, import_environment
from sweeps.store.parts import Store
from sweeps.study.cell import Cell, ModelRef
from sweeps.study.grid import expand
from sweeps.study.manifest import Manifest
from sweeps.study.snapshot import job_setup
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


def scripts(out: Path, **keys: object) -> Scripts:
    """A launch of one baseline and four packs that wait for it."""
    slurm = SlurmSettings.from_config({**KEYS, **keys})
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


@pytest.mark.parametrize(("mode", "more"), [("online", 1), ("offline", 1), ("disabled", 0)])
def test_a_job_asks_for_the_memory_of_its_mirror_too(mode: str, more: int, tmp_path: Path) -> None:
    small = replace(MODEL, params=70_000_000)
    alone = replace(scripts(tmp_path).context, device="cpu")
    mirrored = replace(alone, job_settings=replace(SETTINGS, tracking={"mode": mode}))
    assert mirrored.shape(small, 0).mem_gb == alone.shape(small, 0).mem_gb + more
    assert replace(mirrored, overrides={small.label: {"mem_gb": 2.0}}).shape(small, 0).mem_gb == 2.0


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


def run_setup(made: Scripts, *, preflight: bool, command: str = "echo job begins") -> subprocess.CompletedProcess[str]:
    """The part of a script before its command, as bash runs it, and then ``command``."""
    array = made.preflight(0) if preflight else made.chunk(made.launch.chunks[0], [])
    setup = made.text(array).partition("# setup\n")[2].partition("# command\n")[0]
    assert setup
    script = made.context.store.out / "script"
    script.write_text(setup + command)
    return subprocess.run(["bash", script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("line", "code"),
    [("modul load cuda", 127), ("false", 1), ("cd /nowhere/'my run'", 1), ("f() { return 3; }; f", 3), (". ./bad", 4)],
)
def test_a_setup_command_that_fails_is_named_and_ends_the_preflight(
    line: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").write_text("return 4\n")
    made = scripts(tmp_path, setup=["echo first", line])
    said = f"executor.setup: exit code {code} of: {line}"
    preflight, job = run_setup(made, preflight=True), run_setup(made, preflight=False)
    assert (preflight.returncode, preflight.stdout) == (1, "first\n")
    assert preflight.stderr.splitlines()[-1].startswith(f"{said}; no job of this study starts")
    assert (job.returncode, job.stdout) == (0, "first\njob begins\n")
    assert job.stderr.splitlines()[-1] == said


@pytest.mark.parametrize(
    "line", ["false || true", "[ -f /nowhere ] && echo x; true", "if false; then :; fi", ". ./good"]
)
def test_a_setup_command_that_handles_its_failure_is_none(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good").write_text("false\ng() { false; }\ng\ntrue\n")
    ran = run_setup(scripts(tmp_path, setup=[line]), preflight=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "job begins\n", "")


def test_the_job_itself_is_not_the_users_setup(tmp_path: Path) -> None:
    made = scripts(tmp_path, setup=["true"])
    ran = run_setup(made, preflight=True, command="false")
    assert (ran.returncode, ran.stderr) == (1, "")


@pytest.mark.parametrize("given", ["", ":", "/a::/b", ":/a:/b:", ":::"])
def test_no_entry_of_the_path_means_the_directory_that_a_job_starts_in(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", given)
    lines = [*job_setup(tmp_path / "my code"), 'echo "$PYTHONPATH"']
    made = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True).stdout
    named = [p for p in given.split(":") if p]
    assert made.strip().split(":") == [str(tmp_path / "my code"), *named]
    assert import_environment()["PYTHONPATH"].split(":") == [str(ROOT), *named]


def test_a_plan_shows_the_scripts_and_writes_nothing(
    here: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    result = here("mode=plan", "executor=slurm", "script=true", "executor.partition=gpu", "executor.preflight=false")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("#!/bin/bash\n")
    for expected in ("#SBATCH --partition=gpu\n", "#SBATCH --array=0-2%3\n", "--launch LAUNCH --claim 1 --chunk 0"):
        assert expected in result.stdout
    assert "dependency" not in result.stdout
    assert not list(tmp_path.iterdir())


def test_only_slurm_has_scripts_to_show(here: Command) -> None:
    result = here("mode=plan", "script=true")
    assert result.returncode == 2
    assert "executor=local sends no scripts; executor=slurm does" in result.stderr
