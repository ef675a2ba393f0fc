"""The number of jobs that a SLURM cluster still lets this user submit now, and the limit that says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sweeps.errors import SchedulerError
from sweeps.executors.slurm.query.accounting import Standing, are_limits_enforced, read_config, read_standing
from sweeps.executors.slurm.query.command import SEPARATOR, ask
from sweeps.executors.slurm.query.jobs import TERMINAL, array_elements


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The room that the cluster leaves to this user now.

    Attributes:
        max_array_size: an array's indices must be below it.
        room: how many more jobs may be submitted (each element of an array counts); None: no limit known.
        why: the tightest limit and its numbers for the user: 'GrpSubmitJobs of account research is 9, 8 are queued'.
        kill_wait: seconds between SIGTERM and SIGKILL.
    """

    max_array_size: int
    room: int | None
    why: str
    kill_wait: float


@dataclass(frozen=True, kw_only=True)
class _Job:
    state: str
    user: str
    account: str
    qos: str
    partitions: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class _Limit:
    """At most `most` jobs of this user, in these accounts, under this QOS or in these partitions; None: of any."""

    name: str
    most: int
    user: str | None = None
    accounts: frozenset[str] | None = None
    qos: str | None = None
    partitions: frozenset[str] | None = None

    def counts(self, job: _Job) -> bool:
        if self.user not in (None, job.user) or (self.accounts is not None and job.account not in self.accounts):
            return False
        if self.qos is None and self.partitions is None:
            return True
        return job.qos == self.qos or not (self.partitions or frozenset()).isdisjoint(job.partitions)


def read_limits(*, partition: str | None, account: str | None, qos: str | None) -> Limits:
    """Read the cluster's limits on this user's jobs, and how much of them is used.

    Without slurmdbd (no sacctmgr, or it is down) only the controller's own limits are known. Where PrivateData hides
    other people's jobs, limits shared with them look emptier than they are.

    Raises:
        SchedulerError: the controller can't be asked.
    """
    config = read_config()
    jobs = _queued_jobs()
    live = [job for job in jobs if job.state not in TERMINAL]
    limits: list[tuple[str, int, int]] = []
    if config.get("MaxJobCount", "").isdigit():
        # Ended jobs stay in the controller's memory for a while, and here they count.
        limits.append(("MaxJobCount of the cluster", int(config["MaxJobCount"]), len(jobs)))
    if are_limits_enforced(config):
        try:
            found = list(_accounting_limits(read_standing(config, partition=partition, account=account, qos=qos)))
        except SchedulerError:
            # The controller goes on without its database; what can't be known here, sbatch will say.
            found = []
        limits += [(limit.name, limit.most, sum(map(limit.counts, live))) for limit in found if limit is not None]
    name, most, used = min(limits, key=lambda limit: limit[1] - limit[2], default=("", 0, 0))
    return Limits(
        max_array_size=int(config.get("MaxArraySize", "1001")),
        room=max(0, most - used) if limits else None,
        why=f"{name} is {most}, {used} {'is' if used == 1 else 'are'} queued" if limits else "",
        kill_wait=float(config.get("KillWait", "30").split()[0]),
    )


def _accounting_limits(standing: Standing) -> Iterator[_Limit | None]:
    """Yield limits of the user's association, of the accounts above it, of the QOS and of the partitions' QOS."""
    user, account, association = standing.user, standing.account, standing.association
    only = association["Partition"]
    called = f"of {user} in account {account}" + (f", partition {only}" if only else "")
    inside = frozenset({only}) if only else None
    for what in ("MaxSubmitJobs", "GrpSubmitJobs"):
        mine = {"user": user, "accounts": frozenset({account}), "partitions": inside}
        yield _limit(f"{what} {called}", association[what], **mine)
    for name in standing.lineage(account):
        # The jobs of all accounts below count.
        below = frozenset(other for other in standing.accounts if name in standing.lineage(other))
        most = standing.accounts.get(name, {}).get("GrpSubmitJobs", "")
        yield _limit(f"GrpSubmitJobs of account {name}", most, accounts=below)
    yield from _qos_limits(standing)


def _qos_limits(standing: Standing) -> Iterator[_Limit | None]:
    """Yield limits of a job's QOS and each partition's: SLURM lets one override the other, here the tighter counts."""
    for name, qos in standing.all_qos.items():
        inside = frozenset(p for p, its in standing.partitions.items() if its == name)
        if name == standing.qos or inside:
            scope = {"qos": name, "partitions": inside}
            accounts = frozenset({standing.account})
            yield _limit(f"GrpSubmitJobs of QOS {name}", qos["GrpSubmitJobs"], **scope)
            per_user = qos["MaxSubmitJobsPerUser"]
            yield _limit(f"MaxSubmitJobsPerUser of QOS {name}", per_user, user=standing.user, **scope)
            per_account = qos["MaxSubmitJobsPerAccount"]
            yield _limit(f"MaxSubmitJobsPerAccount of QOS {name}", per_account, accounts=accounts, **scope)


def _limit(name: str, most: str, **scope: Any) -> _Limit | None:
    """Return the limit where one is set: sacctmgr writes nothing where none is."""
    return _Limit(name=name, most=int(most), **scope) if most.isdigit() else None


def _queued_jobs() -> list[_Job]:
    """Return every job and array element that the controller holds."""
    fields = ("JobArrayID", "State", "UserName", "Account", "QOS", "Partition")
    format_ = ",".join(f"{name}:{SEPARATOR}" for name in fields)
    text = ask(["squeue", "--all", "--noheader", "--states=all", f"--Format={format_}"])
    rows = [line.split(SEPARATOR) for line in text.split("\n")]
    return [
        _Job(state=state, user=user, account=account, qos=qos, partitions=partitions.split(","))
        for job, state, user, account, qos, partitions, _ in (row for row in rows if len(row) == len(fields) + 1)
        for _ in array_elements(job)
    ]
