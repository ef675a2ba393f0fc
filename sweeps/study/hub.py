"""Identify models and datasets without torch, by hub commit or local contents, and fetch them.

Commits and hashes are resolved once, at launch, and frozen in the study's manifest. Nothing
here guesses one: what can't be resolved is a ``HubError`` that says what to do.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, TypeAlias

from kbit.errors import CheckpointError
from kbit.evaluation.documents import file_documents, read_jsonl
from kbit.models.checkpoint import count_parameters, model_files, read_config, tensors_in, weight_files
from kbit.models.obeyed import FIRST_OBEYED, check_refused, obeyed_files
from kbit.models.prequantized.layouts import as_16_bit
from kbit.models.refusals import check_checkpoint, check_config
from kbit.sources import HubData
from sweeps.errors import HubError, UnreachableError, UserError
from sweeps.study.hashes import Progress, file_hash

__all__ = [
    "LocalModel",
    "cached_snapshot",
    "check_jsonl",
    "check_model",
    "fetch",
    "file_hash",
    "first_content_hash",
    "local_model",
    "model_config",
    "resolve_commit",
    "small_file",
]

ModelConfig: TypeAlias = Mapping[str, Any]
"""A checkpoint's config.json."""
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_TIMEOUT: Final = 10.0
"""Seconds to wait for the hub to answer."""
_FAMILY_AND_SIZE: Final = re.compile(
    r"(?P<family>[a-z].*)-(xs|s|m|l|xl|xxl|small|medium|large|\d+(\.\d+)?[mbt]\d*)", re.IGNORECASE
)
_asked: Final[dict[tuple[str, str, str], str]] = {}
"""Branch or tag by (type, id, commit) that the hub resolved in this process: a fetch of the commit is one of it."""
_configs: Final[dict[str, ModelConfig]] = {}
"""config.json by the repository that the hub was asked for."""


@dataclass(frozen=True, kw_only=True)
class LocalModel:
    """A Hugging Face directory on this machine.

    Attributes:
        path: its absolute path.
        name: the directory's name.
        family: 'opt' of a directory named 'opt-125m'; of one named otherwise, the architecture (config.json's
            model_type).
        params: parameters, shared ones once; None for torch's ``.bin`` files, which can't be counted without torch.
        content_hash: SHA-256 of the names and hashes of weights, config.json and what else is obeyed
            (``kbit.models.obeyed``).
    """

    path: Path
    name: str
    family: str
    params: int | None
    content_hash: str


def resolve_commit(repo_id: str, revision: str = "main", repo_type: str = "model") -> str:
    """Find the commit (40 hex digits) that a branch or tag stands for: asked of the hub, or where that can't be
    reached, read from what was last fetched to the local cache. A commit is its own answer.

    Raises:
        HubError: no such repository or revision, no access to it, or no network and nothing cached.
    """
    from huggingface_hub import HfApi, errors

    if _COMMIT.fullmatch(revision):
        return revision
    why = _unreachable()
    if why is None:
        try:
            info = HfApi().repo_info(repo_id, revision=revision, repo_type=repo_type, timeout=_TIMEOUT)
        except errors.RepositoryNotFoundError as error:
            access = "or it is private: log in with `hf auth login`"
            raise HubError(f"{repo_type} {repo_id}@{revision}: the hub has no such {repo_type}, {access}") from error
        except errors.RevisionNotFoundError as error:
            raise HubError(
                f"{repo_type} {repo_id}@{revision}: it has no such revision (branch, tag, commit)"
            ) from error
        except errors.HFValidationError as error:
            raise HubError(f"{repo_type} {repo_id!r} is not valid: {_brief(error)}") from error
        except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # the HTTP client's base class
            why = _brief(error)
        else:
            _asked[repo_type, repo_id, str(info.sha)] = revision
            return str(info.sha)
    commit = _cached_ref(repo_id, revision, repo_type)
    if commit is None:
        raise UnreachableError(
            f"{repo_type} {repo_id}@{revision} can't be resolved to a commit: {why}, and it is not in the local cache. "
            f"Run with mode=fetch where there is a network, or give local copies with "
            f"{'path=DIR' if repo_type == 'model' else 'eval.data_dir=DIR'}"
        )
    return commit


