"""Which job a launch's pack belongs to: sbatch may say that it failed and be served later, and then there are two."""

from __future__ import annotations

import os
import uuid
from typing import Final

from sweeps.files import write_atomically
from sweeps.launches.launch import Launch

_DIRECTORY: Final = "owners"


def own_pack(launch: Launch, pack: str, job: str) -> str:
    """Take a pack for a job, once and for all; returns the job that has it.

    Args:
        job: id of the array, or of the job where it is none; a requeued job keeps it.

    Raises:
        OSError: the file system can't make hard links, or can't be written.
    """
    path = launch.directory / _DIRECTORY / pack
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    write_atomically(temporary, job.encode())
    try:
        os.link(temporary, path)
    except FileExistsError:
        # A network file system may repeat a link that had succeeded: what the file says counts.
        return path.read_text()
    finally:
        temporary.unlink(missing_ok=True)
    return job
