"""Events that workers send their pool, and the pool its owner. JSON only on the pipe between processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Final, get_args

from sweeps.store.schema import Row


@dataclass(frozen=True, kw_only=True)
class Started:
    """A cell begins: its model is loaded and quantized. Should that kill the worker, ``measurement`` is the suspect."""

    name: ClassVar[str] = "started"
    pack: str
    cell: str
    label: str
    measurement: str


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model was loaded."""

    name: ClassVar[str] = "loaded"
    model: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """A measurement begins."""

    name: ClassVar[str] = "measuring"
    pack: str
    measurement: str


@dataclass(frozen=True, kw_only=True)
class BlockDone:
    """A pass layer by layer has done so many of a model's blocks, for all cells of a pack."""

    name: ClassVar[str] = "block_done"
    pack: str
    label: str
    done: int
    count: int


@dataclass(frozen=True, kw_only=True)
class SmallerBatch:
    """Memory ran out, and batches have so many tokens from now on."""

    name: ClassVar[str] = "smaller_batch"
    pack: str
    batch_tokens: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A measurement is stored, as a result or a failure: its row without samples, traceback and versions."""

    name: ClassVar[str] = "measured"
    row: Row


@dataclass(frozen=True, kw_only=True)
class Withheld:
    """A measurement was not made, and has no record: its data are not those of the launch. It runs again."""

    name: ClassVar[str] = "withheld"
    pack: str
    measurement: str
    why: str


@dataclass(frozen=True, kw_only=True)
class PackDone:
    """All of a pack is stored."""

    name: ClassVar[str] = "pack_done"
    pack: str


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """A pack is left before its end: 'asked', or 'walltime' where the next cell would not end in time."""

    name: ClassVar[str] = "stopped"
    pack: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Crashed:
    """A worker died, and another takes its place. The pool says so."""

    name: ClassVar[str] = "crashed"
    how: str
    log: str


Event = Started | Loaded | Measuring | BlockDone | SmallerBatch | Measured | Withheld | PackDone | Stopped | Crashed
OnEvent = Callable[[Event, int], None]
"""Told an event, and the number of the worker that it is from."""

_KINDS: Final[Mapping[str, Callable[..., Event]]] = {kind.name: kind for kind in get_args(Event)}


def event_to_dict(event: Event) -> dict[str, object]:
    """Return an event as plain values, for JSON."""
    return {"event": event.name, **{field.name: getattr(event, field.name) for field in fields(event)}}


@dataclass(kw_only=True)
class Teller:
    """Writes the events of a process as lines: of a row only what differs from the one before, since most is alike."""

    _row: Row = field(default_factory=dict)

    def line(self, event: Event) -> str:
        """Return an event as a line of JSON, with its end."""
        said = event_to_dict(event)
        if isinstance(event, Measured):
            before, self._row = self._row, event.row
            said["row"] = {n: value for n, value in event.row.items() if n not in before or before[n] != value}
            said["without"] = [name for name in before if name not in event.row]
        return json.dumps(said, default=str) + "\n"


@dataclass(kw_only=True)
class Listener:
    """Reads what one ``Teller`` wrote, in pieces of any length."""

    _row: Row = field(default_factory=dict)
    _rest: bytes = b""

    def events(self, data: bytes) -> list[Event]:
        """Return the events that end in a piece."""
        lines, end, self._rest = (self._rest + data).rpartition(b"\n")
        return [self._event(said) for said in json.loads(b"[%s]" % lines.replace(b"\n", b","))] if end else []

    def _event(self, said: dict[str, Any]) -> Event:
        kind = _KINDS[said.pop("event")]
        if kind is Measured:
            self._row = row = {**self._row, **said["row"]}
            for name in said["without"]:
                del row[name]
            return Measured(row=row)
        return kind(**said)
