"""What runs is what was planned: code, tasks and data as they were at launch, whatever is edited meanwhile."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest

from kbit.evaluation.spec import EvalSpec
from kbit.sources import source_from_dict
from kbit.spec import QuantSpec
from sweeps.config import DEMO_DIR
from sweeps.errors import CodeChangedError, DataChangedError, UserError
from sweeps.study.cell import Cell, Measurement, ModelRef
from sweeps.study.evals import _data_files_hash
from sweeps.study.snapshot import check_code, check_data, code_hash, freeze_evals, job_setup, snapshot_code
from sweeps.study.task_index import find_task
from tests.conftest import ROOT

HASH = "from sweeps.study.snapshot import code_hash; print(code_hash())"
SNAPSHOT = "import sys, pathlib, sweeps.study.snapshot as s; print(s.snapshot_code(pathlib.Path(sys.argv[1])))"
CHECK = "import sys, sweeps.study.snapshot as s; s.check_code(sys.argv[1])"
WHERE = (
    "import kbit.spec, sweeps.worker.worker\n"
    "for module in (kbit.spec, sweeps.worker.worker): print(module.__file__, hasattr(module, 'EDITED'))"
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copy_project(tmp_path / "checkout")


def copy_project(target: Path) -> Path:
    """The project's sources, without the demo's models and texts."""
    target.mkdir(parents=True, exist_ok=True)

    def ignored(directory: str, names: list[str]) -> set[str]:
        of_demo = {"models", "text", "figures"} if Path(directory).name == "demo" else set()
        return {"__pycache__", *of_demo} & set(names)

    for package in ("kbit", "sweeps", "analysis", "conf"):
        shutil.copytree(ROOT / package, target / package, ignore=ignored)
    shutil.copy(ROOT / "launch.py", target)
    return target


def python(code: str, *args: object, cwd: Path, setup: Sequence[str] = (), exe: object = None) -> str:
    """What a Python process of its own prints; it imports from ``cwd``, or as the shell lines ``setup`` make it."""
    command = ["bash", "-c", "\n".join([*setup, 'exec "$@"']), "bash", str(exe or sys.executable), "-c", code]
    command += map(str, args)
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    result = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_hash_is_of_what_a_job_runs(checkout: Path) -> None:
    before = python(HASH, cwd=checkout)
    assert before == python(HASH, cwd=checkout)
    # What people do while jobs wait: plan the next study, look at results, run things.
    (checkout / "conf" / "sweep" / "next.yaml").write_text("name: next\n")
    (checkout / "analysis" / "figures.py").write_text("")
    (checkout / "sweeps" / "store" / "SCHEMA.md").write_text("")
    (checkout / "kbit" / "__pycache__").mkdir(exist_ok=True)
    (checkout / "kbit" / "__pycache__" / "spec.py").write_text("")
    assert python(HASH, cwd=checkout) == before
    (checkout / "kbit" / "spec.py").open("a").write("\n")
    edited = python(HASH, cwd=checkout)
    assert edited != before
    (checkout / "kbit" / "memory.py").rename(checkout / "kbit" / "moved.py")
    assert python(HASH, cwd=checkout) not in (edited, before)


@pytest.mark.parametrize("installed", ["editable", "wheel"])
def test_a_job_imports_the_snapshot_whatever_is_edited_after_the_launch(tmp_path: Path, installed: str) -> None:
    venv.create(tmp_path / "env", symlinks=True)
    exe = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("*/site-packages"))
    project = copy_project(tmp_path / "checkout" if installed == "editable" else site)
    own = [str(project)] if installed == "editable" else []
    (site / "paths.pth").write_text("\n".join([*own, sysconfig.get_paths()["purelib"]]) + "\n")
    snapshot = Path(python(SNAPSHOT, tmp_path / "out", cwd=tmp_path, exe=exe))
    for file in ("kbit/spec.py", "sweeps/worker/worker.py"):
        (project / file).open("a").write("\nEDITED = True\n")
    # A job starts in the directory that it was submitted from: here the edited checkout itself.
    lines = python(WHERE, cwd=project, setup=job_setup(snapshot), exe=exe).splitlines()
    assert lines == [f"{snapshot / 'kbit' / 'spec.py'} False", f"{snapshot / 'sweeps' / 'worker' / 'worker.py'} False"]
    # Without it the edits are what runs, so the test above can fail.
    assert [line.split()[1] for line in python(WHERE, cwd=project, exe=exe).splitlines()] == ["True", "True"]


def test_the_snapshot_knows_its_own_hash_and_a_checkout_that_changed_refuses(checkout: Path, tmp_path: Path) -> None:
    launched = python(HASH, cwd=checkout)
    snapshot = Path(python(SNAPSHOT, tmp_path / "out", cwd=checkout))
    assert snapshot == tmp_path / "out" / "code" / launched[:16]
    python(CHECK, launched, cwd=checkout)
    (checkout / "sweeps" / "errors.py").open("a").write("\n")
    python(CHECK, launched, cwd=tmp_path, setup=job_setup(snapshot))
    with pytest.raises(AssertionError, match=r"CodeChangedError: the code in .*checkout has changed since the study"):
        python(CHECK, launched, cwd=checkout)


def test_check_code_says_what_to_do() -> None:
    check_code(code_hash())
    with pytest.raises(CodeChangedError, match=r"Launch the study again.*executor\.code=snapshot"):
        check_code("0" * 64)


def test_launches_at_the_same_time_share_one_whole_copy(tmp_path: Path) -> None:
    # All wait for the same moment, then copy.
    race = f"import time\nwhile time.time() < float(sys.argv[2]): pass\n{SNAPSHOT}"
    race = "import sys, pathlib, sweeps.study.snapshot as s\n" + race
    command = [sys.executable, "-c", race, str(tmp_path)]
    at = subprocess.run(["date", "+%s"], capture_output=True, text=True, check=True).stdout.strip()
    launches = [
        subprocess.Popen([*command, str(int(at) + 3)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    said = {process.communicate(timeout=60)[0].strip() for process in launches}
    assert [process.returncode for process in launches] == [0] * 4
    assert said == {str(tmp_path / "code" / code_hash()[:16])}
    assert len(list((tmp_path / "code").iterdir())) == 1


def test_a_second_launch_reuses_the_copy_but_not_one_that_was_edited(tmp_path: Path) -> None:
    snapshot = snapshot_code(tmp_path)
    made = (snapshot / "kbit" / "spec.py").stat().st_mtime_ns
    assert (snapshot_code(tmp_path), (snapshot / "kbit" / "spec.py").stat().st_mtime_ns) == (snapshot, made)
    (snapshot / "kbit" / "spec.py").write_text("")
    with pytest.raises(CodeChangedError, match=r"spec\.py was edited.*launch again"):
        snapshot_code(tmp_path)


def test_a_copy_that_was_cut_short_is_not_taken_for_whole(tmp_path: Path) -> None:
    (tmp_path / "code").write_text("a file where the directory should be")
    with pytest.raises(OSError, match="code"):
        snapshot_code(tmp_path)
    (tmp_path / "code").unlink()
    leftover = tmp_path / "code" / f".{code_hash()[:16]}.0.tmp"
    leftover.mkdir(parents=True)
    assert (snapshot_code(tmp_path) / "sweeps" / "errors.py").is_file()


def task(file: Path, **source: object) -> EvalSpec:
    return EvalSpec(
        kind="task",
        name="own",
        dataset="sha256:0",
        compute_dtype="float32",
        limit=2,
        source=source_from_dict({"task_file": str(file), **source}),
    )


@pytest.fixture
def own(tmp_path: Path) -> EvalSpec:
    """A task with includes of its own directory and another, functions next to it and below, and local data."""
    (tmp_path / "tasks" / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "tasks" / "common").mkdir()
    file = tmp_path / "tasks" / "mine" / "own.yaml"
    file.write_text("task: own\ninclude: [base.yaml, ../common/most.yaml]\ndoc_to_text: !function deep.text.question\n")
    (file.parent / "base.yaml").write_text("output_type: loglikelihood\ndoc_to_target: ' {{a}}'\n")
    (file.parent / "deep" / "text.py").write_text("def question(doc):\n    return 'before ' + doc['q']\n")
    (file.parent / "notes.md").write_text("of no use to the task")
    common = tmp_path / "tasks" / "common"
    (common / "most.yaml").write_text(
        "test_split: test\nprocess_docs: !function utils.process\nmetric_list: [{metric: acc}]\n"
    )
    (common / "utils.py").write_text("def process(data):\n    return data.map(lambda d: {'q': d['q'].upper()})\n")
    data = tmp_path / "own.jsonl"
    data.write_text('{"q": "one", "a": "1"}\n{"q": "two", "a": "2"}\n')
    return task(file, path=str(data), sha256=hashlib.sha256(data.read_bytes()).hexdigest())


def requests(spec: EvalSpec) -> list[tuple[str, str]]:
    from kbit.evaluation.tasks import build_task

    built = build_task(spec)
    built.build_all_requests(limit=spec.limit)
    return [instance.args for instance in built.instances]


def test_a_frozen_task_is_what_it_was_whatever_is_edited_after_the_launch(own: EvalSpec, tmp_path: Path) -> None:
    (frozen,) = freeze_evals([own], tmp_path / "out")
    file = Path(frozen.source.task_file)
    assert file.is_relative_to(tmp_path / "out" / "code")
    assert file.parts[len(tmp_path.parts) + 2].startswith("tasks-")
    expected = [("before ONE", " 1"), ("before TWO", " 2")]
    assert requests(own) == expected
    assert freeze_evals([frozen], tmp_path / "out") == (frozen,)
    shutil.rmtree(tmp_path / "tasks")
    assert requests(frozen) == expected
    copied = {p.name for p in (tmp_path / "out").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert copied == {"own.yaml", "base.yaml", "text.py", "most.yaml", "utils.py"}


def test_freezing_changes_no_measurement_key(own: EvalSpec, tmp_path: Path) -> None:
    model = ModelRef(family="neox", name="xs", path="/nowhere", weights_hash="0")
    (frozen,) = freeze_evals([own], tmp_path / "out")
    keys = {Measurement(cell=Cell(model=model, quant=QuantSpec(bits=16)), eval=e).key for e in (own, frozen)}
    assert len(keys) == 1
    assert frozen == own
    assert frozen.source.documents == own.source.documents


def test_an_edited_task_gets_a_copy_of_its_own_and_an_edited_copy_is_refused(own: EvalSpec, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (first,) = freeze_evals([own], out)
    assert freeze_evals([own], out)[0].source == first.source
    utils = tmp_path / "tasks" / "common" / "utils.py"
    utils.write_text(utils.read_text() + "# edited\n")
    (second,) = freeze_evals([own], out)
    assert second.source.task_file != first.source.task_file
    Path(second.source.task_file).write_text("task: other\n")
    with pytest.raises(CodeChangedError, match=r"own\.yaml was edited"):
        freeze_evals([own], out)


def test_what_is_lm_evals_own_stays_and_the_demos_tasks_are_copied(tmp_path: Path) -> None:
    theirs = task(find_task("piqa").file)
    text = EvalSpec(kind="perplexity", name="t", dataset="sha256:0", compute_dtype="float32", window=512)
    demo = task(find_task("jargon_choice", [DEMO_DIR / "tasks"]).file)
    kept, same, copied = freeze_evals([theirs, text, demo], tmp_path)
    assert kept is theirs
    assert same is text
    assert Path(copied.source.task_file).is_relative_to(tmp_path / "code")
    assert Path(copied.source.task_file).read_bytes() == Path(demo.source.task_file).read_bytes()


def test_what_is_included_by_an_absolute_path_is_not_copied(own: EvalSpec, tmp_path: Path) -> None:
    file = Path(own.source.task_file)
    file.write_text(f"task: own\ninclude: [{tmp_path / 'tasks' / 'common' / 'most.yaml'}, {find_task('piqa').file}]\n")
    (frozen,) = freeze_evals([own], tmp_path / "out")
    assert frozen.source.task_file != str(file)
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == ["own.yaml"]


def test_links_to_task_files_are_followed_unless_two_files_would_take_one_place(own: EvalSpec, tmp_path: Path) -> None:
    file, common = Path(own.source.task_file), tmp_path / "tasks" / "common"
    (file.parent / "linked.yaml").symlink_to(common / "most.yaml")
    file.write_text(file.read_text().replace("../common/most.yaml", "linked.yaml"))
    (frozen,) = freeze_evals([own], tmp_path / "out")
    assert requests(frozen) == requests(own)
    (file.parent / "utils.py").write_text("def process(data):\n    return data\n")
    assert requests(freeze_evals([own], tmp_path / "out")[0]) == requests(own)
    file.write_text(file.read_text() + "description: !function utils.describe\n")
    with pytest.raises(UserError, match=r"symbolic link.*another utils\.py"):
        freeze_evals([own], tmp_path / "out")


def test_data_that_changed_or_went_since_the_launch_are_refused(own: EvalSpec) -> None:
    data = Path(own.source.documents.path)
    check_data(f"eval {own.name}", own.source)
    before = data.stat()
    data.write_text(data.read_text().replace("one", "uno"))
    # Equal size and time: only the contents tell.
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataChangedError, match=r"own: .*own\.jsonl changed since.*launch the study again"):
        check_data(f"eval {own.name}", own.source)
    data.unlink()
    with pytest.raises(DataChangedError, match=r"own\.jsonl can't be read on .*No such file"):
        check_data(f"eval {own.name}", own.source)


def test_data_files_that_a_task_names_itself_are_checked_as_the_launch_hashed_them(tmp_path: Path) -> None:
    names = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in names:
        path.write_text('{"q": "one"}\n')
    file = tmp_path / "own.yaml"
    file.write_text(
        "task: own\ndataset_path: json\noutput_type: loglikelihood\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: [{names[0]}], train: {names[1]}}}}}\n"
    )
    spec = task(file, sha256=_data_files_hash(find_task("own", [tmp_path])))
    check_data(f"eval {spec.name}", spec.source)
    check_data("eval", freeze_evals([spec], tmp_path / "out")[0].source)
    names[1].write_text('{"q": "two"}\n')
    with pytest.raises(DataChangedError, match=r"b\.jsonl changed"):
        check_data(f"eval {spec.name}", spec.source)


def test_data_of_the_hub_have_nothing_to_check_here() -> None:
    check_data("eval", task(Path("none.yaml"), hub="owner/name", revision="0" * 40).source)
