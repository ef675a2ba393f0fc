"""Find lm-eval's task definitions without importing lm-eval, whose import loads torch and takes 15 s.

A task is a YAML file that names itself at the start of a line (``task: piqa``); lm-eval 0.4.13 has 13,000 of them. They
are found by that line, and only the file wanted is parsed, with what it includes.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from sweeps.errors import TaskError, did_you_mean

_NAMED: Final = re.compile(rb"^[\"']?(task|group)[\"']?[ \t]*:[ \t]*[\"']?([^\s\"'#\[]+)", re.MULTILINE)
_IGNORED_DIRS: Final = frozenset({"__pycache__", ".ipynb_checkpoints"})
_NO_VERSION: Final = "Yaml"
"""The version that lm-eval itself reports for a task without ``metadata.version``."""
_NAME: Final = re.compile(r"[^\s/\\]+")
_SHOWN: Final = 5


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """An lm-eval task, as planning needs it.

    Attributes:
        name: the task's name.
        file: the YAML file that defines it.
        version: ``metadata.version`` as text, or 'Yaml' as lm-eval reports where there is none.
        dataset_path, dataset_name: its data on the hub (or a packaged loader such as 'json') and their configuration;
            None for a task that makes its own documents.
        split: what it is evaluated on: the test split, or the validation split where there is no test split.
        output_type: 'loglikelihood', 'multiple_choice', 'loglikelihood_rolling' or 'generate_until'.
        dataset_kwargs: further arguments of ``datasets.load_dataset`` (data_files, revision, ...).
    """

    name: str
    file: Path
    version: str
    dataset_path: str | None
    dataset_name: str | None
    split: str | None
    output_type: str
    dataset_kwargs: Mapping[str, Any] = field(default_factory=dict)


def find_task(name: str, extra_dirs: Iterable[str | Path] = ()) -> TaskEntry:
    """Find the definition of the task ``name``: the user's own directories first (the last one wins), then lm-eval's.

    Raises:
        TaskError: no such task (the message has near matches), a group or tag (the message names its tasks), a task
            that is a Python class, a file that can't be read; a directory that does not exist; no lm-eval.
    """
    if not _NAME.fullmatch(name):
        raise TaskError(f"eval.tasks: {name!r} is no task of lm-eval: give a task's name, e.g. piqa")
    own = [Path(d).expanduser() for d in extra_dirs]
    for directory in own:
        if not directory.is_dir():
            raise TaskError(f"eval.task_dirs={str(directory)!r} is not valid: there is no such directory")
    theirs = _lm_eval_tasks()
    roots = [*reversed(own), theirs]
    for directory in [*reversed(own), *_likely_dirs(name, theirs), theirs]:
        file = next((f for f, text in _yaml_files(directory, name) if (b"task", name.encode()) in _names(text)), None)
        if file is not None:
            return _entry(name, file)
    raise TaskError(_why_not(name, roots))


def load_task_yaml(file: Path) -> dict[str, Any]:
    """Load a task's YAML with its includes merged (the file's own keys win) and ``!function`` values left as text.

    Raises:
        TaskError: the file or one that it includes can't be read, or they include each other.
    """
    return _load(file.resolve(), ())


def _lm_eval_tasks() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise TaskError("eval.tasks needs lm-eval, which is not installed: pip install 'lm-eval>=0.4.9'")
    return Path(next(iter(spec.submodule_search_locations))) / "tasks"


def _likely_dirs(name: str, root: Path) -> Iterator[Path]:
    # Most tasks lie in a directory of their own name or of its first words (tasks/piqa, tasks/mmlu for mmlu_anatomy):
    # looking there first saves reading 14,000 files.
    words = name.split("_")
    for count in range(len(words), 0, -1):
        directory = root / "_".join(words[:count])
        if directory.is_dir():
            yield directory


def _yaml_files(root: Path, likely: str = "") -> Iterator[tuple[Path, bytes]]:
    """Yield every YAML file under ``root`` with its text, those with ``likely`` in their path first."""
    files: list[str] = []
    for directory, subdirs, names in os.walk(root):
        subdirs[:] = [d for d in subdirs if d not in _IGNORED_DIRS]
        files += [f"{directory}/{n}" for n in names if n.endswith(".yaml")]
    for file in sorted(files, key=lambda f: (likely not in f, f)):
        try:
            with open(file, "rb") as stream:
                text = stream.read()
        except FileNotFoundError:
            continue  # removed since it was listed
        yield Path(file), text


def _names(text: bytes) -> list[tuple[bytes, bytes]]:
    return _NAMED.findall(text)


def _entry(name: str, file: Path) -> TaskEntry:
    config = load_task_yaml(file)
    if "class" in config:
        raise TaskError(
            f"eval.tasks: {name!r} is a Python class ({file.name}), so what data it uses isn't known before it runs. "
            "Only tasks defined in YAML can be used"
        )
    metadata = config.get("metadata")
    version = metadata.get("version") if isinstance(metadata, Mapping) else None
    kwargs = config.get("dataset_kwargs") or {}
    return TaskEntry(
        name=name,
        file=file,
        version=_NO_VERSION if version is None else str(version),
        dataset_path=config.get("dataset_path"),
        dataset_name=config.get("dataset_name"),
        split=config.get("test_split") or config.get("validation_split"),
        output_type=config.get("output_type") or "generate_until",
        # Code from a dataset's repository is never run, whatever a task asks for.
        dataset_kwargs={k: v for k, v in kwargs.items() if k != "trust_remote_code"},
    )


def _why_not(name: str, roots: Iterable[Path]) -> str:
    texts = [found for root in roots for found in _yaml_files(root)]
    known = [(kind.decode(), n.decode(errors="replace"), file) for file, text in texts for kind, n in _names(text)]
    group = next((file for kind, n, file in known if (kind, n) == ("group", name)), None)
    if group is not None:
        return _is_group("group", name, _members(load_task_yaml(group).get("task")))
    has_tag = _tag_pattern(name)
    tagged = {file for file, text in texts if has_tag.search(text)}
    if tagged:
        return _is_group("tag", name, [n for kind, n, file in known if kind == "task" and file in tagged])
    hint = did_you_mean(name, [n for kind, n, _ in known if kind == "task"])
    return (
        f"eval.tasks: {name!r} is no task of lm-eval.{hint} "
        "`lm-eval ls tasks` lists them; eval.task_dirs=[DIR] adds your own"
    )


def _tag_pattern(name: str) -> re.Pattern[bytes]:
    """Matches a YAML that names the tag, alone or in a list. A pattern, since parsing a big tag's files takes 15 s."""
    item = rb"[\"']?%s[\"']?[ \t]*" % re.escape(name.encode())
    return re.compile(
        rb"^[\"']?tag[\"']?[ \t]*:[ \t]*(%s$|\[(.*,)?[ \t]*%s[,\]]|\n([ \t]*-.*\n)*?[ \t]*-[ \t]*%s$)"
        % (item, item, item),
        re.MULTILINE,
    )


