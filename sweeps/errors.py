"""What the user can mend: each is one clear message and exit code 2, with nothing run."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The request can't be carried out as asked; the message says why and what to do."""


class StoreError(UserError):
    """The results directory can't be used."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean x?' or '', to append to a message."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""
