"""A results directory of another machine: what readers need of it, copied over ssh. There, nothing is written."""

from __future__ import annotations

import re
import shlex
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

from sweeps.errors import UserError
from sweeps.store.parts import ROWS_IN
from sweeps.text import size

NEEDED: Final = ("manifests", *ROWS_IN)
"""Plans, rows, and which rows were dropped."""
_NO_SUCH: Final = 66
_REMOTE: Final = re.compile(r"(?P<host>[^/:\s-][^/:\s]*):(?P<path>.*)")


def split_remote(source: str) -> tuple[str, str] | None:
    """Return (host, path) of HOST:PATH; None for a directory of this machine, which ``./`` before it makes sure of."""
    match = _REMOTE.fullmatch(source)
    return None if match is None else (match["host"], match["path"] or ".")


def copy_remote(source: str, to: Path, say: Callable[[str], None]) -> None:
    """Copy what readers need of HOST:PATH.

    The rows come in the order in which readers look, so that what is compacted meanwhile is not missed.

    Args:
        source: HOST:PATH, as ssh knows the host; a relative path begins in the user's directory there.
        to: an empty directory.
        say: told how much has come.

    Raises:
        UserError: ssh can't be run or fails, there is no such directory, or it isn't one of results.
    """
    place = split_remote(source)
    if place is None:
        raise ValueError(f"{source} names no host")
    host, path = place
    script = (
        f"cd {shlex.quote(path.removeprefix('~/'))} || exit; set --; "
        f'for d in {" ".join(NEEDED)}; do [ -d "$d" ] && set -- "$@" "$d"; done; '
        f'[ $# -gt 0 ] || exit {_NO_SUCH}; exec tar --format=pax -cf - "$@"'
    )
    with tempfile.TemporaryFile() as errors:
        try:
            # Whatever shell the user has there.
            command = ["ssh", "--", host, f"sh -c {shlex.quote(script)}"]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        except OSError as error:
            raise UserError(f"from={source} needs the program ssh: {error.strerror}") from error
        assert process.stdout is not None
        with process:
            broken = _unpack(process.stdout, to, lambda done: say(f"{size(done)} copied from {host}"))
        errors.seek(0)
        last = (errors.read().decode(errors="replace").strip().splitlines() or ["without a word"])[-1]
    if process.returncode == _NO_SUCH:
        raise UserError(f"from={source} is not a results directory: it has no {', '.join(NEEDED)}")
    # tar ends with 1 where files changed or went away meanwhile: readers know how to take that.
    if process.returncode not in (0, 1) or broken:
        raise UserError(f"from={source} can't be copied (exit code {process.returncode}: {last}). Nothing was changed")


def _unpack(stream: IO[bytes], to: Path, say: Callable[[int], None]) -> bool:
    """Unpack what comes; tell whether it broke off."""
    done = 0
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                archive.extract(member, to, filter="data")
                done += member.size
                say(done)
    except tarfile.TarError:
        return True
    return False
