"""Build an lm-eval task from its YAML file, from the hub or from a local JSONL file. lm-eval's own index of tasks
(13 s) isn't needed.
"""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import datasets
from jinja2 import meta
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import env

from kbit.errors import SpecError
from kbit.evaluation.documents import read_jsonl
from kbit.evaluation.spec import EvalSpec
from kbit.evaluation.texts import require_commit
from kbit.sources import HubData, LocalFile, NamedFiles, TaskSource

FEWSHOT_SEED: Final = 1234
"""lm-eval's default."""
PREPROCESSED_NAMES: Final = {"choices": "endings", "gold": "label"}
"""Fields that lm-eval's process_docs gives, and the hub's names under which preprocessed HellaSwag files carry them."""
SPLITS: Final = ("training_split", "validation_split", "test_split", "fewshot_split")


def build_task(spec: EvalSpec) -> Any:
    """Build the task of ``spec.source.task_file``, with its few-shot examples.

    The file is YAML, with its ``include:`` and ``!function``.

    Its documents may be a JSONL file that takes the place of the task's data set: its rows are the evaluated split.
    Rows that already have the form which the task's process_docs gives are taken as they are (a preprocessed
    HellaSwag). Without it the data come from the hub at a commit, or from where the YAML says.

    Raises:
        SpecError: few-shot examples where the task or local data have none to give.
        ValueError: a file that is missing or malformed, or lacks a field that the task needs.
    """
    if not isinstance(spec.source, TaskSource):
        raise ValueError(f"the task {spec.name!r} needs its definition, a YAML file; its source is {spec.source!r}")
    task_file, documents = Path(spec.source.task_file), spec.source.documents
    if not task_file.is_file():
        raise ValueError(f"{task_file}: no such file (the definition of the task {spec.name!r})")
    config = deepcopy(load_yaml(task_file))
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    metadata = config.get("metadata") or {}
    config["metadata"] = metadata if isinstance(metadata, dict) else {"_metadata": metadata}
    if config.get("num_fewshot") == 0 and spec.num_fewshot:
        raise SpecError("eval.num_fewshot", spec.num_fewshot, f"0: the task {spec.name!r} is defined without examples")
    overrides: dict[str, Any] = {}
    path = Path(documents.path) if isinstance(documents, LocalFile) else None
    hub = documents if isinstance(documents, HubData) else None
    if path is not None:
        data = _local_data(spec, config, path)
        overrides["download"] = lambda self, *_, **__: setattr(self, "dataset", data)
    elif hub is not None:
        config["dataset_kwargs"] = {**(config.get("dataset_kwargs") or {}), "revision": hub.revision}
    elif isinstance(documents, NamedFiles):
        # The cache of `datasets` knows files by their paths and times: one that was replaced by a copy with its times
        # would be read as it was. A place of its own for each content.
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "kbit-sweep" / documents.sha256[:32]
        config["dataset_kwargs"] = {**(config.get("dataset_kwargs") or {}), "cache_dir": str(cache)}
    if not spec.num_fewshot:
        # Examples that nobody will draw from need not be read and processed.
        overrides["fewshot_docs"] = lambda _: None
    try:
        task = type("Task", (ConfigurableTask,), overrides)(config=config)
    except KeyError as error:
        # A function of the task (lm-eval tries it on the first document) looked for a field.
        if path is None:
            raise
        raise ValueError(f"{path}: the task {spec.name!r} needs the field {error.args[0]!r}") from error
    if datasets.config.HF_HUB_OFFLINE and hub is not None:
        require_commit(task.dataset, hub.hub, hub.revision)
    task.set_config("num_fewshot", spec.num_fewshot)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return task


def _local_data(spec: EvalSpec, config: dict[str, Any], path: Path) -> Any:
    """{split: rows} for every split that the task names: all the same rows, processed, and ``config`` freed of its
    process_docs.
    """
    evaluated = config.get("test_split") or config.get("validation_split")
    fewshot = config.get("fewshot_config") or {}
    examples = config.get("fewshot_split") or fewshot.get("split") or config.get("training_split") or evaluated
    if spec.num_fewshot and examples != evaluated and "samples" not in fewshot:
        lacks = f"the examples of {spec.name!r} come from the split {examples!r}, and {path} has {evaluated!r} only"
        allowed = f"0 with a local file: {lacks}"
        raise SpecError("eval.num_fewshot", spec.num_fewshot, allowed)
    rows: list[dict[str, Any]] = []
    for number, row in read_jsonl(path):
        rows.append(row)
        if missing := sorted(rows[0].keys() - row.keys()):
            raise ValueError(f"{path}, line {number}: no field {missing[0]!r}, which the first line has")
    if not rows:
        raise ValueError(f"{path}: no documents for the task {spec.name!r}")
    data = _processed(spec, config, path, rows)
    config["process_docs"] = None
    splits = {config.get(key) for key in SPLITS} | {examples}
    return dict.fromkeys(filter(None, splits), data)


def _processed(spec: EvalSpec, config: dict[str, Any], path: Path, rows: list[dict[str, Any]]) -> Any:
    data = datasets.Dataset.from_list(rows)
    process = config.get("process_docs")
    missing_input = None
    if process is not None:
        try:
            data = process(data)
        except KeyError as error:
            # Rows without what process_docs reads: already processed, if they have what the templates read.
            missing_input = str(error.args[0])
            names = {new: old for new, old in PREPROCESSED_NAMES.items() if new not in rows[0] and old in rows[0]}
            data = datasets.Dataset.from_list(
                [{**row, **{new: row.get(old) for new, old in names.items()}} for row in rows]
            )
    missing = [field for field in _fields(config) if field not in data.column_names]
    if missing:
        either = f" (or {missing_input!r}, to be processed)" if missing_input else ""
        present = ", ".join(rows[0])
        raise ValueError(
            f"{path}: the task {spec.name!r} needs the field {missing[0]!r}{either}; fields present: {present}"
        )
    return data


def _fields(config: dict[str, Any]) -> list[str]:
    """Fields of a document that the task's templates read. A lone name is a field, as lm-eval takes it; functions can't
    be looked into.
    """
    fields: dict[str, None] = {}
    for key in ("doc_to_text", "doc_to_choice", "doc_to_target"):
        template = config.get(key)
        if not isinstance(template, str):
            continue
        if re.fullmatch(r"[A-Za-z_]\w*", template):
            fields[template] = None
        else:
            fields.update(dict.fromkeys(sorted(meta.find_undeclared_variables(env.parse(template)))))
    return list(fields)
