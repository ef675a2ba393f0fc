"""Freeze what jobs run at launch: the code, the user's own task definitions, and the data.

    OUT/code/HASH/           this installation's sources: a queued job imports them, whatever is edited meanwhile
    OUT/code/tasks-HASH/     task definitions of the user's own, with what they include and use

Both are named by their content, so that a second launch reuses them. Data files stay where they are; a worker refuses
those that have changed.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from kbit.evaluation.spec import EvalSpec
from kbit.sources import LocalFile, NamedFiles, Source, TaskSource, documents_of
from sweeps.errors import CodeChangedError, DataChangedError, TaskError
from sweeps.files import make_directory, share_with_group
from sweeps.provenance import ROOT
from sweeps.study.definitions import definition_of, is_of_lm_eval, task_data_files
from sweeps.study.hashes import file_hash, tree_hash
from sweeps.study.task_index import load_task_yaml

PACKAGES: Final = ("kbit", "sweeps")
"""What a job imports. conf is frozen in the manifest and analysis runs where results are read: editing them while jobs
wait is harmless, and must not make a job refuse."""
CODE_SUFFIXES: Final = (".py", ".yaml", ".cu", ".cuh")
_NAME_DIGITS: Final = 16


def code_hash() -> str:
    """SHA-256 over the sources of this installation that a job may run: relative paths and bytes."""
    return tree_hash(_sources(ROOT))


def snapshot_code(out: Path) -> Path:
    """Copy the sources to OUT/code/HASH (the first 16 digits of ``code_hash``) and return that directory.

    On disk and whole when this returns; launches at the same time share one copy.

    Raises:
        CodeChangedError: the copy is there already and has been edited since.
        OSError: it can't be written.
    """
    sources = _sources(ROOT)
    return _place(out / "code" / tree_hash(sources)[:_NAME_DIGITS], sources)


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

    Copied is what makes up their identity (``sweeps.study.definitions``), but for files that they name by absolute
    paths; a worker refuses those that have changed. Measurement keys don't change.

    Raises:
        CodeChangedError: the copy is there already and has been edited since.
        UserError: a definition that can't be copied so that it means the same.
        OSError: a file can't be read or written.
    """
    return tuple(_freeze(spec, out) for spec in evals)


def check_eval(spec: EvalSpec) -> None:
    """Refuse an evaluation whose local data, or whose task's own definition, changed since the launch.

    Raises:
        DataChangedError: as ``check_data``; or a file of the definition is another, or can't be read.
    """
    what = f"eval {spec.name}"
    if spec.definition is not None and isinstance(spec.source, TaskSource):
        file = Path(spec.source.task_file)
        try:
            found = definition_of(file).hash
        except TaskError as error:
            raise DataChangedError(
                f"{what}: its definition can't be read on {socket.gethostname()} ({error}): restore what was there, "
                "and launch the study again"
            ) from error
        if found != spec.definition:
            raise DataChangedError(
                f"{what}: its definition ({file}, or a file that belongs to it) changed since the study was "
                "launched: restore what was there, or launch the study again to measure what is there now"
            )
    check_data(what, spec.source)


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
    if not isinstance(spec.source, TaskSource) or is_of_lm_eval(Path(spec.source.task_file)):
        return spec
    found = definition_of(Path(spec.source.task_file))
    # Files keep their places relative to each other: includes and functions are found by them.
    base = Path(os.path.commonpath([p.parent for p in found.relative]))
    files = {p.relative_to(base).as_posix(): file.read_bytes() for p, file in found.relative.items()}
    target = _place(out / "code" / f"tasks-{tree_hash(files)[:_NAME_DIGITS]}", files)
    return replace(spec, source=replace(spec.source, task_file=str(target / found.file.relative_to(base))))
