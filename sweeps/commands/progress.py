"""Say how far a mode is that takes longer than a moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.markup import escape

from sweeps.results.progress import LINE_SECONDS

QUIET_SECONDS: Final = 2.0


@contextmanager
def saying(console: Console) -> Iterator[Callable[[str], None]]:
    """Have somewhere to say how far it is: a line that changes, or in a pipe a line now and then.

    What is done in ``QUIET_SECONDS`` says nothing; nor does ssh's question for a password have a spinner over it.
    """
    with console.status("") as status:
        status.stop()
        last = time.monotonic()

        def say(text: str) -> None:
            nonlocal last
            now = time.monotonic()
            if console.is_terminal and now - last > QUIET_SECONDS:
                status.update(escape(text))
                status.start()
            elif not console.is_terminal and now - last > LINE_SECONDS:
                last = now
                console.print(text, markup=False, highlight=False)

        yield say
