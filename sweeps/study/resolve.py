"""From a composed configuration to a frozen study: models and data resolved to what identifies them, the grid expanded.

Commits are resolved here, once, and never invented; a plan made without a network says which are unknown.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kbit.compute_dtypes import COMPUTE_DTYPES
from kbit.errors import SpecError
from kbit.evaluation.spec import EvalSpec
from sweeps.errors import HubError, UserError, did_you_mean
from sweeps.study import hub, task_index
from sweeps.study.cell import UNRESOLVED, ModelRef
from sweeps.study.grid import expand
from sweeps.study.manifest import Manifest

AUTO_COMPUTE_DTYPE = {"cpu": "float32", "cuda": "storage"}
"""16-bit arithmetic is slow, or missing, on a CPU."""
TEXT_SUFFIXES = (".jsonl", ".txt")
PACKAGED_LOADERS = ("json", "csv", "parquet", "text", "arrow")
"""Names that `datasets` reads local files with, not of the hub."""
PERPLEXITY_VERSION = "1"
"""Of the preparation of a text set: joining, windows, scoring. Raised when a number would change."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What a configuration says of its study, in plain values: where it runs is no part of it."""

    sweep: Mapping[str, Any]
    models: Mapping[str, Any]
    path: Any
    eval: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a launch needs: the manifest, and how much was left out or merged."""

    manifest: Manifest
    duplicates: int
    unresolved: tuple[str, ...]
    """Hub names without a known commit; only a plan may have any."""


@dataclass
class Resolver:
    """Turns hub names into commits. ``strict`` refuses what can't be resolved, else it is noted."""

    strict: bool

    def __post_init__(self) -> None:
        self.unresolved: list[str] = []

    def commit(self, repo: str, revision: str, repo_type: str) -> str:
        try:
            return hub.resolve_commit(repo, revision, repo_type=repo_type)
        except HubError:
            if self.strict:
                raise
            self.unresolved.append(repo)
            return f"{UNRESOLVED}{revision}"


def build_study(config: StudyConfig, *, device: str, strict: bool, progress: Callable[[str], None]) -> Study:
    """Resolve and expand.

    Args:
        device: 'cpu' or 'cuda': what compute_dtype=auto stands for.
        strict: refuse models and data whose commit is unknown (a run); else note them (a plan).
        progress: called with what is being read, where that takes time.

    Raises:
        UserError, SpecError, HubError: something in the configuration is wrong; nothing has been run.
    """
    resolver = Resolver(strict=strict)
    sweep = config.sweep
    name = str(sweep["name"])
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise UserError(f"sweep.name={name!r} is not valid: letters, digits, '.', '_' and '-', not a '.' or '-' first")
    if not sweep["quant"]:
        raise UserError("sweep.quant=[] is not valid: a study needs at least one block, e.g. {bits: 16}")
    models = _models(config, resolver, progress)
    grid = expand(sweep["quant"], models, sweep["exclude"])
    evals = _evals(config.eval, resolver, device)
    if not grid.cells:
        reasons = "; ".join(f"{n} x {why}" for why, n in grid.excluded_counts().items()) or "no models"
        raise UserError(f"sweep={name}: nothing is left to run ({reasons})")
    manifest = Manifest(sweep=name, cells=grid.cells, evals=tuple(evals), excluded=grid.excluded, config=vars(config))
    return Study(manifest=manifest, duplicates=grid.duplicates, unresolved=tuple(dict.fromkeys(resolver.unresolved)))


def as_list(value: object, key: str) -> list[Any]:
    """A list, or one value standing for a list of one; null is none."""
    if value is None:
        return []
    if isinstance(value, str | int):
        return [value]
    if isinstance(value, list | tuple):
        return list(value)
    raise UserError(f"{key}={value!r} is not valid: a name or a list, e.g. '{key}=[a,b]'")