def cached_snapshot(repo_id: str, commit: str, repo_type: str = "model") -> Path | None:
    """Return the local cache's directory of a repository at a commit, or None. A model's has all its weights."""
    directory = _repo_dir(repo_id, repo_type) / "snapshots" / commit
    if not directory.is_dir():
        return None
    if repo_type == "model":
        try:
            model_files(directory)
        except CheckpointError:
            return None
    return directory


def check_model(repo_id: str, commit: str) -> None:
    """Refuse a hub model that can't be measured, as far as config.json and weights in the local cache tell.

    Raises:
        HubError: says why, and what to do.
    """
    config = model_config(repo_id, commit)
    try:
        if config is not None:
            check_config(config)
        directory = cached_snapshot(repo_id, commit)
        if directory is not None:
            check_checkpoint(directory, model_files(directory))
    except CheckpointError as error:
        raise HubError(f"model {repo_id}@{commit} is not usable: {error}") from error


def small_file(repo_id: str, commit: str, name: str) -> Path | None:
    """Return a small file of a model at a commit, from the local cache or else the hub; None where neither gives it."""
    from huggingface_hub import errors, hf_hub_download

    if not _COMMIT.fullmatch(commit):
        return None
    try:
        return Path(hf_hub_download(repo_id, name, revision=commit, local_files_only=_unreachable() is not None))
    except (errors.EntryNotFoundError, errors.HTTPError, OSError, ValueError):  # type: ignore[attr-defined]
        return None


def model_config(repo_id: str, commit: str, *, ask: bool = True) -> ModelConfig | None:
    """Return a hub model's config.json: from the local cache, else of the hub; None where it can't be had.

    Args:
        repo_id: the repository.
        commit: 40 hexadecimal digits. The hub is asked for one commit of a repository per process: revisions of a
            model are of one architecture, and there may be hundreds.
        ask: whether to ask the hub.
    """
    directory = _repo_dir(repo_id, "model") / "snapshots" / commit
    try:
        return read_config(directory)
    except CheckpointError:
        pass
    file = small_file(repo_id, commit, "config.json") if ask and repo_id not in _configs else None
    if file is not None:
        try:
            _configs[repo_id] = read_config(file.parent)
        except CheckpointError:
            return None
    return _configs.get(repo_id)


def local_model(path: str | Path, *, key: str = "path", progress: Progress | None = None) -> LocalModel:
    """Identify a local model directory by its contents.

    Args:
        path: a directory as ``save_pretrained`` writes it.
        key: of the configuration, which named it.
        progress: called while large files are hashed (the first time; their hashes are remembered).

    Raises:
        HubError: no such directory, no config.json, no weights or weights that can't be used; or a model that can't be
            measured.
    """
    directory = Path(path).expanduser().absolute()
    if directory.suffix == ".gguf" and directory.is_file():
        raise HubError(
            f"{key}={str(path)!r} is a GGUF file: unpack it with `python -m kbit.gguf {path} DIR`, and name {key}=DIR; "
            "cells of method=checkpoint count the bits of the file"
        )
    if not directory.is_dir():
        raise HubError(
            f"{key}={str(path)!r} is not a directory: a local model is a Hugging Face directory with config.json"
        )
    try:
        files = model_files(directory)
        headers = check_checkpoint(directory, files)
        params = count_parameters(as_16_bit(read_config(directory), tensors_in(headers))) if headers else None
        digest = _content_hash(directory, files, progress)
    except (CheckpointError, OSError) as error:
        raise HubError(f"{key}={str(path)!r} is not a usable model: {error}") from error
    name = directory_name(directory)
    match = _FAMILY_AND_SIZE.fullmatch(name)
    family = match["family"].lower() if match else read_config(directory)["model_type"]
    return LocalModel(path=directory, name=name, family=family, params=params, content_hash=digest)


def directory_name(path: Path) -> str:
    """Return what people call a model directory: its name; in the hub's cache, where a commit names it, the model's."""
    path = path.expanduser().absolute().resolve()
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return path.name


def first_content_hash(directory: Path) -> str:
    """Return a local model's ``content_hash`` as it was when fewer kinds of files were part of it.

    Raises:
        HubError: it can't be used.
    """
    try:
        files = model_files(directory)
    except CheckpointError as error:
        raise HubError(f"path={str(directory)!r} is not a usable model: {error}") from error
    later = set(obeyed_files(files)) - set(obeyed_files(files, FIRST_OBEYED))
    return _content_hash(directory, [n for n in files if n not in later], None)


