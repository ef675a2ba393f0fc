"""A method and a data type that another package brings: planned, calibrated, quantized by a worker, stored, resumed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import ROOT
from tests.forks import Forks, forking

THIRDS = '''
from kbit.data_types import DataType


def values(spec):
    """2^k evenly spaced values: thirds, sevenths, ...; none of them 0."""
    import torch  # late: planning loads no torch

    count = 2**spec.bits
    return torch.tensor([2 * i / (count - 1) - 1 for i in range(count)], dtype=torch.float32)


THIRDS = DataType(values=values, has_zero=False)
'''
POINTS = """[kbit_sweep.dtypes]
thirds = thirds:THIRDS
[kbit_sweep.methods]
scaled = one_shot:ScaledSpec
"""
STUDY = (
    *("sweep.name=mine", "sweep.sizes=[neox-xs]", "eval.tokens=1024", "eval.tasks=[]", "executor.device=cpu"),
    "sweep.quant=[{bits: 16}, {bits: 4, dtype: [int, thirds]}, {method: scaled, bits: 4, dtype: thirds, "
    "strength: [0.25, 0.5]}]",
    *("executor.workers=1", "out=r"),
)
CALIBRATION = ("calibration.set=jargon", "calibration.samples=4", "calibration.length=64")
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where a package with both is installed."""
    packages = tmp_path_factory.mktemp("packages")
    about = packages / "mine-1.0.dist-info"
    about.mkdir(parents=True)
    (packages / "thirds.py").write_text(THIRDS)
    (packages / "one_shot.py").write_text((ROOT / "tests" / "kbit" / "methods" / "one_shot.py").read_text())
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(POINTS)
    return {**os.environ, "PYTHONPATH": f"{packages}{os.pathsep}{ROOT}", "COLUMNS": "200"}


@pytest.fixture(scope="module")
def forks(environment: dict[str, str]) -> Iterator[Forks]:
    with forking(env=environment) as forks:
        yield forks


@pytest.fixture
def run(tmp_path: Path, environment: dict[str, str], forks: Forks) -> Run:
    """Run ``python launch.py ARGS``, or a program with -c, there."""

    def of(*arguments: str) -> subprocess.CompletedProcess[str]:
        if arguments[0] != "-c":
            return forks.run(*arguments, cwd=tmp_path, env=environment)
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    return of


def stored(run: Run) -> list[dict[str, object]]:
    """Columns of each row, read where the package is installed."""
    names = ["key", "label", "method", "dtype", "strength", "calibration", "status", "loss", "bits_per_param"]
    code = (
        "import json; from sweeps import load_results\n"
        "table = load_results('r').rename(columns={'jargon_loss': 'loss'})\n"
        f"print(table[{names!r}].to_json(orient='records'))"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, object]] = json.loads(done.stdout)
    return rows


def test_a_study_of_a_method_that_calibrates_and_a_data_type_of_another_package(run: Run) -> None:
    refused = run(*STUDY)
    assert refused.returncode == 2
    assert "calibration.set=null is not valid with method=scaled, which calibrates: name a text set" in refused.stderr

    planned = run(*STUDY, *CALIBRATION, "mode=plan")
    assert planned.returncode == 0, planned.stderr
    done = run(*STUDY, *CALIBRATION, "report=false")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {str(row["label"]): row for row in stored(run)}
    assert list(rows) == [
        "16-bit",
        "int4 b64",
        "thirds4 b64",
        "scaled thirds4 b64 strength=0.25, jargon 4x64 seed 0",
        "scaled thirds4 b64, jargon 4x64 seed 0",
    ]
    assert {row["status"] for row in rows.values()} == {"done"}
    assert len({row["loss"] for row in rows.values()}) == 5
    plain, scaled = rows["thirds4 b64"], rows["scaled thirds4 b64, jargon 4x64 seed 0"]
    assert plain["calibration"] is None
    about = json.loads(str(scaled["calibration"]))
    assert about.pop("dataset").startswith("sha256:")
    assert about == {"samples": 4, "length": 64, "seed": 0, "compute_dtype": "storage", "version": "1"}
    assert float(str(scaled["bits_per_param"])) > float(str(plain["bits_per_param"]))

    again = run(*STUDY, *CALIBRATION)
    assert "nothing to do" in again.stdout
    # Another draw is another cell of the method that calibrates, and the same cell of the others.
    other = run(*STUDY, *CALIBRATION, "calibration.seed=1", "mode=plan")
    assert other.returncode == 0, other.stderr
    assert re.search(r"to do\s+2\b", other.stdout)
    assert re.search(r"done\s+3\b", other.stdout)
    where = run("mode=status", "out=r", "by=[method,strength]")
    assert where.returncode == 0, where.stderr
    assert "scaled" in where.stdout


