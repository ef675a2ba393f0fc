"""The executor ``local``: worker processes on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sweeps.executors.base import Executor, Order
from sweeps.executors.settings import ExecutorSettings, LocalSettings
from sweeps.text import counted, size
from sweeps.worker.devices import resolve_device

if TYPE_CHECKING:
    from sweeps.launches.in_flight import InFlight
    from sweeps.plan.packs import Plan
    from sweeps.plan.ways import DeviceMemory


@dataclass(frozen=True)
class Local(Executor[LocalSettings]):
    """See conf/executor/local.yaml."""

    name: ClassVar[str] = "local"
    title: ClassVar[str] = "this machine"
    Settings: ClassVar[type[ExecutorSettings]] = LocalSettings
    keeps_budget: ClassVar[bool] = True

    def device(self) -> str:
        return resolve_device(self.settings.device)

    def device_name(self) -> str:
        from sweeps.study.devices import local_device_name

        return local_device_name(self.device())

    def memory(self, order: Order) -> DeviceMemory:
        from sweeps.executors.local_run import workers_for
        from sweeps.plan.ways import DeviceMemory
        from sweeps.worker.devices import gpu_bytes, usable_memory
        from sweeps.worker.execution import batch_tokens

        if order.device == "cuda":
            found = gpu_bytes()
            words = (
                "a GPU here whose memory nvidia-smi does not tell" if found is None else f"a GPU of {size(found)} here"
            )
        else:
            count = workers_for(order, self.settings).count
            found = usable_memory() // count
            words = f"{size(found)} of this machine's memory for each of {counted(count, 'worker')}"
        return DeviceMemory(
            device=order.device,
            words=words,
            bytes_of=lambda _: found,
            gpus_of=lambda _: 1,
            batch_tokens=batch_tokens(self.settings.batch_tokens, order.device),
        )

    def check(self, order: Order) -> None:
        from sweeps.executors.local_run import workers_for

        workers_for(order, self.settings)

    def describe(self, order: Order, flight: InFlight) -> tuple[Plan, list[tuple[str, str]]]:
        from sweeps.executors.local_run import workers_for
        from sweeps.plan.packs import Packing
        from sweeps.text import hours

        count = workers_for(order, self.settings).count
        packing = Packing(workers=count, order=order.options.order)
        plan = order.plan(packing, flight)
        wall = f"{hours(plan.seconds / count)} predicted with {count} {order.device} worker(s) here"
        longest = hours(max((p.seconds for p in plan.packs), default=0.0))
        return plan, [("packs", f"{len(plan.packs):,}, longest {longest}"), ("wall time", wall)]

    def run(self, order: Order) -> int:
        from sweeps.executors.local_run import run_here

        return run_here(order, self.settings)
