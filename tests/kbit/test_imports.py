"""The order of kbit's wings: who may import whom at the top of a file. What is imported inside a call doesn't count."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

ORDER = (
    *("foundations", "specs", "quantizer", "ggml", "kernels", "models", "packed", "methods", "quantize", "evaluation"),
    *("layered", "gguf", "exporting", "bench", "compression"),
)
"""A file may import its own wing and those before it. The kernels follow the reference, which they have to equal; it
asks for them late."""
PLACED = {
    **{"kbit.spec": "specs"},
    **{"kbit.models.quantize": "quantize", "kbit.models.streaming.packing": "quantize"},
    **{"kbit.ggml.formats": "foundations", "kbit.ggml.recipes": "foundations"},
}
"""Files that don't stand with their folder: what quantizes a model can put packed layers into it; specs count bits."""
FILES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted((ROOT / "kbit").rglob("*.py"))}


def imported(tree: ast.Module) -> Iterator[str]:
    """Files of kbit that a file imports at its top, for its types too."""
    guarded = [node for block in tree.body if isinstance(block, ast.If) for node in block.body]
    for node in (*tree.body, *guarded):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name in FILES)


def wing(name: str) -> str:
    parts = name.split(".")
    return PLACED.get(name, parts[1] if len(parts) > 2 else "foundations")


GRAPH = {
    name: set(imported(ast.parse(path.read_text()))) for name, path in FILES.items() if not name.endswith("__init__")
}


@pytest.mark.parametrize("name", GRAPH)
def test_a_wing_imports_those_before_it(name: str) -> None:
    above = [other for other in GRAPH[name] if ORDER.index(wing(other)) > ORDER.index(wing(name))]
    assert not above


def test_the_graph_is_that_of_the_files() -> None:
    assert {"kbit.packed.layout", "kbit.kernels.ops"} <= GRAPH["kbit.packed.linear"]
    assert GRAPH["kbit.kernels.interpreter"] == set()
    assert Path(FILES["kbit.spec"]).name == "spec.py"
