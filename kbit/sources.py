"""Sources of an evaluation's data: a local file or a hub dataset at a commit, and for a task its definition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

DEFAULT_FIELD = "text"
"""The field that holds a document of a text set, where none is named."""


@dataclass(frozen=True, kw_only=True)
class LocalFile:
    """A file of documents on this machine.

    Attributes:
        path: where it is.
        sha256: of its contents when the study was launched.
        bytes, documents: its size, for predicting the cost.
        field: of a text set, the field of a line that holds the text.
        bom: True where it begins with a byte-order mark, which is not read as text. Once it was, so it tells.
    """

    path: str
    sha256: str | None = None
    bytes: int | None = None
    documents: int | None = None
    field: str | None = None
    bom: bool | None = None

    @property
    def identity(self) -> str:
        field = self.field or DEFAULT_FIELD
        of_field = f"/field={field}" if field != DEFAULT_FIELD else ""
        return f"sha256:{self.sha256}{of_field}{'/without=bom' if self.bom else ''}"


@dataclass(frozen=True, kw_only=True)
class HubData:
    """A dataset of the Hugging Face hub at a commit.

    Attributes:
        hub, revision: the repository and its commit.
        config: its configuration (``name`` of ``datasets.load_dataset``).
        split, field: of a text set.
        kwargs: further arguments of ``datasets.load_dataset``, as a task's ``dataset_kwargs`` has them.
    """

    hub: str
    revision: str
    config: str | None = None
    split: str | None = None
    field: str | None = None
    kwargs: Mapping[str, Any] | None = None

    @property
    def identity(self) -> str:
        field = self.field or DEFAULT_FIELD
        parts = [self.config, self.split, f"field={field}" if field != DEFAULT_FIELD else None]
        return f"hub:{self.hub}{''.join(f'/{part}' for part in parts if part)}@{self.revision}"


@dataclass(frozen=True, kw_only=True)
class NamedFiles:
    """Local files that a task's definition names itself (``dataset_kwargs.data_files``), by one hash of all."""

    sha256: str

    @property
    def identity(self) -> str:
        return f"sha256:{self.sha256}"


Documents: TypeAlias = LocalFile | HubData | NamedFiles


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """A task's definition, a YAML file, and its documents; without them they come from where the definition says."""

    task_file: str
    documents: Documents | None = None


Source: TypeAlias = LocalFile | HubData | NamedFiles | TaskSource


def documents_of(source: Source | None) -> Documents | None:
    """Return the documents that are read: a text set, or a task's documents."""
    return source.documents if isinstance(source, TaskSource) else source


def place_of(source: Source | None) -> str:
    """Return the file or dataset that is read, for messages."""
    documents = documents_of(source)
    if isinstance(documents, LocalFile):
        return documents.path
    if isinstance(documents, HubData):
        return documents.hub
    return source.task_file if isinstance(source, TaskSource) else "no data"


def source_to_dict(source: Source | None) -> dict[str, Any]:
    """Plain JSON values, as manifests and packs carry them."""
    found = {} if source is None else dict(vars(source))
    if isinstance(source, TaskSource):
        found = {"task_file": source.task_file, **source_to_dict(source.documents)}
    return {name: value for name, value in found.items() if value is not None}


def source_from_dict(data: Mapping[str, Any]) -> Source | None:
    """Return the inverse of ``source_to_dict``."""
    values = dict(data)
    task_file = values.pop("task_file", None)
    documents: Documents | None = None
    if "path" in values:
        documents = LocalFile(**values)
    elif "hub" in values:
        documents = HubData(**values)
    elif values:
        documents = NamedFiles(**values)
    return documents if task_file is None else TaskSource(task_file=task_file, documents=documents)
