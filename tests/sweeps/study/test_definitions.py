"""A task of the user's own is what its files say: whatever changes its requests changes its key, and what can't change
them changes nothing.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from kbit.evaluation.spec import EvalSpec
from kbit.sources import LocalFile, TaskSource
from kbit.spec import QuantSpec
from sweeps.config import DEMO_DIR
from sweeps.errors import DataChangedError, TaskError
from sweeps.study.cell import Cell, Measurement, ModelRef
from sweeps.study.definitions import definition_of, is_own
from sweeps.study.evals import Finder
from sweeps.study.snapshot import check_eval, freeze_evals
from sweeps.study.task_index import find_task

UTILS = """
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.modules.pop("words", None)
import words

def process(data):
    names = json.loads((HERE / "names.json").read_text())
    files = [HERE / "texts" / f"{language}.txt" for language in ("en", "de")]
    more = "".join(file.read_text() for file in files if file.exists())
    return data.map(lambda d: {"q": d["q"] + names["x"] + words.SUFFIX + more})
"""
LISTING = """
from pathlib import Path

def process(data):
    here = "".join(sorted(p.name + p.read_text() for p in Path(__file__).parent.iterdir() if p.suffix == ".anything"))
    return data.map(lambda d: {"q": d["q"] + here})
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task with includes, functions of its own, and what these read; and files that are not its own."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    mine, common = tmp_path / "tasks" / "mine", tmp_path / "tasks" / "common"
    for directory in (mine / "texts", common):
        directory.mkdir(parents=True)
    (mine / "own.yaml").write_text(
        "task: own\ninclude: base.yaml\nprocess_docs: !function utils.process\ndoc_to_text: '{{q}}'\n"
    )
    (mine / "base.yaml").write_text("include: ../common/most.yaml\ndoc_to_target: ' {{a}}'\n")
    (common / "most.yaml").write_text("output_type: loglikelihood\ntest_split: test\nmetric_list: [{metric: acc}]\n")
    (mine / "utils.py").write_text(UTILS)
    (mine / "words.py").write_text("SUFFIX = '!'\n")
    (mine / "names.json").write_text('{"x": "y"}')
    (mine / "texts" / "en.txt").write_text("and more")
    (mine / "listing.py").write_text(LISTING)
    (mine / "lists.yaml").write_text(
        (mine / "own.yaml").read_text().replace("utils.", "listing.").replace("own", "lists")
    )
    (mine / "plain.yaml").write_text("task: plain\ninclude: base.yaml\ndoc_to_text: '{{q}}'\n")
    (mine / "all.yaml").write_text("group: all_of_mine\ntask: [own, plain]\n")
    (mine / "notes.md").write_text("of no use")
    (tmp_path / "data.jsonl").write_text('{"q": "one", "a": "1"}\n')
    return mine / "own.yaml"


def spec_of(file: Path, name: str = "own") -> EvalSpec:
    """The evaluation as a study resolves it."""
    data = file.parents[2] / "data.jsonl"
    settings = {"task_dirs": [str(file.parent)], "task_data": {name: str(data)}}
    found = Finder(settings=settings, data_dir=None, commits=SimpleNamespace()).task(name, "eval.tasks")  # type: ignore[arg-type]
    assert isinstance(found.source, TaskSource)
    assert isinstance(found.source.documents, LocalFile)
    about = {"dataset": found.source.documents.identity, "compute_dtype": "float32"}
    return EvalSpec(kind="task", name=name, definition=found.definition, source=found.source, **about)


def key(spec: EvalSpec) -> str:
    model = ModelRef(family="neox", name="xs", path="/nowhere", weights_hash="0")
    return Measurement(cell=Cell(model=model, quant=QuantSpec(bits=16)), eval=spec).key


def requests(spec: EvalSpec) -> list[tuple[str, str]]:
    from kbit.evaluation.tasks import build_task

    # lm-eval keeps modules while their own files stay, as Python does; a worker is a new process.
    assert isinstance(spec.source, TaskSource)
    for module in [m for m in sys.modules if m.startswith(str(Path(spec.source.task_file).parent))]:
        del sys.modules[module]
    built = build_task(spec)
    built.build_all_requests()
    return [instance.args for instance in built.instances]


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        file = directory / name
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    return change


def written(name: str, text: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        file = directory / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)

    return change


MATTERS = {
    "the task's own file": ("own", replaced("own.yaml", "'{{q}}'", "'? {{q}}'")),
    "what it includes": ("own", replaced("base.yaml", "' {{a}}'", "' = {{a}}'")),
    "what an include includes": ("own", replaced("../common/most.yaml", "metric: acc", "metric: perplexity")),
    "its functions": ("own", replaced("utils.py", 'names["x"]', 'names["x"].upper()')),
    "a module that these import": ("own", replaced("words.py", "!", "?")),
    "a file that they name": ("own", replaced("names.json", "y", "z")),
    "a file of a kind that they name": ("own", replaced("texts/en.txt", "more", "less")),
    "one more of that kind": ("own", written("texts/de.txt", "und mehr")),
    "a file of a directory that they list": ("lists", written("new.anything", "new")),
    "the file of a task without functions": ("plain", replaced("plain.yaml", "'{{q}}'", "'? {{q}}'")),
}
NOTHING = {
    "another task": ("own", written("other.yaml", "task: other\ninclude: base.yaml\ndoc_to_text: x\n")),
    "a group that holds it": ("own", replaced("all.yaml", "task: [own, plain]", "task: [own]\ndescription: mine")),
    "one more group": ("own", written("more.yaml", "group: more\ntask: [own]\n")),
    "a note": ("own", replaced("notes.md", "no use", "use")),
    "an editor's file": ("own", written(".utils.py.swp", "x")),
    "compiled code": ("own", written("__pycache__/utils.cpython-311.pyc", "x")),
    "a module that nothing imports": ("own", written("helpers.py", "SUFFIX = '#'")),
    "a file of a kind that nothing names": ("own", written("new.csv", "a,b")),
    "functions of another task": ("plain", replaced("utils.py", 'names["x"]', 'names["x"].upper()')),
    "what these read": ("plain", replaced("names.json", "y", "z")),
}


