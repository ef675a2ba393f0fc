"""Standard output as users have it: its encoding lacks characters, its reader stops early, it is a terminal or not."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
import unicodedata
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

_ALIKE: Final = {"…": "...", "±": "+-", "•": "*", "×": "x", "–": "-", "—": "-", "→": "->"}  # noqa: RUF001
_BRAILLE: Final = range(0x2800, 0x2900)
"""What spinners are made of."""


def adapt_streams() -> None:
    """Write what an output's encoding lacks in ASCII that looks like it: a character must not end a study."""
    codecs.register_error("kbit.alike", _alike)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="kbit.alike")


def flush() -> None:
    """Hand over what was printed.

    Raises:
        BrokenPipeError: nobody reads it any more.
    """
    sys.stdout.flush()
    sys.stderr.flush()


def silence() -> None:
    """Print to nowhere from now on: the reader (``| head``) has gone, which is no news to anybody."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())


def _alike(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_ascii, error.object[error.start : error.end])), error.end


def _ascii(character: str) -> str:
    if ord(character) in _BRAILLE:
        return "."
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return _ALIKE.get(character) or plain or "?"


class LiveView:
    """A view with a part that changes in place, within ``with``, where the output is a terminal."""

    console: Console
    _live: Live

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.__exit__(kind, error, trace)
