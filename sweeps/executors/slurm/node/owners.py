"""The one job of a launch's pack: sbatch may say that it failed and be served later, and then there are two."""

from __future__ import annotations

from typing import Final

from sweeps.files import create_exclusively
from sweeps.launches.launch import Launch

_DIRECTORY: Final = "owners"


def lease_pack(launch: Launch, pack: str, job: str) -> str:
    """Take a pack for a job, once and for all; return the job that has it.

    Args:
        launch: the launch that sent the job.
        pack: id of the pack.
        job: id of the array, or of the job where it is none; a requeued job keeps it.

    Raises:
        OSError: the file system can't make hard links, or can't be written.
    """
    path = launch.directory / _DIRECTORY / pack
    return job if create_exclusively(path, job.encode()) else path.read_text()
