"""What the fault matrix needs: tests that wait side by side, the processes of a job, a launch stopped at its sbatch."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import re
import shutil
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sweeps import load_results
from sweeps.launches.launch import Attempt
from tests.slurm.cluster import Cluster
from tests.slurm.studies import Study

AT_ONCE = 8
"""Scenarios that run at the same time: each mostly waits, but starting a job costs a core some seconds."""
TINY = (
    "executor.gpus=0",
    "executor.preflight=false",
    # Nodes n1 and n2 are taken down; on n4 jobs are preempted.
    "executor.exclude='n1,n2,n4'",
    "executor.cells_per_job=6",
    "sweep.quant=[{bits: [3, 4], dtype: [int, float, quantile]}]",
    "eval.tokens=12000",
)
"""6 cells in one job, each of a third of a second: time to be hit in the middle of one."""
TINY_CELLS = 6

Scenario = Callable[[Study], Any]
Outcomes = Mapping[str, "Future[str]"]


def side_by_side(scenario: Scenario) -> Callable[..., None]:
    """Make a test of a scenario that runs while others do; what it returns is printed.

    Of a generator, the part before its first yield runs alone, before all others; its second yields what is printed.
    """

    @functools.wraps(scenario)
    def test(request: pytest.FixtureRequest, outcomes: Outcomes) -> None:
        print(f"{request.node.name}: {outcomes[request.node.nodeid].result()}")

    # pytest would take the scenario's parameter for a fixture.
    del test.__wrapped__
    test.scenario = scenario  # type: ignore[attr-defined]
    return test


@contextmanager
def running_scenarios(items: list[pytest.Item], cluster: Cluster, home: Path) -> Iterator[Outcomes]:
    """Run the scenarios of the tests that were selected, in their order, ``AT_ONCE`` at a time."""
    chosen = {i.nodeid: i.function.scenario for i in items if hasattr(getattr(i, "function", None), "scenario")}
    studies = {nodeid: Study(cluster=cluster, home=home / each.__name__) for nodeid, each in chosen.items()}
    alone: dict[str, tuple[Iterator[str], Future[str]]] = {}

    def run(nodeid: str) -> str:
        study = studies[nodeid]
        try:
            if nodeid not in alone:
                study.home.mkdir()
                return chosen[nodeid](study)
            parts, first = alone[nodeid]
            first.result()
            return next(parts)
        finally:
            for results in study.home.rglob("results"):
                replace(study, home=results.parent).cancel_all()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for nodeid, scenario in chosen.items():
            if inspect.isgeneratorfunction(scenario):
                studies[nodeid].home.mkdir()
                parts = scenario(studies[nodeid])
                alone[nodeid] = (parts, pool.submit(next, parts))
                wait([alone[nodeid][1]])
        futures = {nodeid: pool.submit(run, nodeid) for nodeid in sorted(chosen, key=lambda n: n not in alone)}
        try:
            yield futures
        finally:
            for future in futures.values():
                future.cancel()


def resume(study: Study, *args: str, cells: int = TINY_CELLS, twice: int = 0) -> str:
    """The same command again: afterwards every cell is done, with one row a measurement. Returns figures to print."""
    again = study.launch(*args)
    assert again.returncode == 0, again.stdout
    study.wait_idle()
    study.assert_whole(cells=cells, twice=twice)
    words = re.findall(r"nothing to submit|\d+ jobs? submitted for [^,]*", again.stdout)
    return f"the resume: {words[0]}; computed twice: {study.computed_twice()}"


def states(study: Study) -> dict[str, int]:
    """Cells by state, as mode=status counts them, after it has asked SLURM."""
    said = study.launch("mode=status")
    assert said.returncode == 0, said.stdout
    return counts_of(study)


def counts_of(study: Study) -> dict[str, int]:
    """Cells by state, by what is on disk."""
    return {str(k): int(v) for k, v in load_results(study.out)["status"].value_counts().items()}


def attempts(study: Study) -> list[Attempt]:
    """Every attempt at every pack of a study, oldest first."""
    found = [a for la in study.launches() for of_pack in la.attempts(la.places).values() for a in of_pack]
    return sorted(found, key=lambda a: a.started)


def records(study: Study) -> list[str]:
    """The states of all runs of a study's jobs, requeues apart, as sacct's duplicates tell them; oldest first."""
    names = ",".join(la.chunk_name(c.number) for la in study.launches() for c in la.chunks)
    deadline = time.monotonic() + 30
    while True:
        said = study.cluster.command("sacct", "-D", "-X", "-n", "-P", "--name", names, "-o", "DBIndex,State")
        rows = sorted((int(line.split("|")[0]), line.split("|")[1].split()[0]) for line in said.splitlines())
        states = [state for _, state in rows]
        # Accounting lags behind the queue.
        if not {"RUNNING", "PENDING", "COMPLETING"} & set(states) or time.monotonic() > deadline:
            return states
        time.sleep(0.5)


@dataclass(frozen=True, kw_only=True)
class JobProcess:
    """A process of one of a study's jobs.

    Attributes:
        kind: 'worker', 'supervisor' (which watches over it), 'shell' (the batch script) or 'other' (srun).
    """

    pid: int
    kind: str
    job: str

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def continue_(self) -> None:
        self.kill(signal.SIGCONT)

    def parent(self) -> int:
        return int(Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[1])


def processes(study: Study, kind: str) -> list[JobProcess]:
    """The processes of a study's running jobs, told by the environment that SLURM gives them."""
    names = {la.chunk_name(c.number) for la in study.launches() for c in la.chunks}
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        # Processes end while they are looked at.
        with suppress(OSError):
            lines = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            env = dict(line.partition("=")[::2] for line in lines)
            argv = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if env.get("SLURM_CONF") == str(study.cluster.config) and env.get("SLURM_JOB_NAME") in names:
                array = env.get("SLURM_ARRAY_JOB_ID")
                job = f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else env["SLURM_JOB_ID"]
                found.append(JobProcess(pid=int(entry.name), kind=_kind(argv), job=job))
    return [p for p in found if p.kind == kind]