def _models(config: StudyConfig, resolver: Resolver, progress: Callable[[str], None]) -> list[ModelRef]:
    sizes = as_list(config.sweep.get("sizes"), "sweep.sizes")
    if config.path is not None:
        paths = [Path(str(p)).expanduser() for p in as_list(config.path, "path")]
        if not paths:
            raise UserError("path=[] is not valid: name at least one model directory, or leave it null")
        _check_sizes(sizes, [p.name for p in paths])
        return [_local(p, None, None, progress) for p in paths if not sizes or p.name in map(str, sizes)]
    members = {
        (str(family.get("family") or group), str(name)): member
        for group, family in config.models.items()
        for name, member in family["members"].items()
    }
    _check_sizes(sizes, [name for _, name in members])
    chosen = {k: m for k, m in members.items() if not sizes or k[1] in map(str, sizes)}
    return [_member(family, name, member, resolver, progress) for (family, name), member in chosen.items()]


def _check_sizes(sizes: list[Any], known: list[str]) -> None:
    for size in sizes:
        if str(size) not in known:
            hint = did_you_mean(str(size), known)
            raise UserError(f"sweep.sizes={size!r} is not among the chosen models.{hint} Allowed: {', '.join(known)}")


def _member(
    family: str, name: str, member: Mapping[str, Any], resolver: Resolver, progress: Callable[[str], None]
) -> ModelRef:
    if member["path"]:
        return _local(Path(member["path"]), family, name, progress)
    if not member["id"]:
        raise UserError(f"models.{family}.members.{name}: needs `id` (a hub id) or `path` (a local directory)")
    progress(f"commit of {member['id']}")
    commit = resolver.commit(member["id"], member["revision"], "model")
    return ModelRef(family=family, name=name, params=member["params"], hub_id=member["id"], commit=commit)


def _local(path: Path, family: str | None, name: str | None, progress: Callable[[str], None]) -> ModelRef:
    progress(f"hash of {path}")
    local = hub.local_model(path)
    return ModelRef(
        family=family or local.family,
        name=name or local.name,
        params=local.params,
        path=str(local.path),
        weights_hash=local.content_hash,
    )


def _evals(plain: Mapping[str, Any], resolver: Resolver, device: str) -> list[EvalSpec]:
    dtype = plain["compute_dtype"]
    if dtype == "auto":
        dtype = AUTO_COMPUTE_DTYPE[device]
    elif dtype not in COMPUTE_DTYPES:
        raise SpecError("eval.compute_dtype", dtype, "auto, or one of " + ", ".join(COMPUTE_DTYPES))
    data_dir = _data_dir(plain["data_dir"])
    evals = [
        _text_set(str(name), plain, data_dir, dtype, resolver)
        for name in as_list(plain["perplexity"], "eval.perplexity")
    ]
    evals += [_task(str(name), plain, data_dir, dtype, resolver) for name in as_list(plain["tasks"], "eval.tasks")]
    if not evals:
        raise UserError("eval: nothing to measure. Name text sets (eval.perplexity) or tasks (eval.tasks)")
    names = [e.name for e in evals]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UserError(f"eval: {', '.join(twice)} is named more than once; each evaluation needs a name of its own")
    return evals


def _data_dir(value: str | None) -> Path | None:
    if value is None:
        return None
    directory = Path(value).expanduser()
    if not directory.is_dir():
        raise UserError(f"eval.data_dir={value!r} is not a directory")
    return directory.absolute()


