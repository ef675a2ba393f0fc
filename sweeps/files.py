"""Files of a results directory: read whole, written atomically."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from sweeps.errors import StoreError


def read_json(path: Path) -> Any:
    """A JSON file of the store.

    Raises:
        StoreError: it is damaged; the store writes whole files, so something else did that.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}): restore it, or move it out of the results directory") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` is whole or absent, whatever happens, and on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