def _kind(argv: list[str]) -> str:
    if "sweeps.worker" in argv:
        return "worker"
    if "sweeps.executors.slurm.node.job" in argv and "python" in argv[0]:
        return "supervisor"
    return "shell" if any(word.endswith("slurm_script") for word in argv) else "other"


def wait_process(study: Study, kind: str, *, job: str | None = None) -> JobProcess:
    """A process of this kind, of any job or of one, once there is one."""
    found: list[JobProcess] = []

    def seen() -> bool:
        found[:] = [p for p in processes(study, kind) if job in (None, p.job)]
        return bool(found)

    study.wait(seen)
    return found[0]


def measuring(study: Study, *, attempt: int = 1) -> str | None:
    """What the study's attempt of this number is measuring by its own word; None when it does not, or has ended."""
    made = attempts(study)
    return made[attempt - 1].measuring if len(made) >= attempt and made[attempt - 1].end is None else None


def wait_measuring(study: Study, *, attempt: int = 1, stored: bool = True) -> str:
    """What is being measured, once something is; where some are to be ``stored``, not the first."""
    study.wait(lambda: measuring(study, attempt=attempt) and (not stored or has_parts(study)))
    return measuring(study, attempt=attempt) or wait_measuring(study, attempt=attempt, stored=stored)


def has_parts(study: Study) -> bool:
    """Whether a measurement was stored by a job that runs."""
    return any(study.out.glob("parts/*.rows"))


def freeze(study: Study, *, stored: bool = True) -> JobProcess:
    """Stop the first job's worker in a measurement, one being stored: a cell that takes for ever, but no CPU.

    Args:
        study: whose.
        stored: not in the first, so that its file of results is open.
    """
    wait_measuring(study, stored=stored)
    worker = wait_process(study, "worker", job=attempts(study)[0].job)
    worker.kill(signal.SIGSTOP)
    return worker


@dataclass(frozen=True, kw_only=True)
class HeldSbatch:
    """A launch whose sbatch, the real one, is held up before or after a submission until it is let go.

    Attributes:
        directory: for the wrapper, earlier in PATH than sbatch.
    """

    directory: Path

    def environment(self, *, submission: int, when: str) -> dict[str, str]:
        """For ``Study.start``: hold up submission number 1, 2, ... 'before' or 'after' sbatch."""
        self.directory.mkdir()
        script = self.directory / "sbatch"
        script.write_text(
            textwrap.dedent(f"""\
            #!/bin/sh
            hold() {{ touch reached; until [ -e go ]; do sleep 0.1; done; }}
            case "$*" in *--test-only*) exec {shutil.which("sbatch")} "$@";; esac
            directory={self.directory}
            echo >> $directory/count
            mine=$(wc -l < $directory/count)
            [ $mine = {submission} ] && [ {when} = before ] && (cd $directory; hold)
            said=$({shutil.which("sbatch")} "$@"); code=$?
            [ $mine = {submission} ] && [ {when} = after ] && (cd $directory; hold)
            echo "$said"; exit $code
            """)
        )
        script.chmod(0o755)
        return {"PATH": f"{self.directory}{os.pathsep}{os.environ['PATH']}"}

    def reached(self) -> bool:
        return (self.directory / "reached").exists()

    def let_go(self) -> None:
        (self.directory / "go").touch()


def kill_launch(process: subprocess.Popen[Any]) -> None:
    """SIGKILL, as when the login node dies."""
    process.kill()
    process.communicate()


def odd_answers(directory: Path, **commands: str) -> dict[str, str]:
    """For ``Study.start``: SLURM's clients by name, each followed by a shell filter of what the real one says."""
    directory.mkdir()
    for name, rest in commands.items():
        script = directory / name
        script.write_text(f'#!/bin/sh\n{shutil.which(name)} "$@" {rest}\n')
        script.chmod(0o755)
    return {"PATH": f"{directory}{os.pathsep}{os.environ['PATH']}"}


def fill(path: Path) -> None:
    """Write until nothing more fits."""
    try:
        with path.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
