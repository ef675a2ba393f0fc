"""Finding lm-eval's tasks by reading files: the right file for names of every kind, and clear refusals."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sweeps.errors import TaskError
from sweeps.study.task_index import find_task, load_task_yaml, tasks_of
from tests import ROOT


@pytest.mark.parametrize(
    ("name", "file", "dataset", "config", "split", "output_type"),
    [
        (
            "lambada_openai",
            "lambada/lambada_openai.yaml",
            "EleutherAI/lambada_openai",
            "default",
            "test",
            "loglikelihood",
        ),
        ("piqa", "piqa/piqa.yaml", "baber/piqa", None, "validation", "multiple_choice"),
        ("hellaswag", "hellaswag/hellaswag.yaml", "Rowan/hellaswag", None, "validation", "multiple_choice"),
        (
            "winogrande",
            "winogrande/default.yaml",
            "allenai/winogrande",
            "winogrande_xl",
            "validation",
            "multiple_choice",
        ),
        ("arc_easy", "arc/arc_easy.yaml", "allenai/ai2_arc", "ARC-Easy", "test", "multiple_choice"),
        ("arc_challenge", "arc/arc_challenge.yaml", "allenai/ai2_arc", "ARC-Challenge", "test", "multiple_choice"),
        ("boolq", "super_glue/boolq/default.yaml", "aps/super_glue", "boolq", "validation", "multiple_choice"),
        ("mmlu_anatomy", "mmlu/default/mmlu_anatomy.yaml", "cais/mmlu", "anatomy", "test", "multiple_choice"),
        (
            "wikitext",
            "wikitext/wikitext.yaml",
            "EleutherAI/wikitext_document_level",
            "wikitext-2-raw-v1",
            "test",
            "loglikelihood_rolling",
        ),
    ],
)
def test_lm_evals_tasks_are_found_with_their_data(
    name: str, file: str, dataset: str, config: str | None, split: str, output_type: str
) -> None:
    task = find_task(name)
    assert task.name == name
    assert task.file.as_posix().endswith(f"lm_eval/tasks/{file}")
    assert (task.dataset_path, task.dataset_name, task.split) == (dataset, config, split)
    assert task.output_type == output_type
    assert float(task.version) >= 1


def test_entries_equal_what_lm_eval_itself_reads() -> None:
    """lm-eval's own loader, on tasks with includes, lists of tags, quoted keys and functions."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for name in (
        "arc_challenge",
        "mmlu_anatomy",
        "gsm8k",
        "hendrycks_math_algebra",
        "xnli_en",
        "bbh_zeroshot_navigate",
    ):
        task = find_task(name)
        theirs = load_yaml(task.file, resolve_func=False)
        assert theirs["task"] == name
        assert (task.dataset_path, task.dataset_name) == (theirs["dataset_path"], theirs.get("dataset_name"))
        assert task.output_type == theirs["output_type"]
        assert task.split == (theirs.get("test_split") or theirs.get("validation_split"))
        assert task.version == str(theirs["metadata"]["version"])
        ours = load_task_yaml(task.file)
        assert ours.keys() == theirs.keys()


@pytest.mark.parametrize(
    ("directory", "names"),
    [
        ("mmlu/default", ["mmlu", "mmlu_stem", "mmlu_stem_tasks", "mmlu_anatomy"]),  # groups of groups of tags
        ("arc", ["ai2_arc"]),  # a tag that an included file has
        ("lambada", ["lambada"]),
        ("bbh/cot_fewshot", ["bbh"]),
        ("super_glue", ["super-glue-lm-eval-v1"]),
    ],
)
def test_groups_and_tags_are_the_tasks_that_lm_eval_itself_finds(directory: str, names: list[str]) -> None:
    from lm_eval.tasks import TaskManager

    roots = Path(__import__("lm_eval").__file__).parent / "tasks"
    index = TaskManager(include_path=str(roots / directory), include_defaults=False).task_index

    def theirs(name: str) -> set[str]:
        entry = index[name]
        members = entry.tags if entry.kind.name == "TAG" else entry.cfg["task"]
        return {name} if entry.kind.name == "TASK" else {task for member in members for task in theirs(member)}

    for name in names:
        found = tasks_of(name)
        assert set(found) == theirs(name)
        assert len(found) == len(set(found))


