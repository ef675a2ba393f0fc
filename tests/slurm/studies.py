"""A study on the test cluster as a user has it: commands, waiting for what they started, and what came of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pandas as pd

from sweeps import load_results
from sweeps.launches.launch import Launch, launches
from sweeps.store.parts import Store
from tests.conftest import ROOT, unreported
from tests.forks import forks
from tests.slurm.cluster import Cluster

SMALL = (
    "executor=slurm",
    "executor.device=cpu",
    "executor.gpus=1",
    "executor.cpus=1",
    "executor.mem_gb=1.5",
    "executor.time=10",
    "executor.cells_per_job=4",
    "sweep.sizes=[neox-xs]",
    "eval.tasks=[]",
    "eval.tokens=1024",
    "sweep.quant=[{bits: 16}, {bits: [3, 4, 5, 6], dtype: [int, float, quantile]}]",
)
"""13 cells of a tenth of a second each, in 4 jobs."""
CELLS = 13
COMMANDS = ("sbatch", "squeue", "sacct", "scancel", "scontrol", "sinfo", "sacctmgr")


@dataclass(frozen=True, kw_only=True)
class Counted:
    """SLURM's commands behind scripts that note each call, so that a test can count what really was asked."""

    directory: Path

    def __post_init__(self) -> None:
        for name in COMMANDS:
            script = self.directory / name
            script.write_text(f'#!/bin/sh\necho {name} >> {self.directory}/calls\nexec {shutil.which(name)} "$@"\n')
            script.chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": f"{self.directory}{os.pathsep}{os.environ['PATH']}"}

    def calls(self) -> Counter[str]:
        """How often each was called since the last time."""
        file = self.directory / "calls"
        counts = Counter(file.read_text().split()) if file.exists() else Counter[str]()
        file.unlink(missing_ok=True)
        return counts


@dataclass(frozen=True, kw_only=True)
class Study:
    """One results directory on the cluster."""

    cluster: Cluster
    home: Path

    @property
    def out(self) -> Path:
        return self.home / "results"

    def start(
        self, *args: str, env: dict[str, str] | None = None, output: int | IO[str] = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        """``python launch.py`` with the small study's arguments and these, not waited for."""
        command = [sys.executable, str(ROOT / "launch.py"), f"out={self.out}", *SMALL, *unreported(args)]
        environment = {**self.cluster.environment(), "COLUMNS": "200", **(env or {})}
        return subprocess.Popen(
            command, cwd=self.home, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True
        )

    def launch(self, *args: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """The same, waited for."""
        environment = self.cluster.environment() | {"COLUMNS": "200"}
        asked = (f"out={self.out}", *SMALL, *unreported(args))
        return forks().run(*asked, cwd=self.home, env=environment, together=True, timeout=timeout)

    def run(
        self, *args: str, env: dict[str, str] | None = None, program: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        """The same with standard output and error apart; ``program`` is the checkout whose launch.py runs."""
        asked = (f"out={self.out}", *SMALL, *unreported(args))
        environment = {**self.cluster.environment(), "COLUMNS": "200", **(env or {})}
        if program == ROOT:
            return forks().run(*asked, cwd=self.home, env=environment, timeout=180)
        command = [sys.executable, str(program / "launch.py"), *asked]
        return subprocess.run(
            command, cwd=self.home, env=environment, capture_output=True, text=True, timeout=180, check=False
        )

    def submit(self, *args: str) -> Launch:
        """Launch, expect success, and return the launch that it made."""
        before = {la.id for la in self.launches()}
        done = self.launch(*args)
        assert done.returncode == 0, done.stdout
        (new,) = [la for la in self.launches() if la.id not in before]
        return new

    def launches(self) -> list[Launch]:
        return launches(self.out) if self.out.exists() else []

    def jobs(self) -> dict[str, str]:
        """State by job id of this study's live jobs, packs only; from squeue."""
        names = ",".join(la.chunk_name(c.number) for la in self.launches() for c in la.chunks)
        if not names:
            return {}
        said = self.cluster.command("squeue", "--noheader", "--array", "--name", names, "--format", "%i %T")
        return dict(line.split() for line in said.splitlines() if line.strip())

    def wait(self, what: Callable[[], object], seconds: float = 120.0) -> None:
        """Until something is true."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"not within {seconds} s; {self.report()}"
            time.sleep(0.2)

    def wait_idle(self, seconds: float = 180.0) -> None:
        """Until no job of this study is queued or running."""
        self.wait(lambda: not self.jobs(), seconds)

    def wait_parts(self, count: int) -> None:
        """Until so many measurements are stored."""
        self.wait(lambda: len(self.row_ids()) >= count)

    def row_ids(self) -> pd.Series[str]:
        """Measurement by row id of every row on disk, those that don't count included: what was ever computed."""
        rows = Store(out=self.out).history(["row_id", "measurement"])
        return pd.DataFrame(rows, columns=["row_id", "measurement"]).set_index("row_id")["measurement"]

    def computed_twice(self) -> int:
        return int(self.row_ids().duplicated().sum())

    def assert_whole(self, *, cells: int = CELLS, twice: int = 0) -> None:
        """Every cell is done, with one row a measurement; at most ``twice`` were computed again."""
        results = load_results(self.out)
        assert len(results) == cells
        assert set(results["status"]) == {"done"}, self.report()
        assert len(load_results(self.out, long=True)) == cells
        assert self.computed_twice() <= twice

    def measuring(self) -> list[tuple[str, str]]:
        """(job, measurement) in flight by the attempts' own words."""
        found = []
        for path in self.out.glob("launches/*/attempts/*.json"):
            if not path.name.startswith("."):
                attempt = json.loads(path.read_text())
                if attempt["measuring"] and not attempt["end"]:
                    found.append((attempt["job"], attempt["measuring"]))
        return found

    def cancel_all(self) -> None:
        """End this study's jobs, preflights too."""
        names = [
            name
            for la in self.launches()
            for name in [
                *(la.chunk_name(c.number) for c in la.chunks),
                *(la.preflight_name(s) for s in range(len(la.shapes))),
            ]
        ]
        if names:
            said = self.cluster.command("squeue", "--noheader", "--name", ",".join(names), "--format", "%A")
            if said.split():
                self.cluster.command("scancel", *sorted(set(said.split())))

    def release(self) -> None:
        """Let held jobs run."""
        for launch in self.launches():
            for job in (launch.submitted() or {}).values():
                self.cluster.command("scontrol", "release", job)

    def report(self) -> str:
        """What is known when a test fails: states, jobs, ends of logs."""
        lines = [str(self.jobs())]
        if self.launches():
            lines.append(load_results(self.out)[["label", "status"]].to_string())
        for log in sorted(self.out.glob("logs/**/*log*")):
            lines += [f"== {log}", log.read_text(errors="replace")[-1500:]]
        return "\n".join(lines)


Studies = Callable[[str], Study]
"""Makes a study of the given name that the tests of a module share."""
