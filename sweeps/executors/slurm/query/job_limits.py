"""A job that accounting's limits let into the queue and never let start: found before it is submitted."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Final

from sweeps.errors import SchedulerError, UserError
from sweeps.executors.slurm.query.accounting import (
    Fields,
    Standing,
    are_limits_enforced,
    parse_minutes,
    read_config,
    read_standing,
)
from sweeps.executors.slurm.query.request import Request

_KINDS: Final = (
    ("MaxWall", "MaxWall"),
    ("MaxTRES", "MaxTRES"),
    ("MaxTRESMins", "MaxTRESMins"),
    ("GrpTRES", "GrpTRES"),
    ("GrpJobs", "GrpJobs"),
    ("MaxJobsPU", "MaxJobs"),
    ("MaxTRESPU", None),
    ("MaxTRESPA", None),
    ("MinTRES", None),
)
"""A QOS's limit, and the association's that it overrides. What one job exceeds, no number of them keeps to."""
_OF_GROUPS: Final = ("GrpTRES", "GrpJobs")
_MEBIBYTES: Final = {"": 1.0, "K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2, "P": 1024.0**3}


def check_job_limits(request: Request) -> None:
    """Refuse a job that no number of others in the queue could keep waiting, but that its limits do.

    Raises:
        UserError: names the key of the executor, its value, the limit and whose it is.
        SchedulerError: the controller can't be asked.
    """
    config = read_config()
    if not are_limits_enforced(config):
        return
    try:
        standing = read_standing(config, partition=request.partition, account=request.account, qos=request.qos)
    except SchedulerError:
        # The controller goes on without its database.
        return
    # A cluster that does not hand memory out does not hold jobs to limits of it.
    counts_memory = "MEMORY" in config.get("SelectTypeParameters", "").upper()
    problems = [
        next(_problems(request, standing, qos, counts_memory=counts_memory), None)
        for qos in standing.partitions.values()
    ]
    # Of several partitions one is enough.
    if problems and all(problems):
        raise UserError(f"{problems[0]}. SLURM would queue such jobs and never start them")


def _problems(request: Request, standing: Standing, partition_qos: str, *, counts_memory: bool) -> Iterator[str]:
    """Yield what a job exceeds in a partition of that QOS."""
    asked = _asked(request, counts_memory=counts_memory)
    for limit, owner, what, most in _limits(standing, partition_qos):
        wanted = asked.get(what)
        if limit == "MaxTRESMins" and wanted is not None:
            wanted *= request.minutes
        if wanted is None or (wanted >= most if limit == "MinTRES" else wanted <= most):
            continue
        key = _key(request, "minutes" if limit == "MaxTRESMins" else what)
        yield f"{key}: {limit} of {owner} is {_words(what, most)}"


def _limits(standing: Standing, partition_qos: str) -> Iterator[tuple[str, str, str, float]]:
    """Yield (limit, whose, of what, value): of two that SLURM lets override each other, the one that counts."""
    chain = [q for name in (partition_qos, standing.qos) if (q := standing.all_qos.get(name))]
    if "OverPartQOS" in standing.all_qos.get(standing.qos, {}).get("Flags", ""):
        chain.reverse()
    above = [(f"account {name}", standing.accounts.get(name, {})) for name in standing.lineage(standing.account)]
    mine = (f"{standing.user} in account {standing.account}", standing.association)
    for of_qos, of_association in _KINDS:
        counted: set[str] = set()
        for qos in chain:
            found = _values(of_qos, qos)
            yield from ((of_qos, f"QOS {qos['Name']}", w, v) for w, v in found.items() if w not in counted)
            counted |= found.keys()
        if of_association is None:
            continue
        for owner, values in [mine, *(above if of_association in _OF_GROUPS else [])]:
            found = _values(of_association, values)
            yield from ((of_association, owner, w, v) for w, v in found.items() if w not in counted)


def _values(limit: str, fields: Fields) -> dict[str, float]:
    """Return a limit's values by what they limit: minutes, jobs, or SLURM's names of resources; memory in MiB."""
    text = fields.get(limit, "")
    if not text:
        return {}
    if limit == "MaxWall":
        return {"minutes": parse_minutes(text)}
    if "Jobs" in limit:
        return {"jobs": float(text)} if text.isdigit() else {}
    pairs = (item.rpartition("=") for item in text.split(","))
    return {what: _number(value) for what, equals, value in pairs if equals}


def _number(text: str) -> float:
    match = re.fullmatch(r"([\d.]+)([KMGTP]?)", text)
    return float(match[1]) * _MEBIBYTES[match[2]] if match else math.inf


def _asked(request: Request, *, counts_memory: bool) -> dict[str, float]:
    asked: dict[str, float] = {
        "minutes": request.minutes,
        "jobs": 1,
        "node": 1,
        "cpu": request.cpus,
        "gres/gpu": request.gpus,
    }
    if counts_memory:
        asked["mem"] = math.ceil(request.mem_gb * 1024)
    if request.gpu_type:
        asked[f"gres/gpu:{request.gpu_type}"] = request.gpus
    return asked


def _key(request: Request, what: str) -> str:
    """Return the key of the executor that decides how much a job asks for, and its value."""
    values: Mapping[str, str] = {
        "minutes": f"executor.time={request.minutes} minutes",
        "cpu": f"executor.cpus={request.cpus}",
        "mem": f"executor.mem_gb={request.mem_gb:g}",
    }
    if what.startswith("gres/gpu"):
        return f"executor.gpus={request.gpus}"
    return values.get(what) or f"executor.account={request.account or 'null'}, executor.qos={request.qos or 'null'}"


def _words(what: str, most: float) -> str:
    if what == "minutes":
        return f"{most:g} minutes"
    return f"{most / 1024:g} GB" if what == "mem" else f"{most:g} of {what}"
