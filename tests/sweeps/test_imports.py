"""The order of sweeps' wings: who may import whom, at the top of a file and inside its calls."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT
from tests.conftest import Launch
from tests.sweeps.commands.test_run import SMALL

ORDER = (
    *("errors", "files", "processes", "status", "text", "terminal", "provenance"),
    *("study", "store", "events", "plan", "launches", "results", "tracking", "worker"),
    *("options", "executors", "config", "hydra_errors", "commands", "completion", "bench"),
)
"""A file may import its own wing and those before it. Files that lie in no folder have a place too."""
FILES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted((ROOT / "sweeps").rglob("*.py"))}
FILES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}
PLACED = [name for name in FILES if name != "sweeps" and not name.startswith("sweeps.demo")]


def imported(node: ast.AST, *, late: bool) -> Iterator[str]:
    """Files of sweeps that run as a file is imported, and with ``late`` what its calls import; not for types alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        names: list[str] = []
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom) and child.module:
            names = [child.module, *(f"{child.module}.{alias.name}" for alias in child.names)]
        yield from (name for name in names if name in FILES)
        if late or not isinstance(child, ast.FunctionDef | ast.Lambda):
            yield from imported(child, late=late)


def wing(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("name", PLACED)
def test_a_wing_imports_those_before_it(name: str) -> None:
    others = {other for other in imported(ast.parse(FILES[name].read_text()), late=True) if other in PLACED}
    assert not [other for other in others if ORDER.index(wing(other)) > ORDER.index(wing(name))]


@pytest.mark.parametrize("path", sorted((ROOT / "analysis").rglob("*.py")), ids=lambda p: p.name)
def test_analysis_knows_nothing_of_sweeps_but_at_its_command_line(path: Path) -> None:
    late = path.name == "__main__.py"
    assert not list(imported(ast.parse(path.read_text()), late=not late))


@pytest.mark.parametrize("path", sorted(p for p in FILES.values() if "slurm" not in p.parts), ids=lambda p: p.name)
def test_only_executors_slurm_imports_it(path: Path) -> None:
    assert not [name for name in imported(ast.parse(path.read_text()), late=True) if "slurm" in name]


def test_workers_and_readers_load_no_executor(tmp_path: Path, here: Launch) -> None:
    assert here("out=r", *SMALL, "sweep.quant=[{bits: 16}]", "report=false").returncode == 0
    code = (
        "import sys, sweeps, sweeps.worker.worker, sweeps.worker.pool, sweeps.store.parts, sweeps.results.table\n"
        f"assert len(sweeps.load_results({str(tmp_path / 'r')!r})) == 1\n"
        "loaded = [m for m in sys.modules if m.startswith(('sweeps.executors', 'submitit'))]\n"
        "assert not loaded, loaded"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_mode_that_is_not_asked_for_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys, launch\n"
        f"sys.argv = ['launch.py', 'mode=status', 'out={tmp_path}/r']\n"
        "try: launch.main()\n"
        "except SystemExit as end: assert end.code == 2, end.code\n"
        "print([m for m in sys.modules if m.startswith('sweeps.commands.')])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    modes = {"run", "plan", "table", "logs", "cancel", "fetch", "drop", "sync"}
    assert "sweeps.commands.status" in result.stdout
    assert not [mode for mode in modes if f"sweeps.commands.{mode}'" in result.stdout]
