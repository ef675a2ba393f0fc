"""Freeze what jobs run at launch: the code, the user's own task definitions, and the data.

    OUT/code/HASH/           this installation's sources: a queued job imports them, whatever is edited meanwhile
    OUT/code/tasks-HASH/     task definitions of the user's own, with what they include and use

Both are named by their content, so that a second launch reuses them. Data files stay where they are; a worker refuses
those that have changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import yaml

from kbit.evaluation.spec import EvalSpec
from kbit.sources import LocalFile, NamedFiles, Source, TaskSource, documents_of
from sweeps.errors import CodeChangedError, DataChangedError, TaskError
from sweeps.files import make_directory, share_with_group
from sweeps.provenance import ROOT
from sweeps.study.hashes import file_hash
from sweeps.study.task_index import load_task_yaml

PACKAGES: Final = ("kbit", "sweeps")
"""What a job imports. conf is frozen in the manifest and analysis runs where results are read: editing them while jobs
wait is harmless, and must not make a job refuse."""
CODE_SUFFIXES: Final = (".py", ".yaml", ".cu", ".cuh")
TASK_SUFFIXES: Final = (".py", ".yaml", ".yml")
_NAME_DIGITS: Final = 16


def code_hash() -> str:
    """SHA-256 over the sources of this installation that a job may run: relative paths and bytes."""
    return _hash(_sources(ROOT))


def snapshot_code(out: Path) -> Path:
    """Copy the sources to OUT/code/HASH (the first 16 digits of ``code_hash``) and return that directory.

    On disk and whole when this returns; launches at the same time share one copy.

    Raises:
        CodeChangedError: the copy is there already and has been edited since.
        OSError: it can't be written.
    """
    sources = _sources(ROOT)
    return _place(out / "code" / _hash(sources)[:_NAME_DIGITS], sources)


def snapshot_path(out: Path) -> Path:
    """Return where ``snapshot_code`` would put this code, without writing anything."""
    return out / "code" / code_hash()[:_NAME_DIGITS]


def job_setup(code: Path) -> list[str]:
    """Shell lines (bash) after which Python imports this project from ``code``, wherever it is started."""
    # `python -m` looks into the working directory first, which for a job is the checkout that it was submitted from.
    # So does an empty entry of PYTHONPATH, which `module load` likes to leave.
    path = f'{shlex.quote(str(code))}:"${{PYTHONPATH:-}}"'
    return [f"export PYTHONPATH=$(sed -E 's/:+/:/g; s/:$//' <<<{path})", "export PYTHONSAFEPATH=1"]


def check_code(expected_hash: str) -> None:
    """Refuse to run code that is not what was launched.

    Args:
        expected_hash: its ``code_hash``, or that hash's beginning, which a snapshot is named by.

    Raises:
        CodeChangedError: this installation's ``code_hash`` is another than ``expected_hash``.
    """
    actual = code_hash()
    if not actual.startswith(expected_hash):
        raise CodeChangedError(
            f"the code in {ROOT} has changed since the study was launched ({expected_hash[:12]} then, "
            f"{actual[:12]} now). Launch the study again to run what is there now; with executor.code=snapshot edits "
            "don't reach queued jobs"
        )


def freeze_evals(evals: Sequence[EvalSpec], out: Path) -> tuple[EvalSpec, ...]:
    """Copy task definitions that are not lm-eval's own to OUT/code/tasks-HASH, and return evaluations that name those.

    Copied are the YAML file, what it includes, the Python files that it names, and all YAML and Python files next to
    any of these; other files that a Python file opens by itself are not. Measurement keys don't change.

    Raises:
        CodeChangedError: the copy is there already and has been edited since.
        UserError: a definition that can't be copied so that it means the same.
        OSError: a file can't be read or written.
    """
    return tuple(_freeze(spec, out) for spec in evals)


def check_data(what: str, source: Source | None) -> None:
    """Refuse local data that changed since the launch: their numbers would go by another's name.

    Data of the hub are of a commit, which reading them checks. Hashes of large files are remembered.

    Args:
        what: that reads them, for messages: 'eval piqa'.
        source: where they are.

    Raises:
        DataChangedError: a file can't be read, or its contents are others.
    """
    documents = documents_of(source)
    if isinstance(documents, LocalFile) and documents.sha256 is not None:
        files = [Path(documents.path)]
    elif isinstance(documents, NamedFiles) and isinstance(source, TaskSource):
        files = task_data_files(load_task_yaml(Path(source.task_file)))
    else:
        return
    hashes = []
    for file in files:
        try:
            hashes.append(file_hash(file))
        except OSError as error:
            raise DataChangedError(
                f"{what}: {file} can't be read on {socket.gethostname()} ({error.strerror}): put it where "
                "every node sees it, and launch the study again"
            ) from error
    one = isinstance(documents, LocalFile)
    actual = hashes[0] if one else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    if actual != documents.sha256:
        raise DataChangedError(
            f"{what}: {', '.join(map(str, files))} changed since the study was launched: restore what was "
            "there, or launch the study again to measure on what is there now"
        )


def task_data_files(config: Mapping[str, Any]) -> list[Path]:
    """List the local files that a task of the user's own reads by itself (``dataset_kwargs.data_files``), in order."""
    named = (config.get("dataset_kwargs") or {}).get("data_files")
    values = named.values() if isinstance(named, Mapping) else [named]
    return [Path(f) for value in values for f in (value if isinstance(value, list) else [value]) if f is not None]


