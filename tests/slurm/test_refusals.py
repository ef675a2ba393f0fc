"""What can't work on the cluster is refused before anything is queued: one line on standard error, exit code 2."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.studies import Studies, Study

CASES: Mapping[str, tuple[list[str], str]] = {
    "partition": (["executor.partition=mian"], r"executor\.partition=mian: .*main, urgent, small.*Did you mean main\?"),
    "more GPUs than a node has": (["executor.gpus=9"], r"executor\.gpus=9: .*at most 2"),
    "a model's GPUs": (["models.demo.members.neox-xs.gpus=9"], r"executor\.gpus=9: .*at most 2"),
    "type of GPU": (["executor.gpu_type=h100"], r"executor\.gpu_type=h100: .*fake"),
    "cores": (["executor.cpus=64"], r"executor\.cpus=64: .*at most 4"),
    "memory": (["executor.mem_gb=4000"], r"executor\.mem_gb=4000: .*at most 7\.8 GB"),
    "account": (["executor.account=reserch"], r"executor\.account=reserch: .*research.*Did you mean research\?"),
    "QOS": (["executor.qos=tny"], r"executor\.qos=tny: .*Did you mean tiny\?"),
    "constraint": (["executor.constraint=h200"], r"executor\.constraint=h200: "),
    "walltime above MaxTime": (
        ["executor.partition=small", "executor.time=00:11:00"],
        r"executor\.time=11 minutes: partition small allows at most 10",
    ),
    "walltime that is none": (["executor.time=abc"], r"executor\.time='abc' .*minutes, HH:MM:SS"),
    "ambiguous walltime": (["executor.time=04:00"], r"executor\.time='04:00' is ambiguous"),
    "warning before the start": (["executor.signal_seconds=600"], r"executor\.signal_seconds=600 .*600 s"),
    "no cells": (["executor.cells_per_job=0"], r"executor\.cells_per_job=0 .*at least 1"),
    "setup": (["executor.setup=3"], r"executor\.setup=3 .*a shell line or a list"),
    "an option that sbatch lacks": (["executor.extra={frobnicate: 3}"], r"executor\.extra=.*frobnicate.*long options"),
    "options that are none": (["executor.extra=3"], r"executor\.extra=3 is not valid: long options"),
    "code": (["executor.code=snap"], r"executor\.code='snap' .*snapshot, checkout"),
    "a reference that is none": (["models.demo.members.neox-xs.reference=3"], r"neox-xs: reference=3 is not valid"),
    "a reference of nothing": (
        ["models.demo.members.neox-xs.reference={jargn_loss: 3}"],
        r"neox-xs: reference=.*'jargn_loss'.* is not valid: .*jargon",
    ),
    "a missing mount": (["out=/mnt/not-there/results"], r"out='/mnt/not-there/results': /mnt/not-there does not exist"),
    "a key of the other executor": (["executor=local"], r"executor\.\w+ is a key of executor=slurm"),
    "workers": (["executor.workers=2"], r"executor\.workers is a key of executor=local"),
    "executor": (["executor=slrum"], r"executor=slrum is not valid: one of local, slurm\. Did you mean slurm"),
    "GPUs asked for and not": (
        ["executor.device=cuda", "executor.gpus=0"],
        r"executor\.device='cuda' .*executor\.gpus=0",
    ),
}
NO_SBATCH = "no sbatch"


@pytest.fixture(scope="module")
def refused(studies: Studies) -> dict[str, tuple[Study, subprocess.CompletedProcess[str]]]:
    """Every case run as a command, two at a time."""
    made = {case: studies(re.sub(r"\W+", "-", case)) for case in (*CASES, NO_SBATCH)}
    cluster = made[NO_SBATCH].cluster
    before = our_jobs(cluster)

    def run(case: str) -> subprocess.CompletedProcess[str]:
        if case == NO_SBATCH:
            return made[case].run(env={"PATH": str(made[case].home)})
        return made[case].run(*CASES[case][0])

    with ThreadPoolExecutor(2) as pool:
        results = {case: (made[case], done) for case, done in zip(made, pool.map(run, made), strict=True)}
    assert our_jobs(cluster) <= before
    return results


def our_jobs(cluster: Cluster) -> set[str]:
    """Jobs of studies that SLURM knows, ended ones too."""
    names = cluster.command("squeue", "--noheader", "--all", "--states=all", "--format=%i:%j").split()
    return {name for name in names if name.partition(":")[2].startswith("kbit-")}


@pytest.mark.parametrize("case", [*CASES, NO_SBATCH])
def test_what_cannot_work_is_refused_in_one_line(
    case: str, refused: dict[str, tuple[Study, subprocess.CompletedProcess[str]]]
) -> None:
    study, done = refused[case]
    expected = CASES[case][1] if case != NO_SBATCH else r"executor=slurm: no sbatch on this machine"
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.match(f"error: .*{expected}", done.stderr), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""
    assert not (study.out / "launches").exists()
    assert not (study.out / "claims").exists()