def _members(value: object) -> list[str]:
    """Return the names in a group's ``task``: one, or a list of names and of mappings with a name."""
    items = value if isinstance(value, list) else [value]
    names = [item.get("task") or item.get("group") if isinstance(item, Mapping) else item for item in items]
    return [str(n) for n in names if n]


def _is_group(kind: str, name: str, members: list[str]) -> str:
    more = f" and {len(members) - _SHOWN} more" if len(members) > _SHOWN else ""
    return (
        f"eval.tasks: {name!r} is a {kind} of tasks, which has no single result. "
        f"Name its tasks: {', '.join(members[:_SHOWN])}{more}"
    )


class _Loader(yaml.SafeLoader):
    """Safe YAML that takes lm-eval's own tags, such as ``!function utils.f``, as text."""


def _as_text(_loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> str:
    return f"{suffix} {node.value}"


_Loader.add_multi_constructor("!", _as_text)


def _load(file: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    if file in parents:
        raise TaskError(f"{file}: includes itself through {' -> '.join(p.name for p in (*parents, file))}")
    try:
        config = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        included_by = f", which {parents[-1]} includes," if parents else ""
        raise TaskError(f"{file}{included_by} can't be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TaskError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise TaskError(f"{file} is no task definition: expected keys and values, not a {type(config).__name__}")
    includes = config.pop("include", None) or []
    merged: dict[str, Any] = {}
    for include in includes if isinstance(includes, list) else [includes]:
        inherited = _load((file.parent / str(include)).resolve(), (*parents, file))
        inherited.pop("task_list", None)
        merged |= inherited
    return merged | config
