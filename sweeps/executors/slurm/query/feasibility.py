"""Whether a job can run on the cluster at all: found out before anything is queued."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sweeps.errors import SchedulerError, UnaskedError, UserError, did_you_mean
from sweeps.executors.slurm.query.accounting import parse_minutes
from sweeps.executors.slurm.query.command import SEPARATOR, ask, call, one_line, user_name
from sweeps.executors.slurm.query.job_limits import check_job_limits
from sweeps.executors.slurm.query.request import Request

_KEY_OF_ERROR: Final = {
    "Invalid account": "account",
    "Invalid qos": "qos",
    "Invalid feature": "constraint",
    "Invalid node name": "exclude",
}
# Full now, not impossible: what doesn't fit is topped up later.
_FULL_NOW: Final = re.compile(r"(Assoc|QOS)\w*SubmitJob\w*Limit")


@dataclass(frozen=True, kw_only=True)
class _Nodes:
    """Equal nodes of a partition, as sinfo groups them."""

    partition: str
    default: bool
    state: str
    minutes: float
    cpus: int
    mem_gb: float
    gpus: Mapping[str, int]


def check_request(request: Request) -> None:
    """Ask the cluster whether a job of this shape could ever run: nodes, limits, ``sbatch --test-only``.

    Raises:
        UserError: it couldn't, or there is no SLURM to ask; names the key of the executor and what is allowed.
    """
    if shutil.which("sbatch") is None:
        raise UnaskedError(
            "executor=slurm: no sbatch on this machine: run where SLURM's commands are, or use executor=local"
        )
    try:
        _check_nodes(request, _usable(request, _all_nodes()))
        check_job_limits(request)
        # The same flags as the job's own; nothing is queued.
        test = call(["sbatch", "--test-only", *request.flags(), "--output=/dev/null", "--wrap=true"])
    except SchedulerError as error:
        raise UnaskedError(
            f"executor=slurm: the scheduler can't be asked ({error}): try again when it answers"
        ) from error
    if test.returncode and not _FULL_NOW.search(test.stderr):
        raise UserError(_refusal(request, one_line(test.stderr or test.stdout)))


def _all_nodes() -> list[_Nodes]:
    # --exact: nodes that differ aren't summed up as '4+'.
    format_ = SEPARATOR.join(("%P", "%a", "%l", "%c", "%m", "%G"))
    text = ask(["sinfo", "--all", "--noheader", "--exact", f"--format={format_}"])
    rows = [line.split(SEPARATOR) for line in text.splitlines()]
    return [
        _Nodes(
            partition=name.removesuffix("*"),
            default=name.endswith("*"),
            state=state,
            minutes=parse_minutes(limit),
            cpus=int(cpus),
            mem_gb=int(memory) / 1024,
            gpus=parse_gpus(gres),
        )
        for name, state, limit, cpus, memory, gres in (row for row in rows if len(row) == 6)
    ]


def _usable(request: Request, nodes: Sequence[_Nodes]) -> list[_Nodes]:
    """Return the nodes of the partitions that the request names, or of the default one."""
    names = list(dict.fromkeys(n.partition for n in nodes))
    listed = ", ".join(names) or "none"
    if request.partition is None:
        asked = [n.partition for n in nodes if n.default][:1]
        if not asked:
            raise UserError(f"executor.partition is not set and this cluster has no default: one of {listed}")
    else:
        asked = request.partition.split(",")
    for name in asked:
        if name not in names:
            raise UserError(
                f"executor.partition={name}: no such partition; there are {listed}.{did_you_mean(name, names)}"
            )
    closed = {n.partition: n.state for n in nodes if n.partition in asked and n.state != "up"}
    if len(closed) == len(set(asked)):
        name, state = next(iter(closed.items()))
        open_ = ", ".join(dict.fromkeys(n.partition for n in nodes if n.state == "up")) or "none"
        state = {"inact": "inactive", "drain": "draining"}.get(state, state)
        raise UserError(f"executor.partition={name}: the partition is {state} now; up are {open_}")
    return [n for n in nodes if n.partition in asked and n.partition not in closed]


def _check_nodes(request: Request, nodes: Sequence[_Nodes]) -> None:
    where = f"partition {', '.join(dict.fromkeys(n.partition for n in nodes))}"
    if request.gpus:
        _check_gpus(request, nodes, where)
    cpus = max(n.cpus for n in nodes)
    if request.cpus > cpus:
        raise UserError(f"executor.cpus={request.cpus}: nodes of {where} have at most {cpus}")
    memory = max(n.mem_gb for n in nodes)
    if request.mem_gb > memory:
        raise UserError(
            f"executor.mem_gb={request.mem_gb:g}: nodes of {where} have at most {math.floor(memory * 10) / 10:g} GB"
        )
    minutes = max(n.minutes for n in nodes)
    if request.minutes > minutes:
        raise UserError(
            f"executor.time={request.minutes} minutes: {where} allows at most {minutes:g} (its MaxTime); ask for less"
        )


def _check_gpus(request: Request, nodes: Sequence[_Nodes], where: str) -> None:
    most = max(sum(n.gpus.values()) for n in nodes)
    if not most:
        raise UserError(f"executor.gpus={request.gpus}: {where} has no GPUs; choose another one, or executor.gpus=0")
    if request.gpu_type is not None:
        types = sorted({kind for n in nodes for kind in n.gpus if kind})
        if request.gpu_type.casefold() not in (kind.casefold() for kind in types):
            there = (
                f"GPUs of {where} are: {', '.join(types)}" if types else f"GPUs of {where} have no types; leave it out"
            )
            raise UserError(f"executor.gpu_type={request.gpu_type}: {there}.{did_you_mean(request.gpu_type, types)}")
        most = max(
            sum(count for kind, count in n.gpus.items() if kind.casefold() == request.gpu_type.casefold())
            for n in nodes
        )
    if request.gpus > most:
        kind = f" of type {request.gpu_type}" if request.gpu_type else ""
        raise UserError(f"executor.gpus={request.gpus}: nodes of {where} have at most {most}{kind}")


def _refusal(request: Request, said: str) -> str:
    """Return one line for what sbatch refused, under the key that is to blame where its words tell."""
    for words, key in _KEY_OF_ERROR.items():
        if words in said:
            known = _known(key)
            value = getattr(request, key)
            hint = f"; yours are {', '.join(known)}.{did_you_mean(str(value), known)}" if known else ""
            return f"executor.{key}={value if value is not None else 'null'}: {said}{hint}"
    if "Unable to contact" in said:
        return f"executor=slurm: the controller does not answer ({said}): try again when it is up"
    if re.search("option", said) and request.extra:
        return f"executor.extra={dict(request.extra)}: sbatch says: {said}; keys are sbatch's long options"
    perhaps = ". Where a node has all that, it is down just now: sinfo shows it" if "not available" in said else ""
    return f"executor=slurm: sbatch refuses {' '.join(request.flags())}: {said}{perhaps}"


def _known(key: str) -> list[str]:
    """Return this user's accounts or QOS, where sacctmgr tells; [] where it doesn't."""
    field = {"account": "Account", "qos": "QOS"}.get(key)
    if field is None:
        return []
    try:
        text = ask(["sacctmgr", "--noheader", "--parsable2", "show", "assoc", f"user={user_name()}", f"format={field}"])
    except SchedulerError:
        return []
    return sorted({name for line in text.splitlines() for name in line.split(",") if name})


def parse_gpus(gres: str) -> dict[str, int]:
    """Return a node's GPUs by type ('' where it has none) from its GRES: 'gpu:a100:4(S:0-1),nvme:1' is {'a100': 4}."""
    found: dict[str, int] = {}
    for item in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = item.split(":")
        if name != "gpu":
            continue
        kind = rest[0] if rest and not rest[0].isdigit() else ""
        count = int(rest[-1]) if rest and rest[-1].isdigit() else 1
        found[kind] = found.get(kind, 0) + count
    return found
