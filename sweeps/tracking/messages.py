"""What a study and its mirror's process tell each other: lines of JSON, the first of which is the job."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final, get_args


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the process is to do.

    Attributes:
        tracking: what ``TrackingConfig.message`` returns.
        out: the results directory.
        sweep: the study to mirror; None is each that has results.
        every: seconds between two looks at the store, until the input ends; None is one look.
        tables: files by study: instead of measurements, these are uploaded.
    """

    tracking: Mapping[str, str | list[str] | None]
    out: str
    sweep: str | None = None
    every: float | None = None
    tables: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """So many runs of a look are done."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Mirrored:
    """A look at the store is over.

    Attributes:
        runs, measurements: of the store.
        whole: measurements that W&B holds, as read back from it.
        added: of these, the ones that were added now.
    """

    runs: int
    measurements: int
    whole: int
    added: int


@dataclass(frozen=True, kw_only=True)
class Uploaded:
    """W&B holds a study's tables."""

    sweep: str


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Something went wrong; the mirror goes on."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Fatal:
    """The mirror gave up."""

    reason: str


Answer = Progress | Mirrored | Uploaded | Trouble | Fatal
_ANSWERS: Final[Mapping[str, Callable[..., Answer]]] = {kind.__name__: kind for kind in get_args(Answer)}


def to_line(said: Answer) -> str:
    """Return an answer as a line of JSON."""
    return json.dumps([type(said).__name__, asdict(said)]) + "\n"


def answer(line: str) -> Answer:
    """Return the answer of a line."""
    kind, values = json.loads(line)
    return _ANSWERS[kind](**values)
