"""What sbatch answers, read for certain."""

from __future__ import annotations

from pathlib import Path

import pytest
from submitit.core.utils import FailedSubmissionError

from sweeps.errors import UserError
from sweeps.executors.slurm.executor import Slurm
from sweeps.executors.slurm.query import command
from sweeps.executors.slurm.query.command import ask, ignored_variables, own_environment
from sweeps.executors.slurm.settings import SlurmSettings
from sweeps.executors.slurm.submitit_executor import SbatchExecutor
from tests import ROOT


@pytest.mark.parametrize("said", ["7\n", "7;west\n", "Welcome to job 12\n7\n", "job 12 is done\n7\nGoodbye, 3 users\n"])
def test_the_id_is_the_line_that_is_an_id(said: str) -> None:
    assert SbatchExecutor._get_job_id_from_submission_command(said) == "7"


@pytest.mark.parametrize("said", ["", "Submitted batch job 12\n", "12 jobs are queued\n"])
def test_what_is_no_id_is_not_taken_for_one(said: str) -> None:
    with pytest.raises(FailedSubmissionError, match="no job id"):
        SbatchExecutor._get_job_id_from_submission_command(said)


def test_variables_of_commands_are_left_out_but_those_that_reach_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SBATCH_QOS", "SLURM_CLUSTERS", "SQUEUE_FORMAT", "SLURM_CONF", "SLURM_JWT", "SLURMISH"):
        monkeypatch.setenv(name, "x")
    kept = own_environment()
    assert {"SLURM_CONF", "SLURM_JWT", "SLURMISH", "PATH"} <= kept.keys()
    assert {"SBATCH_QOS", "SLURM_CLUSTERS", "SQUEUE_FORMAT"}.isdisjoint(kept)
    assert set(ignored_variables()) >= {"SBATCH_QOS", "SLURM_CLUSTERS", "SQUEUE_FORMAT"}
    # A job's own shell has dozens, which nobody set.
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert "SLURM_CLUSTERS" not in ignored_variables()
    assert "SBATCH_QOS" in ignored_variables()


def test_a_command_that_fails_once_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_WAITS", (0.0, 0.0))
    script = f"echo x >> {tmp_path}/calls; [ $(wc -l < {tmp_path}/calls) -ge 3 ] && echo yes"
    assert ask(["sh", "-c", script]) == "yes\n"


@pytest.mark.parametrize("character", ["%", "\\"])
def test_a_directory_that_slurm_would_read_otherwise_is_refused(character: str) -> None:
    executor = Slurm(SlurmSettings())
    with pytest.raises(UserError, match="choose a directory without"):
        executor.check_out(ROOT / f"a{character}b")