def test_a_list_of_seeds_makes_replicates_of_the_cells_that_calibrate(run: Run, tmp_path: Path) -> None:
    study = [*STUDY, *CALIBRATION, "calibration.seed=[0,1,2]"]
    planned = run(*study, "mode=plan", "where={calibration_seed: [1, 2]}")
    assert planned.returncode == 0, planned.stderr
    assert re.search(r"to do\s+4\b", planned.stdout)  # two methods' cells, two seeds
    done = run(*study)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = stored(run)
    assert len(rows) == 3 + 2 * 3
    of_one = [row for row in rows if row["method"] == "scaled" and row["strength"] == 0.5]
    assert sorted(json.loads(str(row["calibration"]))["seed"] for row in of_one) == [0, 1, 2]
    assert len({row["loss"] for row in of_one}) == 3
    assert (tmp_path / "r" / "figures" / "mine" / "methods_4bit.png").is_file()
    # One of the seeds alone is one of these cells.
    again = run(*STUDY, *CALIBRATION, "calibration.seed=2")
    assert "nothing to do" in again.stdout
    by = run("mode=status", "out=r", "by=[method,calibration_seed]")
    assert by.returncode == 0, by.stderr
    assert len([line for line in by.stdout.splitlines() if "scaled" in line]) == 3


def test_bad_calibration_is_refused_before_anything_runs(run: Run, tmp_path: Path) -> None:
    for wrong, said in (
        ("calibration.samples=0", "calibration.samples=0 is not valid: a whole number of at least 1"),
        ("calibration.compute_dtype=int8", "calibration.compute_dtype='int8' is not valid: one of storage"),
        ("calibration.seed=[0,-1]", "calibration.seed=-1 is not valid: a whole number of at least 0"),
        ("calibration.seed=[]", "calibration.seed=[] is not valid: a whole number, or a list of them"),
        ("calibration.seed=first", "calibration.seed='first' is not valid: a whole number of at least 0"),
        ("calibration.set=nowhere", "calibration.set='nowhere' is neither a known text set nor a .jsonl or .txt file"),
        ("calibration.sampels=4", "'calibration.sampels' is not a key. Did you mean calibration.samples"),
    ):
        refused = run(*STUDY, *CALIBRATION, wrong)
        assert refused.returncode == 2, refused.stdout
        assert said in " ".join(refused.stderr.split())
    assert not (tmp_path / "r" / "claims").exists()


def test_too_few_windows_are_refused_before_anything_runs_by_plan_and_run_alike(run: Run, tmp_path: Path) -> None:
    has = re.search(
        r"jargon has (\d+) windows of 64 tokens", run(*STUDY, *CALIBRATION, "calibration.samples=9999").stderr
    )
    assert has is not None
    windows = int(has[1])
    for mode in ("plan", "run"):
        refused = run(*STUDY, *CALIBRATION, f"calibration.samples={windows + 1}", f"mode={mode}")
        assert refused.returncode == 2, refused.stdout
        said = " ".join(refused.stderr.split())
        assert (
            f"calibration.samples={windows + 1} is not valid with neox-xs: jargon has {windows} windows of 64" in said
        )
        assert f"Ask for at most {windows}, for shorter windows (calibration.length), or name a longer text" in said
    assert not (tmp_path / "r" / "claims").exists()
    assert run(*STUDY, *CALIBRATION, f"calibration.samples={windows}", "mode=plan").returncode == 0
    # Methods that don't calibrate have nothing to count.
    plain = [a if not a.startswith("sweep.quant") else "sweep.quant=[{bits: 4, dtype: int}]" for a in STUDY]
    assert run(*plain, *CALIBRATION, "calibration.samples=9999", "mode=plan").returncode == 0
