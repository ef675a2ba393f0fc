"""Executors, which run packs: what one does, and the door through which those of other packages come in.

An executor is a class with settings of its own. Another package adds one by an entry point and a YAML file, in a
directory that ``--config-dir`` names, as executor/NAME.yaml (with ``# @package executor`` and ``name: NAME``):

    [project.entry-points."kbit_sweep.executors"]
    kubernetes = "my_package.kubernetes:Kubernetes"
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar

from kbit.doors import Door
from sweeps.errors import UserError, did_you_mean
from sweeps.executors.settings import ExecutorSettings
from sweeps.files import JsonObject
from sweeps.plan.budget import HOUR

if TYPE_CHECKING:
    from rich.console import Console

    from sweeps.launches.in_flight import InFlight
    from sweeps.launches.launch import Launch
    from sweeps.options import Options
    from sweeps.plan.pack import Pack
    from sweeps.plan.packs import Packing, Plan
    from sweeps.plan.ways import DeviceMemory
    from sweeps.store.parts import Store
    from sweeps.store.schema import Row
    from sweeps.study.manifest import Manifest

S = TypeVar("S", bound=ExecutorSettings)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Order:
    """A study that an executor is asked to run, or to describe.

    Attributes:
        device: 'cpu' or 'cuda': what ``Executor.device`` said.
        progress: told what is being done, where that takes time.
    """

    options: Options
    device: str
    store: Store
    manifest: Manifest
    console: Console
    progress: Callable[[str], None] = lambda _: None

    @cached_property
    def stored(self) -> list[Row]:
        """Return what predictions are made from, as the store had it when it was first asked for."""
        from sweeps.launches.claimer import rows_to_learn_from

        return rows_to_learn_from(self.store)

    def plan(self, packing: Packing, flight: InFlight) -> Plan:
        """Return what is left, for a description."""
        from sweeps.launches.claimer import Seen, plan_study

        seen = replace(Seen.after(flight, self.store), learn=lambda: self.stored)
        return plan_study(self.manifest, seen, retry=self.options.retry, packing=packing, device=self.device)

    def mirror_tables(self) -> None:
        """Give the study's tables, as they were written at its end, to W&B; say where that did not work."""
        from sweeps.tracking.artifact import upload_tables

        sweep = self.manifest.sweep
        files = [
            f for kind in ("parquet", "csv", "md") if (f := self.store.out / "tables" / f"{sweep}.{kind}").is_file()
        ]
        problem = upload_tables(self.options.tracking, sweep, files)
        if problem:
            self.console.print(problem, style="yellow", markup=False, highlight=False)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The result of asking about an executor's jobs.

    Attributes:
        problems: what could not be asked, and why, for the user.
        answered: whether what is on disk is now as the scheduler has it.
    """

    problems: tuple[str, ...] = ()
    answered: bool = True


@dataclass(frozen=True)
class Executor(ABC, Generic[S]):
    """Runs packs somewhere.

    Attributes:
        name: its name in the door, which claims carry.
        title: what users call it.
        Settings: its keys.
        detached: whether its jobs outlive the process that launched them. Their claims end by what ``observe`` writes
            into the launch's directory (sweeps.launches.launch), those of others with the launching process.
        keeps_budget: whether ``run`` stops when the order's budget is spent; else a budget is refused.
        start_seconds: for how long each pack holds its devices before it loads its model.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    Settings: ClassVar[type[ExecutorSettings]]
    detached: ClassVar[bool] = False
    keeps_budget: ClassVar[bool] = False
    start_seconds: ClassVar[float] = 0.0

    settings: S

    @abstractmethod
    def device(self) -> str:
        """Return 'cpu' or 'cuda'. Raises UserError where the settings are wrong by themselves."""

    def device_name(self) -> str:
        """Return the name of the device that will be measured, for evaluations whose number depends on it."""
        raise UserError(
            f"executor.name={self.name!r} is not valid with an evaluation whose number depends on the device: it must "
            "be known before jobs run. Run with executor=local"
        )

    def check_out(self, out: Path) -> None:  # most take any directory
        """Refuse a results directory that it can't use, with a UserError."""

    def memory(self, order: Order) -> DeviceMemory | None:
        """Return the memory of the devices that run its workers, by which each model's way is chosen; None: unknown."""
        return None

    def check(self, order: Order) -> None:  # most have nothing to ask
        """Refuse what can't run, with a UserError, before anything is written."""

    def check_budget(self, budget: float | None) -> None:
        """Refuse a budget that it would not keep."""
        if budget is not None and not self.keeps_budget:
            raise UserError(f"budget={budget / HOUR:g} is not valid with executor={self.name}, which does not keep one")

    def devices(self, order: Order) -> Callable[[Pack], int]:
        """Return what tells on how many devices a pack runs, which a budget pays for."""
        return lambda _: 1

    @abstractmethod
    def describe(self, order: Order, flight: InFlight) -> tuple[Plan, list[tuple[str, str]]]:
        """Return what would run, and rows of (what, words) for mode=plan."""

    def scripts(self, order: Order, flight: InFlight) -> Sequence[str]:
        """Return the scripts of the jobs that would be sent, for mode=plan script=true."""
        raise UserError(f"script=true: executor={self.name} sends no scripts; executor=slurm does")

    @abstractmethod
    def run(self, order: Order) -> int:
        """Claim what is left and run it, or hand it over; return the exit code."""

    # What follows is asked about whatever a results directory holds, so it needs no settings.

    @classmethod
    def observe(cls, out: Path, waiting: Callable[[int, float], None] | None = None) -> Observation:
        """Write down how its unsettled jobs do, and how they ended.

        Args:
            out: directory of results.
            waiting: where given, jobs that are absent are looked for until it is sure that they are lost; it is told
                how many are, before each wait.
        """
        return Observation()

    @classmethod
    def show(cls, flight: InFlight, console: Console) -> None:
        """Say how its jobs do, for mode=status."""

    @classmethod
    def blocked(cls, out: Path, measurements: Collection[str]) -> Mapping[str, set[str]]:
        """Return which of some measurements can't run, by why."""
        return {}

    @classmethod
    def logs(cls, out: Path, measurements: Collection[str], console: Console) -> int:
        """Print how the jobs that held some measurements ended, and the ends of their logs; returns how many."""
        return 0

    @classmethod
    def cancel(
        cls, out: Path, launches: Sequence[Launch], console: Console, measurements: Collection[str] | None
    ) -> int:
        """End the jobs of launches; return the exit code.

        Args:
            out: directory of results.
            launches: whose jobs.
            console: to say what was done.
            measurements: only jobs that have nothing else left to do; None is all jobs.
        """
        raise UserError(f"mode=cancel: jobs of {cls.title} can't be cancelled from here")