@pytest.mark.parametrize(("name", "change"), MATTERS.values(), ids=MATTERS)
def test_a_file_that_may_decide_the_requests_is_part_of_the_key(
    task: Path, name: str, change: Callable[[Path], None]
) -> None:
    before = spec_of(task, name)
    asked = requests(before)
    change(task.parent)
    after = spec_of(task, name)
    assert key(after) != key(before)
    # The case is real: but for a metric's, the model is asked something else.
    assert (requests(after) != asked) == (change is not MATTERS["what an include includes"][1])
    with pytest.raises(DataChangedError, match=rf"eval {name}: its definition .*changed since.*launch the study again"):
        check_eval(before)
    check_eval(after)


@pytest.mark.parametrize(("name", "change"), NOTHING.values(), ids=NOTHING)
def test_a_file_that_can_not_decide_them_changes_no_key(task: Path, name: str, change: Callable[[Path], None]) -> None:
    before = spec_of(task, name)
    asked = requests(before)
    change(task.parent)
    after = spec_of(task, name)
    assert key(after) == key(before)
    assert requests(after) == asked
    check_eval(before)


def test_a_copy_elsewhere_and_the_frozen_copy_have_the_same_key(task: Path, tmp_path: Path) -> None:
    here = spec_of(task)
    shutil.copytree(tmp_path / "tasks", tmp_path / "moved" / "tasks")
    shutil.copy(tmp_path / "data.jsonl", tmp_path / "moved")
    assert key(spec_of(tmp_path / "moved" / "tasks" / "mine" / "own.yaml")) == key(here)
    (frozen,) = freeze_evals([here], tmp_path / "out")
    assert isinstance(frozen.source, TaskSource)
    copied = {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert copied == {"own.yaml", "base.yaml", "most.yaml", "utils.py", "words.py", "names.json", "en.txt"}
    asked = requests(here)
    shutil.rmtree(tmp_path / "tasks")
    check_eval(frozen)
    assert requests(frozen) == asked
    Path(frozen.source.task_file).with_name("words.py").write_text("SUFFIX = '?'")
    with pytest.raises(DataChangedError, match=r"its definition .*changed since"):
        check_eval(frozen)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(DataChangedError, match=r"its definition can't be read .*own\.yaml"):
        check_eval(frozen)


def test_what_is_found_by_an_absolute_name_or_installed_is_part_of_it_too(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "my_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('never imported when planning')\n")
    (package / "functions.py").write_text("def f(data):\n    return data\n")
    monkeypatch.syspath_prepend(str(package.parent))
    most = tmp_path / "tasks" / "common" / "most.yaml"
    task.write_text(
        f"task: own\ninclude: [{most}, {find_task('piqa').file}]\nprocess_docs: !function my_package.functions.f\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: ' {{a}}'\ncustom: !function math.floor\n"
    )
    found = definition_of(task)
    assert list(found.relative) == [task]
    assert sorted(p.name for p in found.fixed) == ["functions.py", "most.yaml"]
    keys = {found.hash}
    for file in (most, package / "functions.py"):
        file.write_text(file.read_text() + "# edited\n")
        keys.add(definition_of(task).hash)
    assert len(keys) == 3


def test_tasks_of_lm_eval_and_of_the_demo_keep_their_keys() -> None:
    for file in (find_task("piqa").file, find_task("jargon_choice", [DEMO_DIR / "tasks"]).file):
        assert not is_own(file)
    assert "definition" not in EvalSpec(kind="task", name="piqa", dataset="x", compute_dtype="float32").canonical()


def test_files_that_can_not_be_used_are_named(task: Path, tmp_path: Path) -> None:
    (task.parent / "texts" / "en.txt").unlink()
    (task.parent / "linked.yaml").symlink_to(tmp_path / "tasks" / "common" / "most.yaml")
    task.write_text(task.read_text().replace("include: base.yaml", "include: [base.yaml, linked.yaml]"))
    most = tmp_path / "tasks" / "common" / "most.yaml"
    most.write_text(most.read_text() + "aggregation: !function utils.mean\n")
    (most.parent / "utils.py").write_text("def mean(values):\n    return 0\n")
    with pytest.raises(TaskError, match=r"symbolic link.*another utils\.py"):
        definition_of(task)


def test_data_files_that_a_task_names_are_no_part_of_its_definition(task: Path, tmp_path: Path) -> None:
    data = task.parent / "rows.jsonl"
    data.write_text('{"q": "one", "a": "1"}\n')
    task.write_text(f"task: own\ninclude: base.yaml\ndataset_path: json\ndataset_kwargs: {{data_files: {data}}}\n")
    assert data not in definition_of(task).relative
    assert hashlib.sha256(data.read_bytes()).hexdigest() != definition_of(task).hash