def _sources(root: Path) -> dict[str, bytes]:
    """Contents by path relative to ``root``."""
    found: dict[str, bytes] = {}
    for package in PACKAGES:
        for directory, subdirs, names in os.walk(root / package):
            subdirs[:] = [d for d in subdirs if d != "__pycache__" and not d.startswith(".")]
            for name in names:
                # An editor's lock or backup file is no source, and may vanish as we look.
                if name.endswith(CODE_SUFFIXES) and not name.startswith("."):
                    path = Path(directory, name)
                    found[path.relative_to(root).as_posix()] = path.read_bytes()
    return found


def _hash(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def _place(target: Path, files: Mapping[str, bytes]) -> Path:
    """Make ``target`` a directory of these files: whole or absent, whatever happens, and on disk on return."""
    if not target.is_dir():
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            _write_tree(temporary, files)
            try:
                temporary.rename(target)
            except OSError:
                # Another launch was faster; a directory of files is never replaced.
                if not target.is_dir():
                    raise
            _sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    for name, data in files.items():
        copy = target / name
        if not copy.is_file() or copy.read_bytes() != data:
            raise CodeChangedError(
                f"{copy} was edited or removed since it was copied there; queued jobs may run it. "
                f"Cancel them, remove {target} and launch again"
            )
    return target


def _write_tree(directory: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        path = directory / name
        make_directory(path.parent)
        with path.open("wb") as stream:
            stream.write(data)
            stream.flush()
            share_with_group(path)
            os.fsync(stream.fileno())
    for path in [directory, *(p for p in directory.rglob("*") if p.is_dir())]:
        _sync(path)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _freeze(spec: EvalSpec, out: Path) -> EvalSpec:
    if not isinstance(spec.source, TaskSource):
        return spec
    file = Path(spec.source.task_file).resolve()
    if _is_of_lm_eval(file):
        return spec
    found: dict[Path, bytes] = {}
    _collect(file, file, found, set())
    # Files keep their places relative to each other: includes and functions are found by them.
    base = Path(os.path.commonpath([p.parent for p in found]))
    files = {p.relative_to(base).as_posix(): data for p, data in found.items()}
    target = _place(out / "code" / f"tasks-{_hash(files)[:_NAME_DIGITS]}", files)
    return replace(spec, source=replace(spec.source, task_file=str(target / file.relative_to(base))))


def _is_of_lm_eval(file: Path) -> bool:
    # Finds the package without importing it.
    package = importlib.util.find_spec("lm_eval")
    roots = (package and package.submodule_search_locations) or []
    return any(file.is_relative_to(Path(root).resolve()) for root in roots)


def _collect(file: Path, place: Path, found: dict[Path, bytes], seen: set[Path]) -> None:
    """Add a task's YAML file, what it needs and the files next to it.

    Args:
        file: where it is, without symbolic links: lm-eval looks for includes and functions from there.
        place: where it is by its name; differs from ``file`` where an include goes through a symbolic link.
        found: contents by place; added to.
        seen: places of the YAML files that were followed.
    """
    if place in seen:
        return
    seen.add(place)
    text = _add(file, place, found)
    beside = [p.name for p in sorted(file.parent.iterdir()) if p.suffix in TASK_SUFFIXES and p.is_file()]
    for name in [*beside, *_modules(text)]:
        # Functions of no file next to it are of an installed module.
        if (file.parent / name).is_file():
            _add(file.parent / name, place.parent / name, found)
    for include in _includes(text):
        if Path(include).is_absolute():
            if _is_of_lm_eval(Path(include).resolve()):
                continue
            raise TaskError(
                f"{file} includes {include!r}, an absolute path, so a copy of it would follow later edits: "
                "name it relative to the file"
            )
        resolved = (file.parent / include).resolve()
        _collect(resolved, Path(os.path.normpath(place.parent / include)), found, seen)


def _add(file: Path, place: Path, found: dict[Path, bytes]) -> bytes:
    data = file.read_bytes()
    if found.setdefault(place, data) != data:
        raise TaskError(f"{file} can't be copied: through a symbolic link it takes the place of another {place.name}")
    return data


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
    """Files, relative to the YAML, of the modules in its ``!function module.name`` values."""
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.ScalarEvent) and event.tag == "!function":
            yield event.value.rpartition(".")[0].replace(".", "/") + ".py"
