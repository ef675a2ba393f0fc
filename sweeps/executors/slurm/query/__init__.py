"""Calls of SLURM's command-line tools, all but submission. None of it needs SLURM at import."""

from sweeps.executors.slurm.query.feasibility import check_request
from sweeps.executors.slurm.query.jobs import LIVE, TERMINAL, JobSnapshot, JobState, cancel, query_jobs
from sweeps.executors.slurm.query.limits import Limits, read_limits
from sweeps.executors.slurm.query.request import Request

__all__ = [
    "LIVE",
    "TERMINAL",
    "JobSnapshot",
    "JobState",
    "Limits",
    "Request",
    "cancel",
    "check_request",
    "query_jobs",
    "read_limits",
]
