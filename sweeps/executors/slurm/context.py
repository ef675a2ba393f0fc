"""Facts of a study that submitting needs, gathered once: what is measured, what jobs ask for, what they are told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sweeps.errors import UserError
from sweeps.executors.base import Order
from sweeps.executors.slurm.settings import SlurmSettings
from sweeps.files import JsonObject
from sweeps.launches.job_settings import JobSettings
from sweeps.launches.launch import Shape
from sweeps.plan.order import CHEAPEST
from sweeps.plan.pack import Pack
from sweeps.plan.packs import Packing
from sweeps.provenance import ROOT
from sweeps.store.parts import Store
from sweeps.study.cell import ModelRef
from sweeps.study.manifest import Manifest
from sweeps.worker.execution import batch_tokens


@dataclass(frozen=True, kw_only=True)
class LaunchContext:
    """One study on its way to SLURM.

    Attributes:
        overrides: gpus and mem_gb by model, where the configuration gives them.
        job_settings: what every job needs to know (sweeps.executors.slurm.node.job).
        progress: told what is being done.
        order, budget: as ``Options`` has them.
    """

    store: Store
    manifest: Manifest
    slurm: SlurmSettings
    device: str
    overrides: Mapping[str, JsonObject]
    job_settings: JobSettings
    progress: Callable[[str], None]
    order: str = CHEAPEST
    budget: float | None = None

    @property
    def packing(self) -> Packing:
        """The size of packs: half the walltime by prediction, as predictions are right within a factor of two."""
        return Packing(
            seconds=self.slurm.minutes * 30.0,
            cells=self.slurm.cells_per_job,
            baseline_apart=self.slurm.baseline_gate,
            order=self.order,
        )

    def devices(self, pack: Pack) -> int:
        """Return how many devices the budget pays for while a pack's job runs: GPUs, or one job on CPUs."""
        return max(1, self.shape(pack.model, pack.rung).gpus)

    def shape(self, model: ModelRef, rung: int) -> Shape:
        """Return the resources of a job for a model, at a step of the out-of-memory ladder."""
        mirrored = self.job_settings.tracking["mode"] != "disabled"
        return self.slurm.shape(model, self.device, rung, self.overrides.get(model.label, {}), mirrored=mirrored)


def launch_context(order: Order, slurm: SlurmSettings) -> LaunchContext:
    """Gather what submitting needs to know of a study.

    Raises:
        UserError: a key of the executor, or a reference value of a model, is not valid.
    """
    return LaunchContext(
        store=order.store,
        manifest=order.manifest,
        slurm=slurm,
        device=order.device,
        overrides=_member_values(order, ("gpus", "mem_gb")),
        job_settings=_job_settings(order, slurm),
        progress=order.progress,
        order=order.options.order,
        budget=order.options.budget,
    )


def _job_settings(order: Order, slurm: SlurmSettings) -> JobSettings:
    """Return what every job of a launch needs to know, as far as it is known before the launch is planned."""
    tracking = order.options.tracking
    return JobSettings(
        device=order.device,
        batch_tokens=batch_tokens(slurm.batch_tokens, order.device),
        trust_remote_code=order.options.trust_remote_code,
        requeues=slurm.requeues,
        signal_seconds=slurm.signal_seconds,
        tracking={**asdict(tracking), "dir": str(tracking.dir)},
        references=_references(order),
        baseline_tolerance=slurm.baseline_tolerance,
        manifest=order.manifest.name,
        report_code=str(ROOT) if order.options.report else "",
    )


def _member_values(order: Order, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return the named values that the configuration gives models besides what they are, by label."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for group, family in order.options.study.models.items():
        for member, values in family["members"].items():
            given = {n: values[n] for n in names if values.get(n) is not None}
            if given:
                found[str(family.get("family") or group), str(member)] = given
    models = dict.fromkeys(c.model for c in order.manifest.cells)
    return {m.label: found[m.family, m.name] for m in models if (m.family, m.name) in found}


def _references(order: Order) -> dict[str, dict[str, float]]:
    """Return the values that the configuration expects of baselines, by model label."""
    evals = tuple(f"{e.name}_" for e in order.manifest.evals)
    found: dict[str, dict[str, float]] = {}
    for label, values in _member_values(order, ("reference",)).items():
        given = values["reference"]
        if not isinstance(given, dict) or not all(
            str(name).startswith(evals) and isinstance(value, int | float) for name, value in given.items()
        ):
            raise UserError(
                f"{label}: reference={given!r} is not valid: numbers by EVAL_METRIC, e.g. {{{evals[0]}loss: 3.14}}; "
                f"this study's evaluations: {', '.join(e.name for e in order.manifest.evals)}"
            )
        found[label] = given
    return found
