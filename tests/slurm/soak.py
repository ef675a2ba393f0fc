"""A study of thousands of small cells on a real SLURM while everything is killed at random; then ``mode=audit``.

    python -m tests.slurm.soak [--minutes 20] [--seed 0] [--keep DIR]

For so many minutes workers, jobs, batch scripts and launches are killed, jobs are requeued and cancelled, nodes lose
power, and slurmd and slurmctld stop; what died is launched again. Then what is left is run in peace. The cluster is one
of its own, and ends with it. It fails where the audit finds a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sweeps.status import FINAL
from sweeps.store.parts import Store
from tests.slurm.cluster import Cluster
from tests.slurm.configuration import NODES
from tests.slurm.faults import kill_launch, processes
from tests.slurm.processes import ClusterError
from tests.slurm.studies import Study

CELLS_A_MINUTE = 180
"""Of one window each, with two cores and all that is killed."""
PLAIN = ("eval.tokens=512", "executor.gpus=0", "executor.preflight=false")
_OF_A_BLOCK_SIZE = 6 * 4 * 2 * 3
_BLOCK_SIZES = [16 + 8 * n for n in range(100)]


def study_of(cells: int) -> tuple[str, int]:
    """(the argument, its cells) of a study of at least so many cells, each measured on one window of 512 tokens."""
    blocks = _BLOCK_SIZES[: -(-cells // _OF_A_BLOCK_SIZE)]
    axes = "bits: [3, 4, 5, 6, 7, 8], dtype: [int, float, dynamic, quantile], exponent_bits: heuristic"
    more = f"center: [false, true], absmax_dtype: [float16, float32, nested], blocksize: {blocks}"
    return f"sweep.quant=[{{{axes}, {more}}}]", len(blocks) * _OF_A_BLOCK_SIZE


@dataclass(kw_only=True)
class Soak:
    """One study and what befalls it.

    Attributes:
        args: of the study, beyond those of the small one.
        cells: of it.
        pause: seconds between two faults, at least and at most.
        cluster_too: nodes and daemons of the cluster are hit too; nobody else may use it then.
        struck: how often each fault was done.
        launches: how often it was launched.
    """

    study: Study
    args: tuple[str, ...]
    cells: int
    choose: random.Random
    pause: tuple[float, float]
    cluster_too: bool = False
    struck: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    _launch: subprocess.Popen[str] | None = None
    _turns: list[str] = field(default_factory=list)

    def done(self) -> int:
        """How many measurements have a result."""
        table = Store(out=self.study.out).read(["status"]) if self.study.out.exists() else None
        return 0 if table is None else sum(s in FINAL for s in table.column("status").to_pylist())

    def strike_for(self, seconds: float, kinds: int | None = None) -> None:
        """Keep the study launched and do one fault after another.

        Stop after so many seconds, when all is measured, or when so many kinds of fault were done.
        """
        until = time.monotonic() + seconds
        try:
            while time.monotonic() < until and self.done() < self.cells and len(self.struck) != kinds:
                if self._launch is None or self._launch.poll() is not None:
                    self._start()
                time.sleep(self.choose.uniform(*self.pause))
                self._strike()
        finally:
            if self._launch is not None:
                kill_launch(self._launch)

    def _strike(self) -> None:
        """Do one of the faults that have not had their turn, in no order, where there is something to hit."""
        faults = self._faults()
        self._turns = self._turns or self.choose.sample(sorted(faults), len(faults))
        for name in self._turns:
            # What is hit may end by itself meanwhile, and a controller that is down refuses.
            with contextlib.suppress(ClusterError):
                if faults[name]():
                    self.struck[name] += 1
                    self._turns.remove(name)
                    return

    def finish(self) -> str:
        """Run what is left, and have it audited; return figures."""
        for _ in range(5):
            self.launches += 1
            self.study.launch(*self.args, "retry=[failed]", "watch=true", timeout=1200)
            if self.done() == self.cells:
                break
        self.study.wait_idle()
        audit = self.study.launch(*self.args, "mode=audit")
        assert audit.returncode == 0, f"{audit.stdout}\n{self.study.report()[-20000:]}"
        twice = self.study.computed_twice()
        again = self.study.launch(*self.args)
        assert "nothing to submit" in again.stdout, again.stdout
        faults = ", ".join(f"{name} {count}" for name, count in sorted(self.struck.items()))
        return f"{self.cells} cells, {self.launches} launches, measured twice {twice}; struck: {faults}"

    def _start(self) -> None:
        self.launches += 1
        with (self.study.home / "launches.log").open("a") as log:
            self._launch = self.study.start(*self.args, "watch=true", output=log)

    def _faults(self) -> dict[str, Callable[[], bool]]:
        """What can befall it, by name; each tells whether there was something to hit."""
        faults: dict[str, Callable[[], bool]] = {
            "worker": lambda: self._kill("worker"),
            "job": lambda: self._kill("supervisor"),
            "batch script": lambda: self._kill("shell"),
            "requeue": lambda: self._of_running("scontrol", "requeue"),
            "cancel": lambda: self._of_running("scancel"),
            "launch": self._kill_launch,
        }
        if self.cluster_too:
            faults |= {"node": self._node, "slurmd": self._slurmd, "slurmctld": self._controller}
        return faults

    def _kill(self, kind: str) -> bool:
        found = processes(self.study, kind)
        if found:
            self.choose.choice(sorted(found, key=lambda p: p.pid)).kill()
        return bool(found)

    def _of_running(self, *command: str) -> bool:
        running = sorted(job for job, state in self.study.jobs().items() if state == "RUNNING")
        if running:
            self.study.cluster.command(*command, self.choose.choice(running))
        return bool(running)

    def _kill_launch(self) -> bool:
        if self._launch is None or self._launch.poll() is not None:
            return False
        kill_launch(self._launch)
        return True

    def _node(self) -> bool:
        """Its power fails, and is back before SLURM notices, or after."""
        name = self.choose.choice(NODES)
        self.study.cluster.stop_node(name, with_jobs=True)
        time.sleep(self.choose.choice((0.5, 3.0, 25.0)))
        self.study.cluster.start_node(name)
        return True

    def _slurmd(self) -> bool:
        """It starts again before its node counts as lost: jobs go on."""
        name = self.choose.choice(NODES)
        self.study.cluster.stop_node(name)
        self.study.cluster.start_node(name)
        return True

    def _controller(self) -> bool:
        self.study.cluster.stop_controller()
        time.sleep(self.choose.uniform(0.0, 5.0))
        self.study.cluster.start_controller()
        self.study.wait(self.study.cluster.is_up)
        return True


def main() -> int:
    """The command line. Returns 1 where a fault was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="of faults (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is hit when (%(default)s)")
    parser.add_argument("--keep", type=Path, help="a directory for the study, which stays")
    options = parser.parse_args()
    home = options.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    home.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(directory=Path(tempfile.mkdtemp(prefix="soak-slurm-")))
    quant, cells = study_of(int(CELLS_A_MINUTE * options.minutes))
    soak = Soak(
        study=Study(cluster=cluster, home=home),
        args=(quant, *PLAIN, "executor.cells_per_job=72", "executor.max_parallel=3"),
        cells=cells,
        choose=random.Random(options.seed),
        pause=(2.0, 12.0),
        cluster_too=True,
    )
    began = time.monotonic()
    try:
        cluster.up()
        soak.strike_for(60 * options.minutes)
        print(f"{soak.done()} of {cells} cells measured after {(time.monotonic() - began) / 60:.1f} min", flush=True)
        print(f"no fault: {soak.finish()}; {(time.monotonic() - began) / 60:.1f} min; {home}")
    except AssertionError as error:
        print(f"{error}\n{home}", file=sys.stderr)
        return 1
    finally:
        cluster.down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
