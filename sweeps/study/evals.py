"""Resolve the configuration's ``eval`` to evaluations: find each name's data and what identifies them.

How data are found depends on what a kind reads (``Evaluator.data``), never on the kind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from kbit.calibration import Calibration
from kbit.compute_dtypes import COMPUTE_DTYPES
from kbit.errors import SpecError
from kbit.evaluation.documents import has_byte_order_mark
from kbit.evaluation.evaluators import EVALUATORS, Data
from kbit.evaluation.spec import EvalSpec
from kbit.sources import DEFAULT_FIELD, HubData, LocalFile, NamedFiles, Source, TaskSource, documents_of
from sweeps.errors import UserError, did_you_mean
from sweeps.files import JsonObject
from sweeps.study import hub, task_index
from sweeps.study.definitions import definition_of, is_own, task_data_files

AUTO_COMPUTE_DTYPE: Final = {"cpu": "float32", "cuda": "storage"}
"""16-bit arithmetic is slow, or missing, on a CPU."""
TEXT_SUFFIXES: Final = (".jsonl", ".txt")
TEXT_LINE: Final = '{"text": "..."} of a .jsonl file'
PACKAGED_LOADERS: Final = ("json", "csv", "parquet", "text", "arrow")
"""Names that `datasets` reads local files with, not of the hub."""
LISTS: Final = {"perplexity": "perplexity", "tasks": "task"}
"""Lists under ``eval`` with a kind of their own; names of every kind are in ``eval.kinds``."""


class Commits(Protocol):
    """Turns hub names into commits."""

    def commit(self, repo: str, revision: str, repo_type: str) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Found:
    """The data of one evaluation: their name, version (None: they have none) and place.

    Attributes:
        definition: hash of a task's definition, where it is the user's own.
    """

    name: str
    version: str | None
    source: Source | None
    definition: str | None = None


@dataclass(frozen=True, kw_only=True)
class Finder:
    """Finds data by the names that users give.

    Attributes:
        settings: the configuration's ``eval``, as plain values.
        data_dir: where local files take the place of the hub's.
        commits: of the hub.
    """

    settings: JsonObject
    data_dir: Path | None
    commits: Commits

    def text_set(self, name: str, key: str) -> Found:
        known = self.settings["sets"].get(name)
        if known is None:
            path = Path(name).expanduser()
            if path.suffix not in TEXT_SUFFIXES:
                hint = did_you_mean(name, self.settings["sets"])
                other = f" Write each document of {path.name} as a line {TEXT_LINE}." if path.is_file() else ""
                raise UserError(
                    f"{key}={name!r} is neither a known text set nor a .jsonl or .txt file.{hint}{other} "
                    f"Known: {', '.join(sorted(self.settings['sets']))}"
                )
            return Found(name=path.stem, version=None, source=_text_file(path, key, DEFAULT_FIELD))
        source: Source
        if known["path"]:
            source = _text_file(Path(known["path"]), f"eval.sets.{name}.path", known["field"])
        elif self.data_dir and known["local"]:
            self._check_there(name, self.data_dir / known["local"], key)
            source = _text_file(self.data_dir / known["local"], f"eval.data_dir (for {name})", known["field"])
        elif known["hub"]:
            commit = self.commits.commit(known["hub"], known["revision"], "dataset")
            chosen = {k: known[k] for k in ("config", "split", "field")}
            source = HubData(hub=known["hub"], revision=commit, **chosen)
        else:
            raise UserError(f"eval.sets.{name} is only available locally: give eval.data_dir=DIR with {known['local']}")
        return Found(name=name, version=None, source=source)

    def _check_there(self, name: str, file: Path, key: str) -> None:
        """Refuse a text set whose file is not in the data directory, and offer those that are."""
        if file.is_file():
            return
        asked = [str(n) for n in as_list(self.settings["perplexity"], "eval.perplexity")]
        local = {n: of["local"] for n, of in self.settings["sets"].items() if of["local"]}
        there = [n for n, of in local.items() if (file.parent / of).is_file()]
        left = [n for n in asked if n != name and n in there] or there
        offer = f", or measure what is there: 'eval.perplexity=[{','.join(left)}]'" if left else ""
        if key == "calibration.set":
            offer = _other_calibration(there, asked)
        without = offer or f", or leave it out: 'eval.perplexity=[{','.join(n for n in asked if n != name)}]'"
        raise UserError(
            f"{key}: eval.data_dir={str(file.parent)!r} has no {file.name} (for {name}): put it there{without}"
        )

    def members(self, names: Sequence[object]) -> list[str]:
        """Return tasks, with those of a group or tag in its place; a task that is also in a group counts once."""
        dirs = [Path(str(d)).expanduser() for d in as_list(self.settings["task_dirs"], "eval.task_dirs")]
        found = [(str(name), task_index.tasks_of(str(name), extra_dirs=dirs)) for name in names]
        grouped = {task for name, tasks in found if tasks != (name,) for task in tasks}
        single = [name for name, tasks in found if tasks == (name,) and name not in grouped]
        return [*single, *dict.fromkeys(t for name, tasks in found if tasks != (name,) for t in tasks)]

    def task(self, name: str, key: str) -> Found:
        dirs = [Path(str(d)).expanduser() for d in as_list(self.settings["task_dirs"], "eval.task_dirs")]
        entry = task_index.find_task(name, extra_dirs=dirs)
        file = self.settings["task_data"].get(name)
        documents: LocalFile | HubData | NamedFiles
        if file and (self.data_dir or Path(file).is_absolute()):
            documents = _rows((self.data_dir or Path()) / file, f"eval.data_dir (for {name})")
        elif self.data_dir and (self.data_dir / f"{name}.jsonl").is_file():
            documents = _rows(self.data_dir / f"{name}.jsonl", f"eval.data_dir (for {name})")
        elif entry.dataset_path in PACKAGED_LOADERS:
            documents = NamedFiles(sha256=_data_files_hash(entry))
        elif entry.dataset_path:
            kwargs = dict(entry.dataset_kwargs)
            commit = self.commits.commit(entry.dataset_path, str(kwargs.pop("revision", "main")), "dataset")
            documents = HubData(hub=entry.dataset_path, config=entry.dataset_name, revision=commit, kwargs=kwargs)
        else:
            raise UserError(f"{key}={name!r}: {entry.file} names no dataset; put {name}.jsonl into eval.data_dir")
        source = TaskSource(task_file=str(entry.file), documents=documents)
        # lm-eval's definitions have versions that are raised; a user's own are edited.
        own = definition_of(entry.file).hash if is_own(entry.file) else None
        return Found(name=name, version=str(entry.version), source=source, definition=own)

    def nothing(self, name: str, _key: str) -> Found:
        return Found(name=name, version=None, source=None)


FIND: Final[Mapping[Data, Callable[[Finder, str, str], Found]]] = {
    "text": Finder.text_set,
    "task": Finder.task,
    "none": Finder.nothing,
}


def _other_calibration(there: Sequence[str], tested: Sequence[str]) -> str:
    """Offer the text sets that are there to calibrate on, first those that no cell is tested on."""
    if not there:
        return ", or name a file"
    unseen, seen = [n for n in there if n not in tested], [n for n in there if n in tested]
    example = f", e.g. calibration.set={unseen[0]}" if unseen else ""
    too_low = f"; on {', '.join(seen)}, which eval.perplexity has, losses would be too low" if seen else ""
    return f", or name another (there are {', '.join([*unseen, *seen])}, or a file of yours){example}{too_low}"


def resolve_evals(
    settings: JsonObject, commits: Commits, device: str, device_name: Callable[[], str]
) -> list[EvalSpec]:
    """Resolve every evaluation that the configuration asks for.

    Args:
        settings: the configuration's ``eval``, as plain values.
        commits: resolves a revision of the hub.
        device: 'cpu' or 'cuda': what compute_dtype=auto stands for.
        device_name: asked where the device belongs to an evaluation's identity.

    Raises:
        UserError, SpecError, HubError: something in the configuration is wrong.
    """
    dtype = settings["compute_dtype"]
    if dtype == "auto":
        dtype = AUTO_COMPUTE_DTYPE[device]
    elif dtype not in COMPUTE_DTYPES:
        raise SpecError("eval.compute_dtype", dtype, "auto, or one of " + ", ".join(COMPUTE_DTYPES))
    finder = Finder(settings=settings, data_dir=_data_dir(settings["data_dir"]), commits=commits)
    asked = [(kind, f"eval.{key}", settings[key]) for key, kind in LISTS.items()]
    asked += [(str(kind), f"eval.kinds.{kind}", names) for kind, names in _kinds(settings["kinds"]).items()]
    evals = []
    for kind, key, names in asked:
        evaluator = EVALUATORS[kind]
        listed = as_list(names, key)
        if evaluator.of_methods and listed:
            raise UserError(
                f"{key}={listed} is not valid: methods ask for it themselves, on what they calibrate on "
                "(calibration.set): leave it out"
            )
        for name in finder.members(listed) if evaluator.data == "task" else listed:
            found = FIND[evaluator.data](finder, str(name), key)
            documents = documents_of(found.source)
            evals.append(
                EvalSpec(
                    kind=kind,
                    name=found.name + evaluator.suffix,
                    version=evaluator.version or found.version or "",
                    dataset="none" if documents is None else documents.identity,
                    compute_dtype=dtype,
                    device=device_name() if evaluator.identity_of_device else None,
                    definition=found.definition,
                    source=found.source,
                    **{field: settings[setting] for field, setting in evaluator.settings.items()},
                )
            )
    _check_names(evals)
    return evals


def resolve_calibrations(
    calibration: JsonObject, settings: JsonObject, commits: Commits, what: str
) -> tuple[Calibration, ...]:
    """Resolve the data of a method that calibrates, once for each seed.

    Args:
        calibration: the configuration's ``calibration``, as plain values.
        settings: its ``eval``: the text sets that have names.
        commits: of the hub.
        what: calibrates, as users write it: "method=gptq".

    Raises:
        UserError, SpecError, HubError: no data are named, or something else in the configuration is wrong.
    """
    given = dict(calibration)
    name = given.pop("set")
    if name is None:
        known = ", ".join(sorted(settings["sets"]))
        raise UserError(
            f"calibration.set=null is not valid with {what}, which calibrates: name a text set ({known}) or a "
            ".jsonl or .txt file"
        )
    finder = Finder(settings=settings, data_dir=_data_dir(settings["data_dir"]), commits=commits)
    found = finder.text_set(str(name), "calibration.set")
    documents = documents_of(found.source)
    assert documents is not None  # a text set is somewhere
    seeds = given.pop("seed")
    seeds = seeds if isinstance(seeds, list | tuple) else [seeds]
    if not seeds:
        raise UserError("calibration.seed=[] is not valid: a whole number, or a list of them, one for each replicate")
    about = {"name": found.name, "dataset": documents.identity, "source": found.source, **given}
    return tuple(Calibration(seed=seed, **about) for seed in seeds)


def _kinds(value: object) -> Mapping[str, object]:
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"eval.kinds={value!r} is not valid: names by kind, e.g. 'eval.kinds={{KIND: [jargon]}}'")
    return value or {}


def _check_names(evals: list[EvalSpec]) -> None:
    if not evals:
        raise UserError("eval: nothing to measure. Name text sets (eval.perplexity) or tasks (eval.tasks)")
    names = [e.name for e in evals]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UserError(f"eval: {', '.join(twice)} is named more than once; each evaluation needs a name of its own")


def as_list(value: object, key: str) -> list[object]:
    """Return a list, or take one value standing for a list of one; null is none."""
    if value is None:
        return []
    if isinstance(value, str | int):
        return [value]
    if isinstance(value, list | tuple):
        return list(value)
    raise UserError(f"{key}={value!r} is not valid: a name or a list, e.g. '{key}=[a,b]'")


def _data_dir(value: str | None) -> Path | None:
    if value is None:
        return None
    directory = Path(value).expanduser()
    if not directory.is_dir():
        raise UserError(f"eval.data_dir={value!r} is not a directory")
    return directory.absolute()


def _text_file(path: Path, key: str, field: str) -> LocalFile:
    if path.suffix not in TEXT_SUFFIXES:
        raise UserError(f"{key}={str(path)!r} is not a .jsonl or .txt file: write each document as a line {TEXT_LINE}")
    file = _file(path, key, field)
    hub.check_jsonl(Path(file.path), (field,))
    return file


def _rows(path: Path, key: str) -> LocalFile:
    file = _file(path, key)
    hub.check_jsonl(Path(file.path), ())
    return file


def _file(path: Path, key: str, field: str | None = None) -> LocalFile:
    if not path.is_file():
        raise UserError(f"{key}: {str(path)!r} is not a file")
    path = path.absolute()
    with path.open("rb") as file:
        documents = sum(1 for line in file if line.strip())
    # Size and documents are for predicting the cost.
    return LocalFile(
        path=str(path),
        sha256=hub.file_hash(path),
        bytes=path.stat().st_size,
        documents=documents,
        field=field,
        bom=has_byte_order_mark(path) or None,
    )


def _data_files_hash(entry: task_index.TaskEntry) -> str:
    """Hash the local files that a task of the user's own reads by itself (dataset_path: json and the like)."""
    files = task_data_files({"dataset_kwargs": entry.dataset_kwargs})
    if not files:
        raise UserError(f"{entry.file}: dataset_path={entry.dataset_path} needs dataset_kwargs.data_files")
    hashes = [str(_file(file, f"{entry.file}: data_files").sha256) for file in files]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()