def test_a_group_that_changes_its_tasks_is_refused_and_so_is_one_that_contains_itself(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"'openllm'.*changes .*num_fewshot of its task 'arc_challenge'.*name tasks"):
        tasks_of("openllm")
    (tmp_path / "a.yaml").write_text("group: round\ntask: [again]\n")
    (tmp_path / "b.yaml").write_text("group: again\ntask: [round]\n")
    with pytest.raises(TaskError, match="'round' contains itself through round -> again"):
        tasks_of("round", [tmp_path])


def test_a_name_of_nothing_and_a_task_are_themselves() -> None:
    assert tasks_of("piqa") == ("piqa",)
    assert tasks_of("no_such_task") == ("no_such_task",)


def test_python_task_is_refused() -> None:
    with pytest.raises(TaskError, match="'squadv2' is a Python class"):
        find_task("squadv2")


def test_misspelt_task_is_refused_with_near_matches_in_little_time() -> None:
    started = time.process_time()
    with pytest.raises(TaskError, match=r"'helaswag' is no task of lm-eval\. Did you mean hellaswag"):
        find_task("helaswag")
    assert time.process_time() - started < 3.0


@pytest.mark.parametrize("name", ["", "../piqa", "piqa/piqa", "*", "piqa\n"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(TaskError, match="is no task of lm-eval"):
        find_task(name)


def test_own_directory_wins_and_the_last_one_most(tmp_path: Path) -> None:
    for name, dataset in (("first", "me/first"), ("second", "me/second")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "any.yaml").write_text(f"task: piqa\ndataset_path: {dataset}\ntest_split: test\n")
    assert find_task("piqa", [tmp_path / "first"]).dataset_path == "me/first"
    assert find_task("piqa", [tmp_path / "first", tmp_path / "second"]).dataset_path == "me/second"
    assert find_task("hellaswag", [tmp_path / "first"]).dataset_path == "Rowan/hellaswag"


def test_own_task_may_include_functions_and_other_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base_yaml").write_text(
        "task: mine\ndataset_path: json\noutput_type: multiple_choice\nmetadata: {version: 3}\nvalidation_split: dev\n"
        "dataset_kwargs: {data_files: {dev: d.jsonl}, trust_remote_code: true}\n"
    )
    own = 'include: ../base_yaml\n"task": "yours"\ndoc_to_text: !function utils.text\ntest_split: null\n'
    (tmp_path / "sub" / "yours.yaml").write_text(own)
    task = find_task("yours", [tmp_path])
    assert (task.dataset_path, task.split, task.version) == ("json", "dev", "3")
    assert task.dataset_kwargs == {"data_files": {"dev": "d.jsonl"}}
    assert load_task_yaml(task.file)["doc_to_text"] == "function utils.text"


def test_task_without_version_or_output_type_gets_lm_evals_defaults(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("task: bare  # a comment\ndataset_path: me/data\n")
    task = find_task("bare", [tmp_path])
    assert (task.version, task.output_type, task.split) == ("Yaml", "generate_until", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("task: mine\ninclude: nowhere.yaml\n", r"nowhere\.yaml, which .*mine\.yaml includes, can't be read"),
        ("task: mine\ninclude: mine.yaml\n", "includes itself"),
        ("task: mine\n  bad: [\n", "is not valid YAML"),
    ],
)
def test_damaged_task_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(TaskError, match=message):
        find_task("mine", [tmp_path])


def test_missing_directory_of_tasks_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"eval\.task_dirs=.*nowhere"):
        find_task("piqa", [tmp_path / "nowhere"])


def test_finding_a_task_imports_neither_torch_nor_lm_eval() -> None:
    code = (
        "import sys; from sweeps.study.task_index import find_task; find_task('boolq')\n"
        "print(sorted({'torch', 'lm_eval', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
