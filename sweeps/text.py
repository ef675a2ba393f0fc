"""Numbers and values in words, for people."""

from __future__ import annotations

from collections.abc import Mapping


def counted(count: int, what: str) -> str:
    """Return a count in words: '1 GPU', '2 GPUs', '1,000 jobs'."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def hours(seconds: float) -> str:
    """Return a time in words: '90 s', '12 min', '3.5 h'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def written(value: object) -> str:
    """Return a value as users write it on the command line: null, true, a, [a,b], {bits: 3}."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {written(v)}" for name, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return written(value[0]) if len(value) == 1 else f"[{','.join(map(written, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def size(count: float) -> str:
    """Return a number of bytes in words: '30 kB', '1.2 TB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
