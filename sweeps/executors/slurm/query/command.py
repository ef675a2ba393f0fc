"""Running SLURM's command-line tools: with a timeout, in the C locale, without the formats that the user exports."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from collections.abc import Sequence
from typing import Final

from sweeps.errors import SchedulerError

COMMAND_SECONDS: Final = 60.0
"""A controller that is down lets its clients retry for 10 to 20 s before they give up."""
# Reasons hold commas and parentheses, other people's job names anything: the unit separator is in neither.
SEPARATOR: Final = "\x1f"
_USERS_FORMATS: Final = ("SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_")


def call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands. SchedulerError where it is missing or takes more than COMMAND_SECONDS."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(_USERS_FORMATS)}
    # %s: epoch seconds, which no time zone can blur. SLURM_BITSTR_LEN=0: array ranges in full, not 64 characters.
    environment |= {"LC_ALL": "C", "SLURM_TIME_FORMAT": "%s", "SLURM_BITSTR_LEN": "0"}
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
    """Return standard output of one of SLURM's commands. SchedulerError where it fails, too."""
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