EXECUTORS: Final[Door[type[Executor[Any]]]] = Door(
    "kbit_sweep.executors",
    "executor.name",
    {"local": "sweeps.executors.local:Local", "slurm": "sweeps.executors.slurm.executor:Slurm"},
)


def chosen(keys: JsonObject) -> Executor[Any]:
    """Return the executor that a configuration names, with its settings.

    Raises:
        UserError, SpecError: there is no such executor, a key is another's, or a value is not valid.
    """
    name = str(keys["name"])
    if name not in EXECUTORS:
        raise UserError(f"{EXECUTORS.unknown(name)}.{did_you_mean(name, EXECUTORS)}")
    executor = EXECUTORS[name]
    own = ("name", *executor.Settings.names())
    foreign = [key for key, value in keys.items() if value is not None and key not in own]
    if foreign:
        other = next((n for n in EXECUTORS if foreign[0] in EXECUTORS[n].Settings.names()), "?")
        raise UserError(f"executor.{foreign[0]} is a key of executor={other}: add executor={other}, or leave it out")
    return executor(executor.Settings.from_config(keys))


def with_jobs(out: Path) -> list[type[Executor[Any]]]:
    """Return the executors whose jobs outlive their launch and that the claims of a results directory name."""
    from sweeps.launches.claims import Claims

    found = []
    for name in dict.fromkeys(claim.executor for claim in Claims(out=out).open() if claim.detached):
        if name in EXECUTORS:
            found.append(EXECUTORS[name])
        else:
            log.warning("executor=%s is not installed here: what became of its jobs can't be asked", name)
    return found
