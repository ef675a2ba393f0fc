"""What ``to=`` names is written: its directory is made, a group shares it, and what can't be written is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sweeps.errors import UserError
from sweeps.files import make_directory, share_with_group


def write_to(write: Callable[[Path], object], target: Path) -> Path:
    """Write a file; return it.

    Args:
        write: writes the file that it is given.
        target: the file.

    Raises:
        UserError: it can't be written.
    """
    try:
        make_directory(target.parent)
        write(target)
        share_with_group(target)
    except OSError as error:
        raise UserError(f"to={str(target)!r} can't be written: {error.strerror or error}") from error
    return target
