"""The executor ``slurm``: job arrays on a SLURM cluster, through submitit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from sweeps.errors import UserError
from sweeps.executors.base import Executor, Observation, Order
from sweeps.executors.settings import ExecutorSettings
from sweeps.executors.slurm.settings import START_SECONDS, SlurmSettings, shape_text
from sweeps.worker.devices import DEVICES

if TYPE_CHECKING:
    from rich.console import Console

    from sweeps.launches.in_flight import InFlight
    from sweeps.launches.launch import Launch
    from sweeps.plan.pack import Pack
    from sweeps.plan.packs import Plan
    from sweeps.plan.ways import DeviceMemory
    from sweeps.study.cell import ModelRef


_NOT_IN_PATHS: Final = {
    "%": "takes % in the path of a log for a job's number",
    "\\": "drops \\ from the path of a log, so that jobs can't write theirs and die",
}
"""Characters of a results directory that SLURM does not take as they are."""


@dataclass(frozen=True)
class Slurm(Executor[SlurmSettings]):
    """See conf/executor/slurm.yaml."""

    name: ClassVar[str] = "slurm"
    title: ClassVar[str] = "SLURM"
    Settings: ClassVar[type[ExecutorSettings]] = SlurmSettings
    detached: ClassVar[bool] = True
    keeps_budget: ClassVar[bool] = True
    start_seconds: ClassVar[float] = START_SECONDS

    def device(self) -> str:
        asked = self.settings.device
        if asked not in DEVICES:
            raise UserError(f"executor.device={asked!r} is not valid: one of {', '.join(DEVICES)}")
        if asked == "cuda" and self.settings.gpus == 0:
            raise UserError("executor.device='cuda' with executor.gpus=0: ask for GPUs, or for executor.device=cpu")
        return asked if asked != "auto" else "cpu" if self.settings.gpus == 0 else "cuda"

    def device_name(self) -> str:
        gpu_type = self.settings.gpu_type
        if self.device() == "cuda" and gpu_type:
            return gpu_type
        raise UserError(
            f"executor.gpu_type={gpu_type!r} is not valid with executor=slurm, executor.device={self.device()} and an "
            "evaluation whose number depends on the device: it must be known before jobs run. Give "
            "executor.gpu_type=TYPE with executor.device=cuda, or run with executor=local"
        )

    def check_out(self, out: Path) -> None:
        """Refuse a directory that jobs can't be told of, or whose file system isn't there."""
        for character, why in _NOT_IN_PATHS.items():
            if character in str(out):
                raise UserError(f"out={str(out)!r}: SLURM {why}; choose a directory without {character}")
        if not out.parent.is_dir():
            raise UserError(
                f"out={str(out)!r}: {out.parent} does not exist. Is its file system mounted? "
                "Make that directory, or name one that this machine and the cluster's nodes share"
            )

    def memory(self, order: Order) -> DeviceMemory:
        from sweeps.executors.slurm.context import launch_context
        from sweeps.executors.slurm.settings import GIB
        from sweeps.plan.ways import DeviceMemory

        context = launch_context(order, self.settings)
        gb = self.settings.known_gpu_gb
        if order.device == "cpu":
            words = "a job's memory (executor.mem_gb)"
        else:
            words = "GPUs of a memory that executor.gpu_memory_gb would tell" if gb is None else f"GPUs of {gb:g} GB"

        def bytes_of(model: ModelRef) -> int | None:
            if order.device == "cpu":
                return int(context.shape(model, 0).mem_gb * GIB)
            return None if gb is None else int(gb * GIB)

        return DeviceMemory(
            device=order.device,
            words=words,
            bytes_of=bytes_of,
            gpus_of=lambda model: max(1, context.shape(model, 0).gpus),
            batch_tokens=context.job_settings.batch_tokens,
        )

    def check(self, order: Order) -> None:
        """Ask the cluster whether it takes such jobs."""
        from sweeps.executors.slurm.context import launch_context
        from sweeps.executors.slurm.query import check_request

        context = launch_context(order, self.settings)
        order.progress("asking the cluster whether it takes such jobs")
        models = dict.fromkeys(c.model for c in order.manifest.wanted_cells())
        for shape in dict.fromkeys(context.shape(model, 0) for model in models):
            check_request(self.settings.request(shape))

    def devices(self, order: Order) -> Callable[[Pack], int]:
        from sweeps.executors.slurm.context import launch_context

        return launch_context(order, self.settings).devices

    def describe(self, order: Order, flight: InFlight) -> tuple[Plan, list[tuple[str, str]]]:
        """Say what would be submitted, without asking the cluster."""
        from sweeps.executors.slurm.context import launch_context

        context = launch_context(order, self.settings)
        plan = order.plan(context.packing, flight)
        shapes = Counter(context.shape(p.model, p.rung) for p in plan.packs)
        rows = [("jobs", f"{len(plan.packs):,} of {self.settings.minutes} min, each with cells of one model")]
        rows += [
            (f"{n:,}", f"with {shape_text(s)}" + (f" (step {s.rung} of the out-of-memory ladder)" if s.rung else ""))
            for s, n in shapes.most_common()
        ]
        return plan, rows

    def scripts(self, order: Order, flight: InFlight) -> Sequence[str]:
        """Return what sbatch would be given for the first job array of each shape, without asking the cluster."""
        from sweeps.executors.slurm.context import launch_context
        from sweeps.executors.slurm.sbatch import planned_scripts

        context = launch_context(order, self.settings)
        plan = order.plan(context.packing, flight)
        return planned_scripts(context, plan)

    def run(self, order: Order) -> int:
        """Submit what is left of a study; with watch=true, follow it."""
        from sweeps.executors.slurm.run import submit_study

        return submit_study(order, self.settings)

    @classmethod
    def observe(cls, out: Path, waiting: Callable[[int, float], None] | None = None) -> Observation:
        from sweeps.executors.slurm.query.reconcile import reconcile, reconcile_twice

        snapshot = reconcile(out) if waiting is None else reconcile_twice(out, waiting)
        if snapshot is None:
            return Observation()
        return Observation(problems=snapshot.problems, answered=snapshot.queue is not None)

    @classmethod
    def show(cls, flight: InFlight, console: Console) -> None:
        from sweeps.executors.slurm.show.status import show_jobs

        show_jobs(flight, console)

    @classmethod
    def blocked(cls, out: Path, measurements: Collection[str]) -> Mapping[str, set[str]]:
        from sweeps.executors.slurm.show.logs import why_never_run

        return why_never_run(out, measurements)

    @classmethod
    def logs(cls, out: Path, measurements: Collection[str], console: Console) -> int:
        from sweeps.executors.slurm.show.logs import failed_logs

        return failed_logs(out, measurements, console)

    @classmethod
    def cancel(
        cls, out: Path, launches: Sequence[Launch], console: Console, measurements: Collection[str] | None
    ) -> int:
        from sweeps.executors.slurm.show.cancel import cancel_launches, cancel_measurements

        if measurements is not None:
            return cancel_measurements(out, launches, console, measurements)
        return cancel_launches(out, launches, console)
