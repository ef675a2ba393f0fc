"""Running SLURM's command-line tools: with a timeout, in the C locale, without the formats that the user exports."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Final

from sweeps.errors import SchedulerError

COMMAND_SECONDS: Final = 60.0
"""A controller that is down lets its clients retry for 10 to 20 s before they give up."""
# Reasons hold commas and parentheses, other people's job names anything: the unit separator is in neither.
SEPARATOR: Final = "\x1f"
_OF_COMMANDS: Final = ("SBATCH_", "SRUN_", "SALLOC_", "SLURM_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_")
_HOW_TO_REACH: Final = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
_OF_A_JOB: Final = ("SLURM_JOB", "SLURM_STEP", "SLURM_TASK", "SLURM_NODE", "SLURM_PROC", "SLURM_LOCAL", "SLURM_GTIDS")
_WAITS: Final = (0.5, 2.0)
"""Seconds before a second and a third try of a command that failed."""


def own_environment() -> dict[str, str]:
    """Return the environment without the user's variables that would decide what SLURM's commands do.

    They count more than what a job's script asks for, and change what is printed. What says how to reach the cluster
    stays.
    """
    ignored = {k for k in os.environ if k.startswith(_OF_COMMANDS) and k not in _HOW_TO_REACH}
    return {k: v for k, v in os.environ.items() if k not in ignored}


def ignored_variables() -> tuple[str, ...]:
    """Return the variables of the user that ``own_environment`` leaves out, but for those that a job's shell has."""
    left_out = sorted(os.environ.keys() - own_environment().keys())
    in_job = "SLURM_JOB_ID" in os.environ
    return tuple(k for k in left_out if not (in_job and k.startswith("SLURM_")) and not k.startswith(_OF_A_JOB))


def call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands. SchedulerError where it is missing or takes more than COMMAND_SECONDS."""
    # %s: epoch seconds, which no time zone can blur. SLURM_BITSTR_LEN=0: array ranges in full, not 64 characters.
    environment: Mapping[str, str] = own_environment() | {
        "LC_ALL": "C",
        "SLURM_TIME_FORMAT": "%s",
        "SLURM_BITSTR_LEN": "0",
    }
    try:
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=COMMAND_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise SchedulerError(f"{command[0]} is not on this machine") from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{command[0]} did not answer within {COMMAND_SECONDS:.0f} s") from None
    except OSError as error:
        raise SchedulerError(f"{command[0]} can't be run: {error.strerror}") from error


def ask(command: Sequence[str]) -> str:
    """Return standard output of one of SLURM's commands. SchedulerError where it fails three times, too.

    A controller that doesn't answer is not asked again: its clients have tried for long enough.
    """
    done = call(command)
    for seconds in _WAITS:
        if not done.returncode or "Unable to contact" in done.stderr:
            break
        time.sleep(seconds)
        done = call(command)
    if done.returncode:
        raise SchedulerError(f"{command[0]} failed: {one_line(done.stderr or done.stdout)}")
    return done.stdout


def one_line(text: str) -> str:
    """Return what a command said, each thing once, without the command's name before every line."""
    prefix = r"^(?:s[a-z]+: (?:(?:error|fatal): )?|slurm_\w+ error: |allocation failure: )"
    lines = (re.sub(prefix, "", line.strip()) for line in text.splitlines())
    return "; ".join(dict.fromkeys(line for line in lines if line and not line.startswith("Try "))) or "no reason given"


def user_name() -> str:
    """Return who submits, as SLURM sees it: the process's user, whatever the environment says."""
    return pwd.getpwuid(os.geteuid()).pw_name
