"""What a user's own lm-eval task is made of: the files that can decide its requests, and one hash of them.

These are the task's YAML file, what it includes, the Python files of its ``!function`` values, and files near any of
these that its text can lead to. A YAML file leads to the files whose names it has. A Python file also leads to modules
whose name it has, to files of a kind whose suffix it has (``f"{language}.json"``), and, where it lists directories or
imports by computed names, to all files in and below its own directory. So another task, or a note, in the same
directory changes nothing. lm-eval's files and this project's own are not looked into: their version says what they are.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.machinery import PathFinder
from pathlib import Path, PurePath
from typing import Final

import yaml

from sweeps.errors import TaskError
from sweeps.files import JsonObject
from sweeps.provenance import ROOT
from sweeps.study.hashes import file_hash, tree_hash
from sweeps.study.task_index import load_task_yaml

_SEARCHED_BYTES: Final = 4 << 20
"""Larger files are data, in which no names of files are looked for."""
_BY_COMPUTED_NAME: Final = re.compile(
    rb"\b(iterdir|listdir|scandir|walk|r?glob|import_module|__import__|spec_from_file_location|run_path|exec)\b"
)


@dataclass(frozen=True, kw_only=True)
class Definition:
    """The files of a task's definition.

    Attributes:
        file: the task's YAML file, without symbolic links.
        relative: files that are found from it by relative names: where each is by its name, and where it really is.
            The two differ where an include goes through a symbolic link.
        fixed: files that are found by absolute names, or as installed modules.
    """

    file: Path
    relative: Mapping[Path, Path]
    fixed: Mapping[Path, Path]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of names and contents, 64 hexadecimal digits; the same wherever the directory lies.

        Raises:
            TaskError: a file can't be read.
        """
        names = {os.path.relpath(place, self.file.parent): file for place, file in self.relative.items()}
        names |= {str(place): file for place, file in self.fixed.items()}
        return tree_hash({name: _hash(file).encode() for name, file in names.items()})


def is_own(file: Path) -> bool:
    """Tell whether a task's file is a user's own: neither of lm-eval nor embedded here."""
    return not is_of_lm_eval(file) and not file.resolve().is_relative_to(ROOT / "sweeps")


def is_of_lm_eval(file: Path) -> bool:
    """Tell whether a file is of the lm-eval that is installed, without importing it."""
    package = importlib.util.find_spec("lm_eval")
    roots = (package and package.submodule_search_locations) or []
    return any(file.resolve().is_relative_to(Path(root).resolve()) for root in roots)


def definition_of(file: Path) -> Definition:
    """Find the files of a task's definition, with no import of any.

    Raises:
        TaskError: a file can't be read, or two would take one place through symbolic links.
    """
    file = file.resolve()
    found = _Files(documents=frozenset(path.resolve() for path in task_data_files(load_task_yaml(file))))
    try:
        found.add_yaml(file, file)
        found.follow()
    except OSError as error:
        raise TaskError(f"{file}: its definition can't be read: {error.filename}: {error.strerror}") from error
    fixed = {place: path for place, path in found.files.items() if place in found.fixed}
    return Definition(file=file, relative={p: f for p, f in found.files.items() if p not in fixed}, fixed=fixed)


def task_data_files(config: JsonObject) -> list[Path]:
    """List the local files that a task of the user's own reads by itself (``dataset_kwargs.data_files``), in order."""
    named = (config.get("dataset_kwargs") or {}).get("data_files")
    values = named.values() if isinstance(named, Mapping) else [named]
    return [Path(f) for value in values for f in (value if isinstance(value, list) else [value]) if f is not None]


