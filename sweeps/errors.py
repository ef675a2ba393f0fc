"""Every exception of a sweep, and the exit codes.

    SweepError                  1   whatever a sweep raises of its own
    ├── UserError               2   the request can't be carried out as asked; nothing was run
    │   ├── StoreError              the results directory can't be used
    │   ├── HubError                a model or dataset can't be identified, found or fetched
    │   │   └── UnreachableError        the hub can't be asked
    │   ├── UnaskedError            a scheduler is not there, or can't be asked just now
    │   ├── TaskError               a task can't be run
    │   ├── CodeChangedError        the code is not what was launched
    │   ├── DataChangedError        the data are not what was launched
    │   ├── NotYetError             what has to be measured first is not stored
    │   └── OtherDeviceError        a measurement of one device, on another
    ├── ClaimTakenError             another launch was faster
    ├── PoolError                   workers can't run at all
    │   └── LoadError               a first model can't be loaded on this node
    ├── WriteError (OSError)        results can't be written
    ├── LinkError (OSError)         the file system can't make hard links
    ├── JobError                    a SLURM job can't do its work
    ├── SchedulerError              a command of SLURM failed
    ├── SubmitError                 sbatch failed
    ├── VanishedError               a file of results is not there any more: another has its rows
    ├── RefusedError                W&B refuses the configuration
    └── AwayError (OSError)         W&B can't be reached, or has no such place

    kbit.errors.SpecError       2   a specification that can't exist

The number is the exit code of a command that such an error ends. An OSError that is none of these ends it with 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import ClassVar, Final

EXIT_FAILED: Final = 1
"""Something that was run failed, or is not finished."""
EXIT_BAD_INPUT: Final = 2
"""The request is wrong; nothing was run."""
EXIT_INTERRUPTED: Final = 130
"""The user stopped it with Ctrl-C."""
EXIT_IO: Final = os.EX_IOERR
"""A worker can't write results: no cell's fault, and no use in starting another worker."""
EXIT_LOAD: Final = os.EX_TEMPFAIL
"""A worker could not load its first model, where that may be the node's fault."""


class SweepError(Exception):
    """Whatever a sweep raises of its own; the message is for the user."""

    exit_code: ClassVar[int] = EXIT_FAILED


class UserError(SweepError):
    """The request can't be carried out as asked; the message says why and what to do."""

    exit_code = EXIT_BAD_INPUT


class StoreError(UserError):
    """The results directory can't be used."""


class HubError(UserError):
    """A model or dataset can't be identified, found or fetched."""


class UnreachableError(HubError):
    """The hub can't be asked, and the cache doesn't know: what is asked for may well be there."""


class UnaskedError(UserError):
    """Whether a scheduler takes a request is unknown: it is not there, or can't be asked just now."""


class TaskError(UserError):
    """A task can't be run: unknown, a group, or not defined in YAML."""


class CodeChangedError(UserError):
    """The code, or a copy of it, is not what it was when the study was launched."""


class DataChangedError(UserError):
    """A data file is gone, or not what it was when the study was launched."""


class NotYetError(UserError):
    """What a measurement needs first is not stored, and its pack doesn't measure it: it is left for a later launch."""


class OtherDeviceError(UserError):
    """A measurement of one device, on another."""


class ClaimTakenError(SweepError):
    """Another launch created this number first: plan again."""


class PoolError(SweepError):
    """Workers can't run at all; the message ends with what they last said."""


class LoadError(PoolError):
    """A worker that may leave it to another node could not load its first model; the message ends with its log."""


class WriteError(SweepError, OSError):
    """Results can't be written; what a worker said of it."""


class LinkError(SweepError, OSError):
    """The file system can't make hard links; says for which file."""


class JobError(SweepError):
    """A SLURM job can't do its work; the message says why."""


class SchedulerError(SweepError):
    """A scheduler's command failed, timed out or is missing; says which command and what it said."""


class SubmitError(SweepError):
    """sbatch failed; the message says what it said."""


class VanishedError(SweepError):
    """A file of results vanished since it was listed: its rows are in another one by now."""


class RefusedError(SweepError):
    """W&B can't be used as configured (no key, a wrong key): trying again won't help."""


class AwayError(SweepError, OSError):
    """W&B can't be reached, is asked too often, or has no such place for this key: other requests would fare alike."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean x?' or '', to append to a message."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""
