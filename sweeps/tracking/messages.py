"""Messages between a study and its mirror's process: one line of JSON each, after the configuration's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final, get_args

from sweeps.store.schema import Row, Scalar


@dataclass(frozen=True, kw_only=True)
class Start:
    """Open a pack's run, or take it up again. Of a pack that is ``whole``, all rows come from the store."""

    pack: str
    sweep: str
    name: str
    config: Mapping[str, Scalar]
    whole: bool


@dataclass(frozen=True, kw_only=True)
class Log:
    """Mirror one measurement of a pack that was started."""

    pack: str
    row: Row


@dataclass(frozen=True, kw_only=True)
class Finish:
    """No more measurements of a pack will come."""

    pack: str


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """Upload the tables of a study."""

    sweep: str
    files: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """W&B holds so many of a pack's measurements, of which so many were added; or so many files of an artifact."""

    pack: str
    mirrored: int
    added: int


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Something went wrong; the mirror goes on."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Fatal:
    """The mirror gave up."""

    reason: str


Message = Start | Log | Finish | Artifact
Answer = Finished | Trouble | Fatal
_MESSAGES: Final[Mapping[str, Callable[..., Message]]] = {kind.__name__: kind for kind in get_args(Message)}
_ANSWERS: Final[Mapping[str, Callable[..., Answer]]] = {kind.__name__: kind for kind in get_args(Answer)}


def to_line(said: Message | Answer) -> str:
    """Return a message or an answer as a line of JSON."""
    return json.dumps([type(said).__name__, {field.name: getattr(said, field.name) for field in fields(said)}]) + "\n"


def message(line: str) -> Message:
    """Return the message of a line."""
    kind, values = json.loads(line)
    return _MESSAGES[kind](**values)


def answer(line: str) -> Answer:
    """Return the answer of a line."""
    kind, values = json.loads(line)
    return _ANSWERS[kind](**values)