@dataclass(kw_only=True)
class _Files:
    """Files of a definition as they are found: the real file by its place.

    Attributes:
        documents: data files of the task, which have an identity of their own.
        fixed: the places that are found by absolute names.
    """

    documents: frozenset[Path]
    files: dict[Path, Path] = field(default_factory=dict)
    fixed: set[Path] = field(default_factory=set)
    _near: dict[tuple[Path, bool], list[PurePath]] = field(default_factory=dict)

    def add(self, file: Path, place: Path, *, fixed: bool) -> bool:
        """Add a file; tell whether its place is new."""
        known = self.files.setdefault(place, file)
        if known != file and _hash(known) != _hash(file):
            raise TaskError(f"{file} can't be used: through a symbolic link it takes the place of another {place.name}")
        if fixed:
            self.fixed.add(place)
        return known is file

    def add_yaml(self, file: Path, place: Path, *, fixed: bool = False) -> None:
        """Add a task's YAML file, what it includes and the modules of its functions.

        lm-eval looks for both from where a file really is.
        """
        if not self.add(file, place, fixed=fixed):
            return
        text = file.read_bytes()
        for module in _modules(text):
            beside = module.replace(".", "/") + ".py"
            if (file.parent / beside).is_file():
                self.add(file.parent / beside, Path(os.path.normpath(place.parent / beside)), fixed=fixed)
            elif (installed := _installed(module)) is not None:
                self.add(installed, installed, fixed=True)
        for include in _includes(text):
            other = (file.parent / include).resolve()
            if Path(include).is_absolute():
                if not is_of_lm_eval(other):
                    self.add_yaml(other, Path(os.path.normpath(include)), fixed=True)
            else:
                self.add_yaml(other, Path(os.path.normpath(place.parent / include)), fixed=fixed)

    def follow(self) -> None:
        """Add what the files that are there lead to."""
        pending = list(self.files)
        while pending:
            place = pending.pop()
            file = self.files[place]
            if file.stat().st_size > _SEARCHED_BYTES:
                continue
            text = file.read_bytes()
            for name in self._names_near(file):
                other, at = file.parent / name, place.parent / name
                if not _leads_to(file, text, name) or other.resolve() in self.documents:
                    continue
                if self.add(other, at, fixed=place in self.fixed):
                    pending.append(at)

    def _names_near(self, file: Path) -> list[PurePath]:
        """Return the files in a file's directory, and for a Python file below it too, relative to the directory."""
        key = (file.parent, file.suffix == ".py")
        if key not in self._near:
            self._near[key] = list(_names(*key))
        return self._near[key]


def _names(root: Path, below: bool) -> Iterator[PurePath]:
    for directory, subdirs, names in os.walk(root):
        subdirs[:] = sorted(d for d in subdirs if below and not d.startswith(".") and d != "__pycache__")
        for name in sorted(names):
            path = Path(directory, name)
            if not name.startswith(".") and path.suffix != ".pyc" and path.is_file():
                yield path.relative_to(root)


def _leads_to(file: Path, text: bytes, name: PurePath) -> bool:
    if os.fsencode(name.name) in text:
        return True
    if file.suffix != ".py":
        return False
    if _BY_COMPUTED_NAME.search(text):
        return True
    if name.suffix == ".py":
        module = name.parent.name if name.name == "__init__.py" else name.stem
        return module != "" and re.search(rb"\b%s\b" % re.escape(os.fsencode(module)), text) is not None
    return name.suffix != "" and os.fsencode(name.suffix) in text


def _installed(module: str) -> Path | None:
    """Return the file of an importable module, looked up without importing its packages; None where there is none.

    Modules of Python itself and of lm-eval are no part of a definition.
    """
    if module.partition(".")[0] in sys.stdlib_module_names:
        return None
    path: list[str] | None = None
    file: Path | None = None
    for count in range(1, module.count(".") + 2):
        name = ".".join(module.split(".")[:count])
        # Looking up what is below a package would import it otherwise.
        spec = importlib.util.find_spec(name) if path is None else PathFinder.find_spec(name, path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
        file = Path(spec.origin).resolve() if spec.origin else None
    return None if file is None or file.suffix != ".py" or is_of_lm_eval(file) else file


def _hash(file: Path) -> str:
    try:
        return file_hash(file)
    except OSError as error:
        raise TaskError(f"{file}, part of a task's definition, can't be read: {error.strerror}") from error


def _includes(text: bytes) -> list[str]:
    """Return the file names under a YAML's top-level ``include``, one or a list."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    for key, value in pairs:
        if key.value == "include":
            items = value.value if isinstance(value, yaml.SequenceNode) else [value]
            return [str(item.value) for item in items if item.value]
    return []


def _modules(text: bytes) -> Iterator[str]:
    """Yield the modules of a YAML's ``!function module.name`` values."""
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.ScalarEvent) and event.tag == "!function":
            module = event.value.rpartition(".")[0]
            if module:
                yield module