def _content_hash(directory: Path, files: Iterable[str], progress: Progress | None) -> str:
    lines = [f"{n}\0{file_hash(directory / n, progress=progress)}\n" for n in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_jsonl(path: Path, fields: Iterable[str]) -> None:
    """Check a file of documents as a worker would read it: that each line is an object with text in ``fields``.

    Args:
        path: a JSONL file, or .txt, which is one document and has no fields.
        fields: of a text set; a task's documents have fields of any type, so none is named.

    Raises:
        HubError: the file can't be read, is empty or has no text, or has a line that does not fit; names line and
            field.
    """
    named = list(fields)
    try:
        if named:
            size = sum(len(document) for field in named for document in file_documents(path, field))
        else:
            size = sum(1 for _ in read_jsonl(path))
    except (OSError, ValueError) as error:
        raise HubError(f"{path} can't be read: {error}" if isinstance(error, OSError) else str(error)) from error
    if not size:
        raise HubError(f"{path} is empty: it has no {'text' if named else 'documents'}")


def fetch(
    models: Iterable[tuple[str, str]], datasets: Iterable[HubData] = (), *, report: Callable[[str], None] = print
) -> None:
    """Download models and datasets into the local caches, so that jobs can run offline.

    Later launches without a network resolve the branch to what was fetched. What can't be fetched does not stop the
    rest; it is named at the end.

    Args:
        models: pairs of hub id and revision, which may be a commit that ``resolve_commit`` gave.
        datasets: each at its commit.
        report: called with a line on each model or dataset when it is there.

    Raises:
        HubError: something could not be fetched.
    """
    from huggingface_hub import errors

    failures: list[str] = []
    jobs: list[tuple[str, Callable[[], Path]]] = []
    jobs += [(repo_id, partial(_fetch_model, repo_id, revision)) for repo_id, revision in models]
    jobs += [(dataset.hub, partial(_fetch_dataset, dataset)) for dataset in datasets]
    for name, job in jobs:
        try:
            report(f"{name}: {job()}")
        except (UserError, CheckpointError, errors.HTTPError, ValueError, OSError) as error:  # type: ignore[attr-defined]
            failures.append(f"{name}: {_brief(error)}")
            report(f"{name}: failed")
    if failures:
        raise HubError(f"{len(failures)} of {len(jobs)} could not be fetched:\n  " + "\n  ".join(failures))


def _fetch_model(repo_id: str, revision: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    commit = resolve_commit(repo_id, revision)
    names = [n for n in HfApi().list_repo_files(repo_id, revision=commit) if "/" not in n]
    check_refused(names)

    def read_json(name: str) -> Any:
        return json.loads(Path(hf_hub_download(repo_id, name, revision=commit)).read_bytes())

    wanted = [*weight_files(names, read_json), "config.json", *obeyed_files(names)]
    path = Path(snapshot_download(repo_id, revision=commit, allow_patterns=wanted))
    _remember_ref(repo_id, revision, "model", commit)
    return path


def _fetch_dataset(dataset: HubData) -> Path:
    commit = resolve_commit(dataset.hub, dataset.revision, repo_type="dataset")
    import datasets

    kwargs = {k: v for k, v in (dataset.kwargs or {}).items() if k != "revision"}
    loaded = datasets.load_dataset(dataset.hub, dataset.config, revision=commit, **kwargs)
    path = Path(next(iter(loaded.cache_files.values()))[0]["filename"]).parent
    _remember_ref(dataset.hub, dataset.revision, "dataset", commit)
    return path


@cache
def _unreachable() -> str | None:
    """Return why the hub can't be asked, or None. Found out once per process: with no network each question waits."""
    from huggingface_hub import constants, errors, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        return f"{constants.ENDPOINT} can't be reached ({_brief(error)})"
    return None


def _repo_dir(repo_id: str, repo_type: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{repo_type}s--{repo_id.replace('/', '--')}"


def _cached_ref(repo_id: str, revision: str, repo_type: str) -> str | None:
    try:
        commit = (_repo_dir(repo_id, repo_type) / "refs" / revision).read_text().strip()
    except OSError:
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def _remember_ref(repo_id: str, revision: str, repo_type: str, commit: str) -> None:
    # A download by commit leaves no trace of the branch's name, which a launch without a network will ask for.
    name = _asked.get((repo_type, repo_id, commit), revision)
    if not _COMMIT.fullmatch(name):
        ref = _repo_dir(repo_id, repo_type) / "refs" / name
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
