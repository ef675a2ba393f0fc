"""The installed command works in any directory, whatever modules lie there: no process that it starts looks there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from sweeps.store.parts import Store
from tests import ROOT

TRAP = "raise SystemExit('a module of the current directory was imported: ' + __name__)\n"
CONSOLE_SCRIPT = "import sys\nfrom launch import main\nsys.exit(main())\n"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The console script of an environment that the project was installed into as a wheel is."""
    venv.create(tmp_path / "env", symlinks=True)
    site = next((tmp_path / "env" / "lib").glob("*/site-packages"))
    for package in ("kbit", "sweeps", "analysis", "conf"):
        shutil.copytree(ROOT / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch.py", site)
    (site / "paths.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    script = tmp_path / "env" / "bin" / "kbit-sweep"
    script.write_text(f"#!{tmp_path / 'env' / 'bin' / 'python'}\n{CONSOLE_SCRIPT}")
    script.chmod(0o755)
    return script


@pytest.fixture
def full_directory(tmp_path: Path) -> Path:
    """A user's directory with modules that are named like the project's and those that it needs."""
    directory = tmp_path / "home"
    for package in ("sweeps", "kbit", "transformers"):
        (directory / package).mkdir(parents=True)
        (directory / package / "__init__.py").write_text(TRAP)
    for module in ("datasets", "torch", "lm_eval", "wandb", "pandas", "yaml", "json", "launch"):
        (directory / f"{module}.py").write_text(TRAP)
    return directory


def test_a_study_runs_and_is_mirrored_beside_modules_of_the_users(installed: Path, full_directory: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    arguments = ["sweep.sizes=[neox-xs]", "sweep.quant=[{bits: 4, dtype: int, blocksize: 64}]", "tracking=offline"]
    arguments += ["eval.tokens=512", "eval.tasks=[jargon_choice]", "eval.limit=2"]
    ran = subprocess.run(
        [installed, *arguments], cwd=full_directory, env=clean, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert Store(out=full_directory / "results").read(["status"])["status"].to_pylist() == ["done", "done"]
    logs = [p for p in (full_directory / "results").rglob("*.log") if p.is_file()]
    assert any(p.name == "mirror.log" for p in logs)
    for text in (ran.stdout, ran.stderr, *(p.read_text(errors="replace") for p in logs)):
        assert "the current directory" not in text
    assert list((full_directory / "results" / "wandb").rglob("*.wandb"))


def test_the_modules_are_a_trap(full_directory: Path) -> None:
    asked = [sys.executable, "-m", "sweeps.worker", "--help"]
    ran = subprocess.run(asked, cwd=full_directory, capture_output=True, text=True, check=False)
    assert "a module of the current directory was imported" in ran.stderr
