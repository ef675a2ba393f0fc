"""submitit's SLURM executor, with an sbatch that ends in bounded time and whose answer is read for certain."""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, FailedSubmissionError, JobPaths

from sweeps.executors.slurm.query import command


class SbatchExecutor(submitit.SlurmExecutor):
    """submitit's executor, but for how sbatch is called.

    sbatch is asked for the bare id (--parsable): a site's wrapper may print a banner in which 'job 12' occurs. One that
    hangs is ended after as long as any other command of SLURM; it may have submitted all the same, so the caller then
    asks the queue.
    """

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        limit = ["timeout", "--kill-after=5", f"{command.COMMAND_SECONDS:g}"]
        return [*limit, "sbatch", "--parsable", str(submission_file_path)]

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        text = string if isinstance(string, str) else string.decode(errors="replace")
        # In a federation the cluster's name follows the id.
        ids = [line for line in map(str.strip, text.splitlines()) if re.fullmatch(r"\d+(;\S+)?", line)]
        if not ids:
            raise FailedSubmissionError(f"sbatch gave no job id: {text.strip()[-200:]!r}")
        return ids[-1].partition(";")[0]

    def _internal_process_submissions(self, delayed_submissions: list[DelayedSubmission]) -> list[Any]:
        """Submit jobs, several as one array: as submitit does, which takes its own class for arrays."""
        if len(delayed_submissions) == 1:
            return list(super()._internal_process_submissions(delayed_submissions))
        folder = JobPaths.get_first_id_independent_folder(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        pickles = []
        for delayed in delayed_submissions:
            delayed.set_timeout(self.parameters["time"], self.max_num_timeout)
            pickles.append(folder / f"{uuid.uuid4().hex}.pkl")
            delayed.dump(pickles[-1])
        parameters = self.parameters
        self.parameters = {**parameters, "map_count": len(pickles)}
        try:
            array = self._submit_command(self._submitit_command_str)
        finally:
            self.parameters = parameters
        tasks = list(range(array.num_tasks))
        jobs = [
            self.job_class(folder=self.folder, job_id=f"{array.job_id}_{i}", tasks=tasks) for i in range(len(pickles))
        ]
        for job, pickle in zip(jobs, pickles, strict=True):
            job.paths.move_temporary_file(pickle, "submitted_pickle")
        return jobs
