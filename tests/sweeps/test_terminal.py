"""The command in terminals and pipes as users have them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sweeps.config import DEMO_DIR
from tests import ROOT
from tests.conftest import Launch
from tests.sweeps.commands.test_run import SMALL

COMMAND = [sys.executable, str(ROOT / "launch.py")]
TINY = [*SMALL[:3], "sweep.quant=[{bits: 16}, {bits: 4, dtype: int, blocksize: 64}]"]


def run(cwd: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("LANG", "LC_ALL", "PYTHONIOENCODING")}
    return subprocess.run(
        [*COMMAND, *args],
        cwd=cwd,
        env={**clean, "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        errors="strict",
        timeout=300,
        check=False,
    )


ASKED = [
    ["mode=status", "by=[model,bits]"],
    [*TINY, "mode=plan"],
    ["mode=table"],
    ["mode=logs"],
    [*TINY, "mode=fetch"],
    ["mode=sync", "tracking=offline"],
    ["mode=drop", "where={bits: 4}", "yes=true"],
    ["mode=drop", "cell=×"],  # noqa: RUF001
]


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({"PYTHONIOENCODING": "ascii"}, [["report=true"], *ASKED]),
        ({"LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict"}, [["report=false"], *ASKED[:2]]),
    ],
    ids=["forced", "C"],
)
def test_an_output_of_ascii_is_no_error_in_any_mode(
    tmp_path: Path, environment: dict[str, str], asked: list[list[str]]
) -> None:
    (tmp_path / "Größe ±").mkdir()
    out = "out='Größe ±/r'"
    ran = run(tmp_path, out, *TINY, "tracking=offline", *asked[0], **environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "+-" in ran.stdout
    for said in (ran, *(run(tmp_path, out, *arguments, **environment) for arguments in asked[1:])):
        text = said.stdout + said.stderr
        assert text.isascii()
        assert "Traceback" not in text
        # 1: there is no W&B to synchronize with; 2: no cell has such a key.
        assert said.returncode == (1 if "mode=sync" in said.args else 2 if said.args[-1] == "cell=×" else 0), text  # noqa: RUF001


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["--cfg", "job"], ["mode=plan"], ["mode=status"], TINY]
)
def test_a_reader_that_stops_early_is_no_error(tmp_path: Path, arguments: list[str]) -> None:
    shutil.copytree(ROOT / "tests" / "data" / "earlier_results", tmp_path / "results")
    with subprocess.Popen(
        [*COMMAND, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode in (0, 1)
    assert said == ""


def test_the_version_is_ours(tmp_path: Path) -> None:
    said = run(tmp_path, "--version")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    match = re.fullmatch(
        r"kbit-sweep (\d+\.\d+\.\d+)(?: \(commit ([0-9a-f]{12})(, with local changes)?\))?\n", said.stdout
    )
    assert match is not None, said.stdout
    assert f'version = "{match[1]}"' in (ROOT / "pyproject.toml").read_text()
    assert (match[2] or "") == commit[:12]


def test_a_model_of_the_hubs_cache_goes_by_its_name_everywhere(here: Launch, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--my-neox" / "snapshots" / ("c" * 40)
    shutil.copytree(DEMO_DIR / "models" / "neox-xs", snapshot)
    arguments = [f"path={snapshot}", "sweep.sizes=[my-neox]", *TINY[1:]]
    assert here(*arguments, "report=false").returncode == 0
    assert "my-neox" in here("mode=status", "by=[model]").stdout
