"""The states of a measurement, and so of a cell: what each means, whether it runs again, and what a user should do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final


class Runs(Enum):
    """Rules for whether a launch runs a measurement that is in a state."""

    ALWAYS = "in every launch"
    UNLESS_TOLD = "in every launch but with retry=none"
    IF_ASKED = "where retry= names the state, or with retry=all"
    NEVER = "in no launch"


@dataclass(frozen=True, kw_only=True)
class About:
    """The meaning of a state.

    Attributes:
        meaning: in words.
        runs: whether a launch runs it (again).
        advice: for the user, of the cells in this state.
        is_final: it is a result: a number, or the knowledge that there is none.
    """

    meaning: str
    runs: Runs
    advice: str
    is_final: bool = False


class State(StrEnum):
    """A measurement's state. A cell's is the first of these that one of its measurements has.

    All but the last are of what is planned.
    """

    RUNNING = "running"
    FAILED = "failed"
    OOM = "oom"
    TIMEOUT = "timeout"
    NODE_FAIL = "node_fail"
    PREEMPTED = "preempted"
    CANCELLED = "cancelled"
    LOST = "lost"
    QUEUED = "queued"
    MISSING = "missing"
    DIVERGED = "diverged"
    DONE = "done"
    SUPERSEDED = "superseded"

    @property
    def meaning(self) -> str:
        return _ABOUT[self].meaning

    @property
    def runs(self) -> Runs:
        return _ABOUT[self].runs

    @property
    def advice(self) -> str:
        return _ABOUT[self].advice

    @property
    def is_final(self) -> bool:
        return _ABOUT[self].is_final


_ABOUT: Final[Mapping[State, About]] = {
    State.RUNNING: About(
        meaning="a worker is measuring it",
        runs=Runs.NEVER,
        advice="they are being measured",
    ),
    State.FAILED: About(
        meaning="it raised an exception or killed its worker",
        runs=Runs.IF_ASKED,
        advice="mode=logs shows why",
    ),
    State.OOM: About(
        meaning="it ran out of memory at the smallest batch",
        runs=Runs.IF_ASKED,
        advice="they ran out of memory; 'retry=[oom]' runs them with a larger job",
    ),
    State.TIMEOUT: About(
        meaning="its job's walltime ended first",
        runs=Runs.UNLESS_TOLD,
        advice="they did not finish in their job's walltime; the same command goes on with them",
    ),
    State.NODE_FAIL: About(
        meaning="its node failed",
        runs=Runs.UNLESS_TOLD,
        advice="they were on a node that failed; the same command runs them elsewhere",
    ),
    State.PREEMPTED: About(
        meaning="its job was preempted and not requeued",
        runs=Runs.UNLESS_TOLD,
        advice="they were preempted and not requeued; the same command runs them",
    ),
    State.CANCELLED: About(
        meaning="its job was cancelled",
        runs=Runs.UNLESS_TOLD,
        advice="their jobs were cancelled; the same command runs them",
    ),
    State.LOST: About(
        meaning="its job or launch died without a word",
        runs=Runs.UNLESS_TOLD,
        advice="they were being run when their job or launch died; the same command runs them, mode=logs says more",
    ),
    State.QUEUED: About(
        meaning="a launch holds it and has not begun it",
        runs=Runs.NEVER,
        advice="they wait for a worker or a job",
    ),
    State.MISSING: About(
        meaning="it is planned, and nobody has begun it",
        runs=Runs.ALWAYS,
        advice="the same command runs them",
    ),
    State.DIVERGED: About(
        meaning="it was measured, and its numbers are not finite or exploded",
        runs=Runs.IF_ASKED,
        advice="they are results; 'retry=[diverged]' measures them again",
        is_final=True,
    ),
    State.DONE: About(
        meaning="it was measured",
        runs=Runs.NEVER,
        advice="they are results",
        is_final=True,
    ),
    State.SUPERSEDED: About(
        meaning="an earlier launch of its study planned it, the newest does not, and it has no result",
        runs=Runs.NEVER,
        advice="the newest launch of their study has others in their place",
    ),
}

FINAL: Final = tuple(s for s in State if s.is_final)
UNRECORDED: Final = tuple(s for s in State if s.runs is Runs.UNLESS_TOLD)
"""How work ends without a record, and not by its own fault."""
RETRY: Final = (*(s for s in State if s.runs is Runs.IF_ASKED), *UNRECORDED)
"""What ``retry=`` can name."""
FAILURES: Final = tuple(s for s in State if s in RETRY and not s.is_final)
"""Ends without a result."""
RECORDED: Final = (State.DONE, State.DIVERGED, State.FAILED)
"""What a stored row's column 'status' can say; running out of memory is a failure with an error_type of its own."""
