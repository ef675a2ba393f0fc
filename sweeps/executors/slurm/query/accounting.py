"""What SLURM's accounting holds against a user's jobs: associations, accounts above them, QOS, partitions' QOS."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sweeps.errors import SchedulerError
from sweeps.executors.slurm.query.command import ask, user_name

Fields = Mapping[str, str]
"""sacctmgr's or scontrol's values by their names; '' where none is set."""

_OF_ASSOCIATION: Final = (
    *("Partition", "DefaultQOS", "MaxSubmitJobs", "GrpSubmitJobs", "MaxJobs", "GrpJobs", "MaxWall", "MaxTRES"),
    *("MaxTRESMins", "GrpTRES"),
)
_OF_ACCOUNT: Final = ("Account", "ParentName", "GrpSubmitJobs", "GrpJobs", "GrpTRES")
_OF_QOS: Final = (
    *("Name", "Flags", "GrpSubmitJobs", "MaxSubmitJobsPerUser", "MaxSubmitJobsPerAccount", "GrpJobs", "MaxJobsPU"),
    *("MaxWall", "MaxTRES", "MaxTRESMins", "MaxTRESPU", "MaxTRESPA", "MinTRES", "GrpTRES"),
)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What counts for one user's jobs in one account.

    Attributes:
        association: the user's own; its values are the account's where the user has none.
        accounts: all of the cluster, by name.
        qos: the name of the jobs' QOS.
        partitions: the name of each partition's QOS, by the partitions that jobs may run in.
        all_qos: by name.
    """

    user: str
    account: str
    association: Fields
    accounts: Mapping[str, Fields]
    qos: str
    partitions: Mapping[str, str]
    all_qos: Mapping[str, Fields]

    def lineage(self, name: str) -> list[str]:
        """Return an account and those above it."""
        above: list[str] = []
        while name and name not in above:
            above.append(name)
            name = self.accounts.get(name, {}).get("ParentName", "")
        return above


def read_config() -> Fields:
    """Return the controller's configuration. SchedulerError where it can't be asked."""
    return _pairs(ask(["scontrol", "show", "config"]))


def are_limits_enforced(config: Fields) -> bool:
    """Tell whether a cluster holds jobs to the limits of accounting."""
    return re.search("limits|safe|all", config.get("AccountingStorageEnforce", "")) is not None


def read_standing(config: Fields, *, partition: str | None, account: str | None, qos: str | None) -> Standing:
    """Read what counts for this user's jobs; None is the default.

    Raises:
        SchedulerError: accounting can't be asked, or does not know the user in that account.
    """
    user, cluster = user_name(), config.get("ClusterName", "")
    lines = ask(["scontrol", "show", "partition", "--oneliner", "--all"]).splitlines()
    partitions = {p["PartitionName"]: p.get("QoS", "") for p in map(_options, lines) if _is_asked(p, partition)}
    if account is None:
        (default, *_) = _sacctmgr("user", user, fields=["DefaultAccount"])
        account = default["DefaultAccount"]
    found = _sacctmgr("assoc", f"cluster={cluster}", f"user={user}", f"account={account}", fields=_OF_ASSOCIATION)
    # An association for the partition itself comes before the one for any.
    mine = [a for a in found if a["Partition"] in ("", *partitions)]
    association = max(mine, key=lambda a: a["Partition"], default=dict.fromkeys(_OF_ASSOCIATION, ""))
    return Standing(
        user=user,
        account=account,
        association=association,
        accounts={a["Account"]: a for a in _sacctmgr("assoc", f"cluster={cluster}", "user=", fields=_OF_ACCOUNT)},
        qos=qos or association["DefaultQOS"] or "normal",
        partitions=partitions,
        all_qos={q["Name"]: q for q in _sacctmgr("qos", fields=_OF_QOS)},
    )


def parse_minutes(text: str) -> float:
    """Return minutes of one of SLURM's times: 'infinite', '10:00' (MM:SS), '1:00:00', '2-00:00:00'."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if match is None:
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + minutes + seconds / 60


def _sacctmgr(what: str, *conditions: str, fields: Sequence[str]) -> Sequence[Fields]:
    asked = ["sacctmgr", "--noheader", "--parsable2", "--readonly", "show", what, *conditions]
    text = ask([*asked, f"format={','.join(fields)}"])
    rows = [dict(zip(fields, line.split("|"), strict=True)) for line in text.splitlines()]
    if not rows:
        raise SchedulerError(f"sacctmgr shows no {what} {' '.join(conditions)}")
    return rows


def _pairs(text: str) -> Fields:
    lines = (line.partition("=") for line in text.splitlines())
    return {key.strip(): value.strip() for key, equals, value in lines if equals}


def _options(line: str) -> Fields:
    pairs = (word.partition("=") for word in line.split())
    return {key: value for key, _, value in pairs}


def _is_asked(partition: Fields, names: str | None) -> bool:
    return partition.get("Default") == "YES" if names is None else partition.get("PartitionName") in names.split(",")
