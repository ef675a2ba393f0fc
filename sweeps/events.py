"""Events that workers send their pool, and the pool its owner. JSON only on the pipe between processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Final, get_args

from sweeps.files import JsonObject
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


def event_from_dict(data: JsonObject) -> Event:
    """Return the event that ``event_to_dict`` made plain."""
    values = dict(data)
    return _KINDS[values.pop("event")](**values)