def _text_set(name: str, plain: Mapping[str, Any], data_dir: Path | None, dtype: str, resolver: Resolver) -> EvalSpec:
    source: dict[str, Any]
    known = plain["sets"].get(name)
    if known is None:
        path = Path(name).expanduser()
        if path.suffix not in TEXT_SUFFIXES and not path.is_file():
            hint = did_you_mean(name, plain["sets"])
            raise UserError(
                f"eval.perplexity={name!r} is neither a known text set nor a .jsonl or .txt file.{hint} "
                f"Known: {', '.join(sorted(plain['sets']))}"
            )
        name, source = path.stem, _file(path, "eval.perplexity")
    elif known["path"]:
        source = _file(Path(known["path"]), f"eval.sets.{name}.path")
    elif data_dir and known["local"]:
        source = _file(data_dir / known["local"], f"eval.data_dir (for {name})")
    elif known["hub"]:
        commit = resolver.commit(known["hub"], known["revision"], "dataset")
        chosen = {k: known[k] for k in ("config", "split", "field") if known[k] is not None}
        source = {"hub": known["hub"], "revision": commit, **chosen}
    else:
        raise UserError(f"eval.sets.{name} is only to be had locally: give eval.data_dir=DIR with {known['local']}")
    if "path" in source:
        source["field"] = known["field"] if known else "text"
        hub.check_jsonl(Path(source["path"]), (source["field"],))
    return EvalSpec(
        kind="perplexity",
        name=name,
        version=PERPLEXITY_VERSION,
        window=plain["window"],
        limit=plain["tokens"],
        dataset=_dataset_identity(source),
        compute_dtype=dtype,
        source=source,
    )


def _task(name: str, plain: Mapping[str, Any], data_dir: Path | None, dtype: str, resolver: Resolver) -> EvalSpec:
    dirs = [Path(str(d)).expanduser() for d in as_list(plain["task_dirs"], "eval.task_dirs")]
    entry = task_index.find_task(name, extra_dirs=dirs)
    source: dict[str, Any] = {"task_file": str(entry.file)}
    file = plain["task_data"].get(name)
    if file and (data_dir or Path(file).is_absolute()):
        source |= _file((data_dir or Path()) / file, f"eval.data_dir (for {name})")
    elif data_dir and (data_dir / f"{name}.jsonl").is_file():
        source |= _file(data_dir / f"{name}.jsonl", f"eval.data_dir (for {name})")
    elif entry.dataset_path in PACKAGED_LOADERS:
        source |= {"sha256": _data_files_hash(entry)}
    elif entry.dataset_path:
        kwargs = dict(entry.dataset_kwargs)
        commit = resolver.commit(entry.dataset_path, str(kwargs.pop("revision", "main")), "dataset")
        source |= {"hub": entry.dataset_path, "config": entry.dataset_name, "revision": commit, "kwargs": kwargs}
    else:
        raise UserError(f"eval.tasks={name!r}: {entry.file} names no dataset; put {name}.jsonl into eval.data_dir")
    return EvalSpec(
        kind="task",
        name=name,
        version=str(entry.version),
        num_fewshot=plain["num_fewshot"],
        limit=plain["limit"],
        dataset=_dataset_identity(source),
        compute_dtype=dtype,
        source=source,
    )


def _data_files_hash(entry: task_index.TaskEntry) -> str:
    """One hash of the local files that a task of the user's own reads by itself (dataset_path: json and the like)."""
    named = entry.dataset_kwargs.get("data_files")
    values = named.values() if isinstance(named, Mapping) else [named]
    files = [str(f) for value in values for f in (value if isinstance(value, list) else [value]) if f is not None]
    if not files:
        raise UserError(f"{entry.file}: dataset_path={entry.dataset_path} needs dataset_kwargs.data_files")
    hashes = [_file(Path(f), f"{entry.file}: data_files")["sha256"] for f in files]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _file(path: Path, key: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{key}: {str(path)!r} is not a file")
    path = path.absolute()
    with path.open("rb") as file:
        documents = sum(1 for line in file if line.strip())
    # Size and documents are for predicting the cost.
    return {
        "path": str(path),
        "sha256": hub.file_hash(path),
        "bytes": path.stat().st_size,
        "documents": documents,
    }


def _dataset_identity(source: Mapping[str, Any]) -> str:
    if "sha256" in source:
        field = source.get("field") or "text"
        return f"sha256:{source['sha256']}" + (f"/field={field}" if field != "text" else "")
    field = source.get("field") or "text"
    parts = [source.get("config"), source.get("split"), f"field={field}" if field != "text" else None]
    detail = "".join(f"/{p}" for p in parts if p)
    return f"hub:{source['hub']}{detail}@{source['revision']}"
