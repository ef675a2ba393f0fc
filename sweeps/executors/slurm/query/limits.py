"""The number of jobs that a SLURM cluster still lets this user submit now, and the limit that says so."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sweeps.errors import SchedulerError
from sweeps.executors.slurm.query.command import SEPARATOR, ask, user_name
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
    config = _pairs(ask(["scontrol", "show", "config"]))
    jobs = _queued_jobs()
    live = [job for job in jobs if job.state not in TERMINAL]
    limits: list[tuple[str, int, int]] = []
    if config.get("MaxJobCount", "").isdigit():
        # Ended jobs stay in the controller's memory for a while, and here they count.
        limits.append(("MaxJobCount of the cluster", int(config["MaxJobCount"]), len(jobs)))
    if re.search("limits|safe|all", config.get("AccountingStorageEnforce", "")):
        try:
            found = list(_accounting_limits(config.get("ClusterName", ""), partition, account, qos))
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


def _accounting_limits(
    cluster: str, partition: str | None, account: str | None, qos: str | None
) -> Iterator[_Limit | None]:
    """Yield limits of the user's association, of the accounts above it, of the QOS and of the partitions' QOS."""
    user = user_name()
    lines = ask(["scontrol", "show", "partition", "--oneliner", "--all"]).splitlines()
    partitions = {p["PartitionName"]: p for p in map(_options, lines) if _is_asked(p, partition)}
    if account is None:
        ((account, *_), *_) = _sacctmgr("user", user, fields="DefaultAccount")
    where = (f"cluster={cluster}", f"user={user}", f"account={account}")
    rows = _sacctmgr("assoc", *where, fields="Partition,MaxSubmitJobs,GrpSubmitJobs,DefaultQOS")
    # An association for the partition itself comes before the one for any.
    for only, most, group, default in sorted(rows, reverse=True):
        if only and only not in partitions:
            continue
        called = f"of {user} in account {account}" + (f", partition {only}" if only else "")
        inside = frozenset({only}) if only else None
        for what, value in (("MaxSubmitJobs", most), ("GrpSubmitJobs", group)):
            yield _limit(f"{what} {called}", value, user=user, accounts=frozenset({account}), partitions=inside)
        qos = qos or default
        break
    yield from _account_limits(cluster, account)
    yield from _qos_limits(user, account, qos or "normal", {name: p.get("QoS", "") for name, p in partitions.items()})


def _account_limits(cluster: str, account: str) -> Iterator[_Limit | None]:
    """Yield GrpSubmitJobs of the account and of those above it: the jobs of all accounts below count."""
    rows = _sacctmgr("assoc", f"cluster={cluster}", "user=", fields="Account,ParentName,GrpSubmitJobs")
    parents = {name: parent for name, parent, _ in rows}

    def lineage(name: str) -> list[str]:
        above: list[str] = []
        while name and name not in above:
            above.append(name)
            name = parents.get(name, "")
        return above

    for name, _, most in rows:
        if name in lineage(account):
            below = frozenset(other for other in parents if name in lineage(other))
            yield _limit(f"GrpSubmitJobs of account {name}", most, accounts=below)


def _qos_limits(user: str, account: str, qos: str, of_partition: Mapping[str, str]) -> Iterator[_Limit | None]:
    """Yield limits of a job's QOS and each partition's: SLURM lets one override the other, here the tighter counts."""
    fields = "Name,GrpSubmitJobs,MaxSubmitJobsPerUser,MaxSubmitJobsPerAccount"
    for name, group, per_user, per_account in _sacctmgr("qos", fields=fields):
        inside = frozenset(p for p, its in of_partition.items() if its == name)
        if name == qos or inside:
            under = {"qos": name, "partitions": inside}
            yield _limit(f"GrpSubmitJobs of QOS {name}", group, **under)
            yield _limit(f"MaxSubmitJobsPerUser of QOS {name}", per_user, user=user, **under)
            accounts = frozenset({account})
            yield _limit(f"MaxSubmitJobsPerAccount of QOS {name}", per_account, accounts=accounts, **under)


def _limit(name: str, most: str, **scope: Any) -> _Limit | None:
    """Return the limit where one is set: sacctmgr writes nothing where none is."""
    return _Limit(name=name, most=int(most), **scope) if most.isdigit() else None


def _sacctmgr(what: str, *conditions: str, fields: str) -> list[list[str]]:
    text = ask(["sacctmgr", "--noheader", "--parsable2", "--readonly", "show", what, *conditions, f"format={fields}"])
    rows = [line.split("|") for line in text.splitlines()]
    if not rows:
        raise SchedulerError(f"sacctmgr shows no {what} {' '.join(conditions)}")
    return rows


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


def _pairs(text: str) -> dict[str, str]:
    lines = (line.partition("=") for line in text.splitlines())
    return {key.strip(): value.strip() for key, equals, value in lines if equals}


def _options(line: str) -> dict[str, str]:
    pairs = (word.partition("=") for word in line.split())
    return {key: value for key, _, value in pairs}


def _is_asked(partition: Mapping[str, str], names: str | None) -> bool:
    return partition.get("Default") == "YES" if names is None else partition.get("PartitionName") in names.split(",")
