"""What is said to SLURM's command-line tools, all but submission. None of it needs SLURM at import."""

from sweeps.slurm.command import SchedulerError
from sweeps.slurm.jobs import LIVE, TERMINAL, JobState, Sighting, cancel, look
from sweeps.slurm.limits import Limits, read_limits
from sweeps.slurm.request import Request, check_request

__all__ = [
    "LIVE",
    "TERMINAL",
    "JobState",
    "Limits",
    "Request",
    "SchedulerError",
    "Sighting",
    "cancel",
    "check_request",
    "look",
    "read_limits",
]
