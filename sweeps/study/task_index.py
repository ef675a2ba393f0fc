"""Find lm-eval's task definitions without importing lm-eval, whose import loads torch and takes 15 s.

A task is a YAML file that names itself at the start of a line (``task: piqa``); lm-eval 0.4.13 has 13,000 of them. They
are found by that line, and only the file wanted is parsed, with what it includes.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from sweeps.errors import TaskError, did_you_mean
from sweeps.files import JsonObject

_NAMED: Final = re.compile(rb"^[\"']?(task|group)[\"']?[ \t]*:[ \t]*[\"']?([^\s\"'#\[]+)", re.MULTILINE)
_TAG: Final = re.compile(rb"^[\"']?tag[\"']?[ \t]*:", re.MULTILINE)
_INCLUDE: Final = re.compile(
    rb"^[\"']?include[\"']?[ \t]*:[ \t]*((?:[^\s#][^\n#]*)|(?:\n[ \t]*-[^\n]*)+)", re.MULTILINE
)
_IGNORED_DIRS: Final = frozenset({"__pycache__", ".ipynb_checkpoints"})
_NO_VERSION: Final = "Yaml"
"""The version that lm-eval itself reports for a task without ``metadata.version``."""
_NAME: Final = re.compile(r"[^\s/\\]+")
_DISPLAYED: Final = ("group", "task_alias", "group_alias", "weight_by_size", "aggregate_metric_list", "metadata")
"""What a group may say of a member without changing what is measured."""


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
    dataset_kwargs: JsonObject = field(default_factory=dict)


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
    for directory in [*reversed(own), *_likely_dirs(name, theirs)]:
        file = _task_file(name, _yaml_files(directory, name))
        if file is not None:
            return _entry(name, file)
    file = _task_file(name, sorted(_installed_files(theirs), key=lambda found: name not in str(found[0])))
    if file is not None:
        return _entry(name, file)
    raise TaskError(_Index.of(own, theirs).why_not(name))


def tasks_of(name: str, extra_dirs: Iterable[str | Path] = ()) -> tuple[str, ...]:
    """Return the tasks of a group or tag, each once, in the order of their names; of anything else, its own name.

    Raises:
        TaskError: a group changes settings of its tasks, which have no name then; a file that can't be read.
    """
    own = [Path(d).expanduser() for d in extra_dirs]
    if not _NAME.fullmatch(name) or not all(directory.is_dir() for directory in own):
        return (name,)  # find_task says what is wrong
    theirs = _lm_eval_tasks()
    likely = [*reversed(own), *_likely_dirs(name, theirs)]
    if any(_task_file(name, _yaml_files(directory, name)) for directory in likely):
        return (name,)
    index = _Index.of(own, theirs)
    return tuple(dict.fromkeys(index.expand(name, ()))) or (name,)


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


@cache
def _installed_files(root: Path) -> Sequence[tuple[Path, bytes]]:
    """Return every YAML file of lm-eval's own, 7 MB: an unknown name is looked for in all of them up to three times."""
    return list(_yaml_files(root))


def _task_file(name: str, files: Iterable[tuple[Path, bytes]]) -> Path | None:
    """Return the first of the files that defines a task."""
    return next((f for f, text in files if (b"task", name.encode()) in _names(text)), None)


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


@dataclass(frozen=True, kw_only=True)
class _Index:
    """Every YAML file of some directories, and the names in them."""

    texts: Sequence[tuple[Path, bytes]]
    names: Sequence[tuple[str, str, Path]]

    @classmethod
    def of(cls, own: Sequence[Path], theirs: Path) -> _Index:
        """Read the user's own directories, of which the last one wins, and lm-eval's."""
        texts = [*(found for root in reversed(own) for found in _yaml_files(root)), *_installed_files(theirs)]
        names = [(kind.decode(), n.decode(errors="replace"), file) for file, text in texts for kind, n in _names(text)]
        return cls(texts=texts, names=names)

    def expand(self, name: str, parents: tuple[str, ...]) -> Iterator[str]:
        """Yield the tasks of a group or tag, or a task's own name; nothing where there is none of the name."""
        if name in parents:
            raise TaskError(f"eval.tasks: the group {name!r} contains itself through {' -> '.join(parents)}")
        kinds = {kind: file for kind, n, file in reversed(self.names) if n == name}
        if "group" in kinds and kinds["group"] != kinds.get("task"):
            for member in self._members(name, kinds["group"]):
                yield from self.expand(member, (*parents, name))
        elif "task" in kinds:
            yield name
        else:
            yield from sorted(self._tagged(name))

    def why_not(self, name: str) -> str:
        """Say that there is no such task, and what has nearly its name."""
        hint = did_you_mean(name, [n for _, n, _ in self.names])
        return (
            f"eval.tasks: {name!r} is no task of lm-eval.{hint} "
            "`lm-eval ls tasks` lists them; eval.task_dirs=[DIR] adds your own"
        )

    def _members(self, group: str, file: Path, task: object = None) -> list[str]:
        """Return the names in a group's ``task``: one, or a list of names and of mappings, which may hold groups."""
        value = load_task_yaml(file).get("task") if task is None else task
        names: list[str] = []
        for item in value if isinstance(value, list) else [value]:
            given = dict(item) if isinstance(item, Mapping) else {"task": item}
            member = given.pop("task", given.get("group"))
            settings = [key for key in given if key not in _DISPLAYED]
            if settings or not isinstance(member, str | list):
                raise TaskError(
                    f"eval.tasks: the group {group!r} ({file.name}) changes {', '.join(settings) or 'the members'} of "
                    f"its task {member!r}, so its tasks are not those of their names: name tasks instead"
                )
            names += self._members(group, file, member) if isinstance(member, list) else [member]
        return names

    def _tagged(self, tag: str) -> set[str]:
        """Return the tasks whose definition, or what it includes, has a tag."""
        texts, has_tag = dict(self.texts), _tag_pattern(tag)
        known: dict[Path, bool] = {}

        def carries(file: Path) -> bool:
            if file not in known:
                known[file] = False  # until it is known otherwise: files may include each other
                text = texts.get(file) or _read(file)
                own = _TAG.search(text) is not None
                known[file] = bool(has_tag.search(text)) if own else any(map(carries, _includes(file, text)))
            return known[file]

        return {n for kind, n, file in self.names if kind == "task" and carries(file)}


def _includes(file: Path, text: bytes) -> list[Path]:
    """Return the files that a definition includes, read without parsing it."""
    found = _INCLUDE.search(text)
    names = re.split(rb"[\s,\[\]\"']+|^-|\s-\s", found[1]) if found else []
    return [Path(os.path.normpath(file.parent / os.fsdecode(n))) for n in names if n not in (b"", b"-")]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""  # find_task says so of a task that is asked for


def _tag_pattern(name: str) -> re.Pattern[bytes]:
    """Matches a YAML that names the tag, alone or in a list. A pattern, since parsing a big tag's files takes 15 s."""
    item = rb"[\"']?%s[\"']?[ \t]*" % re.escape(name.encode())
    return re.compile(
        rb"^[\"']?tag[\"']?[ \t]*:[ \t]*(%s$|\[(.*,)?[ \t]*%s[,\]]|\n([ \t]*-.*\n)*?[ \t]*-[ \t]*%s$)"
        % (item, item, item),
        re.MULTILINE,
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
