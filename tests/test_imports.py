"""The layers: planning and analysis never load torch, and kbit knows nothing of sweeps."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests import ROOT

COMPUTES = {"torch", "transformers", "lm_eval", "bitsandbytes"}
LIGHT = {
    *("kbit.models.orders", "kbit.models.readings"),
    *("kbit.axes", "kbit.calibration", "kbit.compute_dtypes", "kbit.data_types", "kbit.doors", "kbit.errors"),
    *("kbit.evaluation.evaluators", "kbit.sources", "kbit.evaluation.spec", "kbit.evaluation.documents"),
    *("kbit.garbage", "kbit.models.checkpoint", "kbit.models.obeyed", "kbit.models.refusals", "kbit.spec"),
    *("kbit.specs.base", "kbit.specs.blockwise", "kbit.specs.checkpoint"),
    *("kbit.exporting.base", "kbit.models.prequantized.layouts"),
    *("kbit.models.kv_cache", "kbit.models.limits", "kbit.models.sizes", "kbit.models.ways"),
}
"""Of kbit, what loads no torch."""


def imports(path: Path, *, everywhere: bool) -> Iterator[str]:
    """Modules that a file imports at its top level, or anywhere; type checking only imports are not counted."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree)) if everywhere else list(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_no_files_import_each_other() -> None:
    """Not within calls and not for types either: two files that need each other are one, or lack a third."""
    found = [p for package in ("kbit", "sweeps", "analysis") for p in (ROOT / package).rglob("*.py")]
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in found}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module:
                named |= {f"{node.module}.{alias.name}" for alias in node.names} & files.keys()
                named |= {node.module} if any(f"{node.module}.{a.name}" not in files for a in node.names) else set()
        graph[name] = (named & files.keys()) - {name}
    assert "kbit.kernels.gptq" in graph["kbit.quantizer.gptq"]  # within a call
    assert "kbit.models.loadable" in graph["kbit.models.prequantized.loading"]  # for types
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


@pytest.mark.parametrize("path", sorted((ROOT / "kbit").rglob("*.py")), ids=lambda p: p.name)
def test_kbit_knows_nothing_of_sweeps(path: Path) -> None:
    assert not [m for m in imports(path, everywhere=True) if m.split(".")[0] in ("sweeps", "analysis", "launch")]


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").rglob("*.py")), ids=lambda p: p.name)
def test_sweeps_load_what_computes_only_inside_calls(path: Path) -> None:
    loaded = [m for m in imports(path, everywhere=False) if m.split(".")[0] in {*COMPUTES, "wandb", "matplotlib"}]
    assert not loaded
    of_kbit = {m for m in imports(path, everywhere=False) if m.startswith("kbit")}
    assert of_kbit <= LIGHT


@pytest.mark.parametrize("path", sorted((ROOT / "analysis").rglob("*.py")), ids=lambda p: p.name)
def test_analysis_never_imports_torch(path: Path) -> None:
    assert not [m for m in imports(path, everywhere=True) if m.split(".")[0] in COMPUTES]


@pytest.mark.parametrize("module", ["kbit.spec", "sweeps.options", "sweeps.results.table", "analysis.findings"])
def test_importing_does_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_plan_of_what_is_not_measured_loads_neither_torch_nor_pandas(tmp_path: Path) -> None:
    code = (
        "import sys, launch\n"
        f"sys.argv = ['launch.py', 'mode=plan', 'out={tmp_path}/r']\n"
        "try: launch.main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "r").exists()
