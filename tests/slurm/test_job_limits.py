"""Limits of accounting that no job of some shape can ever keep to: refused, where SLURM lets it wait for ever."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from sweeps.errors import UserError
from sweeps.executors.slurm.query import Request, check_request
from tests.slurm.cluster import Cluster
from tests.slurm.configuration import user_name
from tests.slurm.processes import wait_until
from tests.slurm.studies import Studies


@dataclass(frozen=True, kw_only=True)
class Case:
    """A limit, and a request that exceeds it.

    Attributes:
        qos, mine, account: what sacctmgr sets: for the jobs' QOS, the user's association, the account.
        refused: what is said; None where the job starts.
    """

    qos: str = ""
    mine: str = ""
    account: str = ""
    gpus: int = 0
    cpus: int = 1
    mem_gb: float = 1.0
    refused: str | None


CASES: Mapping[str, Case] = {
    "wall": Case(mine="MaxWall=5", refused=r"executor\.time=10 minutes: MaxWall of {user} in account {name} is 5 min"),
    "cpu": Case(mine="MaxTRES=cpu=1", cpus=2, refused=r"executor\.cpus=2: MaxTRES of {user} .* is 1 of cpu"),
    # The test cluster does not hand out memory (CR_Core), so that SLURM holds nobody to this.
    "mem": Case(mine="MaxTRES=mem=1G", mem_gb=2, refused=None),
    "gpu": Case(account="MaxTRES=gres/gpu=1", gpus=2, refused=r"executor\.gpus=2: MaxTRES of .* is 1 of gres/gpu"),
    "group": Case(account="GrpTRES=cpu=1", cpus=2, refused=r"executor\.cpus=2: GrpTRES of account {name} is 1 of cpu"),
    "minutes": Case(mine="MaxTRESMins=cpu=19", cpus=2, refused=r"executor\.time=10 minutes: MaxTRESMins of .* is 19"),
    "none": Case(mine="MaxJobs=0", refused=r"executor\.account={name}, executor\.qos={name}: MaxJobs of .* is 0 of"),
    "qos": Case(qos="MaxWall=5", refused=r"executor\.time=10 minutes: MaxWall of QOS {name} is 5 minutes"),
    "user": Case(qos="MaxTRESPU=cpu=1", cpus=2, refused=r"executor\.cpus=2: MaxTRESPU of QOS {name} is 1 of cpu"),
    "least": Case(qos="MinTRES=cpu=2", refused=r"executor\.cpus=1: MinTRES of QOS {name} is 2 of cpu"),
    "at once": Case(
        qos="MaxWall=5 flags=DenyOnLimit", refused=r"executor\.time=10 minutes: MaxWall of QOS {name} is 5"
    ),
    # SLURM lets the QOS's limit count, though the association's is smaller.
    "overridden": Case(qos="MaxWall=20 GrpTRES=cpu=4", mine="MaxWall=5 GrpTRES=cpu=1", cpus=2, refused=None),
    "kept": Case(mine="MaxWall=10 MaxTRES=cpu=2,mem=2G GrpTRES=cpu=2 MaxJobs=1", cpus=2, mem_gb=2, refused=None),
}


def called(case: str) -> str:
    """The account and the QOS of a case."""
    return f"limit-{case.replace(' ', '-')}"


@pytest.fixture(scope="module")
def limited(cluster: Cluster) -> Cluster:
    """An account and a QOS a case, with their limits. They stay: nobody else uses them, and removing takes seconds."""
    names, user = ",".join(map(called, CASES)), user_name()
    lines = [f"delete account {names}", f"delete qos {names}"]
    lines += [f"add account {names} cluster=kbit", f"add qos {names}", f"add user {user} account={names} qos={names}"]
    for case, limits in CASES.items():
        for whose, what in (
            (f"qos {called(case)}", limits.qos),
            (f"account {called(case)}", limits.account),
            (f"user {user} where account={called(case)}", limits.mine),
        ):
            lines += [f"modify {whose} set {what}"] if what else []
    text = "\n".join([*lines, "exit", ""])
    # One process: each of its own takes a second. That there was nothing to delete is a failure to it.
    subprocess.run(
        ["sacctmgr", "--immediate"], input=text, env=cluster.environment(), capture_output=True, text=True, check=False
    )
    return cluster


def request_of(case: str) -> Request:
    asked = CASES[case]
    return Request(
        partition=None,
        account=called(case),
        qos=called(case),
        gpus=asked.gpus,
        gpu_type=None,
        cpus=asked.cpus,
        mem_gb=asked.mem_gb,
        minutes=10,
        constraint=None,
        extra={},
        exclude=None,
    )


@pytest.mark.parametrize("case", CASES)
def test_a_job_that_its_limits_never_let_start_is_refused(
    case: str, limited: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(limited.config))
    refused = CASES[case].refused
    if refused is None:
        check_request(request_of(case))
        return
    expected = refused.format(user=user_name(), name=called(case))
    with pytest.raises(UserError, match=expected):
        check_request(request_of(case))


def test_slurm_itself_starts_just_the_jobs_that_are_not_refused(limited: Cluster) -> None:
    """What it says of each case is the ground for refusing it."""
    jobs = {}
    for case in CASES:
        asked = ["sbatch", "--parsable", "--output=/dev/null", *request_of(case).flags(), "--wrap=true"]
        submitted = subprocess.run(asked, env=limited.environment(), capture_output=True, text=True)
        if "DenyOnLimit" in CASES[case].qos:
            assert submitted.returncode
        else:
            jobs[case] = submitted.stdout.strip()
    said: dict[str, tuple[str, str]] = {}

    def settled() -> bool:
        lines = limited.command("squeue", "-h", "--states=all", "-o", "%i|%T|%r").splitlines()
        known = {job: (state, reason) for job, state, reason in (line.split("|") for line in lines)}
        said.update({case: known[job] for case, job in jobs.items()})
        return all(state == "COMPLETED" or reason.startswith(("Assoc", "QOS")) for state, reason in said.values())

    try:
        wait_until(f"SLURM's word on {len(jobs)} jobs", settled, 60)
    finally:
        limited.command("scancel", *jobs.values())
    assert {case for case, (state, _) in said.items() if state == "COMPLETED"} == {
        case for case, limits in CASES.items() if limits.refused is None
    }


def test_a_launch_beyond_its_limits_submits_nothing(limited: Cluster, studies: Studies) -> None:
    study = studies("beyond")
    name = called("wall")
    refused = study.run(f"executor.account={name}", f"executor.qos={name}", "executor.gpus=0")
    assert refused.returncode == 2
    (said,) = refused.stderr.splitlines()
    assert "executor.time=10 minutes: MaxWall of" in said
    assert "SLURM would queue such jobs and never start them" in said
    assert not (study.out / "launches").exists()
    assert study.jobs() == {}
