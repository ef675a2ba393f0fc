"""Give a study's tables to W&B as an artifact: the result parquet, CSV and Markdown, in a run of the study's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sweeps.tracking.config import TrackingConfig
from sweeps.tracking.messages import Answer, Fatal, Job, Trouble, Uploaded
from sweeps.tracking.process import MirrorProcess

ARTIFACT_SECONDS: Final = 60.0
"""A study that is done waits so long, at most, for its tables to be uploaded."""


def upload_tables(
    config: TrackingConfig, sweep: str, files: Sequence[Path], *, seconds: float = ARTIFACT_SECONDS
) -> str | None:
    """Add a version of the artifact ``SWEEP-results``, where its files are not those of the last.

    Args:
        config: where to; 'offline' leaves it for ``wandb sync``.
        sweep: the study's name.
        files: its tables.
        seconds: how long this may take.

    Returns:
        A sentence for the user where W&B may not hold it; None where it does, or nothing is to be mirrored.
    """
    if config.mode == "disabled" or not files:
        return None
    answers: list[Answer] = []
    tables = {sweep: [str(f) for f in files]}
    process = MirrorProcess(Job(tracking=config.message(), out=str(files[0].parent), tables=tables), answers.append)
    in_time = process.close(seconds)
    if any(isinstance(said, Uploaded) for said in answers):
        return None
    reasons = [said.reason for said in answers if isinstance(said, Trouble | Fatal)]
    why = reasons[0] if reasons else f"see {process.log_file}" if in_time else f"not within {seconds:g} s"
    return f"W&B: the tables of {sweep} are not known to be uploaded ({why}); run the same command with mode=sync"
