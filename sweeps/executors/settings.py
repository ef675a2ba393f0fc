"""Keys of executors: what all of them have, and what the executor of this machine adds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Self

from sweeps.files import JsonObject


@dataclass(frozen=True, kw_only=True)
class ExecutorSettings:
    """Keys that every executor has; an executor adds its own in a subclass. Each field is a key of ``executor``.

    Hydra checks a value against the field's type where that is one of str, int, float and bool, or None;
    ``from_config`` checks all others. Where a configuration says null, a field has its default.
    """

    device: str = "auto"
    batch_tokens: int | str = "auto"

    @classmethod
    def from_config(cls, executor: JsonObject) -> Self:
        """Check and convert.

        Raises:
            UserError: names the key, its value, and what is allowed.
        """
        return cls(**{f.name: executor[key] for key, f in _keys(cls) if executor.get(key) is not None})

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the keys as users write them."""
        return tuple(key for key, _ in _keys(cls))


@dataclass(frozen=True, kw_only=True)
class LocalSettings(ExecutorSettings):
    """Keys of conf/executor/local.yaml."""

    workers: int | str = "auto"
    threads: int | str = "auto"


def setting(default: Any = None, *, key: str | None = None) -> Any:
    """Return a field whose value Hydra doesn't check.

    Args:
        default: its value where users give none.
        key: as users write it; None is the field's name.
    """
    return field(default=default, metadata={"key": key, "unchecked": True})


def _keys(settings: type[ExecutorSettings]) -> Iterator[tuple[str, Any]]:
    for f in fields(settings):
        yield f.metadata.get("key") or f.name, f
