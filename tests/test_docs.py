"""The documents' examples: their Python runs, their studies and command lines are ones that a plan accepts."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from sweeps.config import DEMO_DIR
from tests import ROOT
from tests.conftest import Launch

PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("writing-a-study", "adding-models")}
PYTHON = (ROOT / "docs" / "python-and-notebooks.md").read_text()
TEXT_SETS = ("pile_cc_test.jsonl",)
TASKS = ("lambada_openai_test", "piqa_validation", "hellaswag_validation", "winogrande_xl_validation")


def blocks(page: str, language: str) -> list[str]:
    """Code blocks of a page in a language ('' for command lines)."""
    return [text for lang, text in re.findall(r"```(\w*)\n(.*?)```", page, re.DOTALL) if lang == language]


def commands(page: str) -> list[str]:
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    return [line.removeprefix("python launch.py ") for line in lines if line.startswith("python launch.py ")]


def tree_of(readme: str) -> dict[str, str]:
    """The README's annotated tree: path to its words."""
    start = readme.index("\nlaunch.py  ") + 1
    found: dict[str, str] = {}
    stack: list[str] = []
    for line in readme[start : readme.index("```", start)].splitlines():
        indent, name, words = re.fullmatch(r"( *)(\S+) +(\S.*)", line).groups()  # type: ignore[union-attr]
        stack[len(indent) // 2 :] = [name.rstrip("/")]
        found["/".join(stack)] = words
    return found


def test_the_readmes_tree_is_that_of_the_files() -> None:
    """Each file that has a purpose of its own stands in it, with at most eight words."""
    tree = tree_of((ROOT / "README.md").read_text())
    assert not [path for path in tree if not (ROOT / path).exists()]
    files = [p for package in ("kbit", "sweeps", "analysis") for p in (ROOT / package).rglob("*.py")]
    named = {str(p.relative_to(ROOT)) for p in files if p.name != "__init__.py"}
    assert not named - tree.keys()
    assert not [f"{path}: {words}" for path, words in tree.items() if len(words.split()) > 8]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory with what the pages name: my_conf with their files, models and data."""
    for name in ("opt-125m", "opt-350m", "mine-small"):
        shutil.copytree(DEMO_DIR / "models" / "neox-xs", tmp_path / "models" / name)
    (tmp_path / "data").mkdir()
    for name in TEXT_SETS:
        (tmp_path / "data" / name).write_text(json.dumps({"text": "A text. " * 500}) + "\n")
    for name in TASKS:
        row = {"text": "a b", "goal": "a", "sol1": "b", "sol2": "c", "label": 0, "sentence": "a _ b", "query": "a"}
        row |= {"option1": "b", "option2": "c", "answer": "1", "choices": ["b", "c"], "gold": 0}
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    for page in PAGES.values():
        for name, block in re.findall(r"`(my_conf/\S+\.yaml)`[^`]*```yaml\n(.*?)```", page, re.DOTALL):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(block.replace("/models", f"{tmp_path}/models"))
    return tmp_path


@pytest.mark.parametrize("command", [c for page in PAGES.values() for c in commands(page) if "mode=plan" in c])
def test_commands_of_the_documents_plan(command: str, home: Path, here: Launch) -> None:
    arguments = shlex.split(command)
    planned = here(*(a.replace("/models", f"{home}/models").replace("=/data", f"={home}/data") for a in arguments))
    assert planned.returncode == 0, planned.stderr
    assert "to do" in planned.stdout


def test_first_study_has_the_cells_that_its_page_says(home: Path, here: Launch) -> None:
    planned = here("--config-dir", "my_conf", "sweep=my_first", "mode=plan")
    said = re.search(r"The plan says (\d) models and (\d+) cells", PAGES["writing-a-study"])
    assert said is not None
    assert re.search(rf"models +{said[1]} *\n +cells +{said[2]} *\n", planned.stdout), planned.stdout


def test_second_study_keeps_the_reason_of_what_it_leaves_out(home: Path, here: Launch) -> None:
    planned = here("--config-dir", "my_conf", "sweep=my_second", "mode=plan")
    assert planned.returncode == 0, planned.stderr
    assert "a quantile codebook of the whole tensor needs no blocks" in planned.stdout


def test_python_of_the_documents_runs(tmp_path: Path, here: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    quant = "[{bits: 16}, {bits: [3, 4, 5], dtype: [int, float, quantile], exponent_bits: 2, blocksize: 64}, "
    quant += "{bits: [3, 4], dtype: int, blocksize: [16, 256]}]"
    study = ("sweep.sizes=[neox-xs,neox-s]", "eval.tasks=[]", "eval.tokens=2048", f"sweep.quant={quant}")
    ran = here(*study, "executor.workers=1", "report=false")
    assert ran.returncode == 0, ran.stderr
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks(PYTHON, "python"):
        exec(compile(block, "python-and-notebooks.md", "exec"), names)
    assert (tmp_path / "results" / "data_types_3bit.pdf").stat().st_size > 0
    assert (tmp_path / "results" / "all.parquet").stat().st_size > 0
    for block in blocks(PAGES["adding-models"], "python"):
        own = block.replace("/models/mine-small", str(DEMO_DIR / "models" / "neox-xs"))
        exec(compile(own, "adding-models.md", "exec"), names)
    # Attention and FFN of neox-xs: four linear layers a block.
    assert len(names["handle"].layers) % 4 == 0
