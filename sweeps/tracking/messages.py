"""What a study and its mirror's process tell each other: the job, a line of JSON, and answers, a line each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final, get_args


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the process is to do, until its input ends and a last time then.

    Attributes:
        tracking: what ``TrackingConfig.message`` returns.
        out: the results directory.
        sweep: the study to mirror; None is each that there is.
        every: seconds between two looks at the store.
        tables: files by study: instead of results, these are uploaded.
    """

    tracking: Mapping[str, str | None]
    out: str
    sweep: str | None = None
    every: float = 30.0
    tables: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """So many of the runs that are not up to date are done."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Mirrored:
    """The last look at the store is over, whatever ended it.

    Attributes:
        runs, measurements: of the store.
        whole: measurements of runs that are known to be up to date, by what W&B itself says of them.
        updated: runs that were brought up to date in it.
    """

    runs: int
    measurements: int
    whole: int
    updated: int


@dataclass(frozen=True, kw_only=True)
class Uploaded:
    """W&B holds a study's tables."""

    sweep: str


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Something went wrong that may be well again later."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Fatal:
    """W&B can't be used as configured, which trying again doesn't change; the process ends."""

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
