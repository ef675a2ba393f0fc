"""``executor=slurm``: claim what is left and hand it to SLURM as job arrays, through submitit. Waits for no job."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sweeps.errors import UserError
from sweeps.executors.slurm.config import SlurmConfig
from sweeps.executors.slurm.launch_plan import Draft
from sweeps.executors.slurm.query import check_request, read_limits
from sweeps.executors.slurm.sbatch import Submission
from sweeps.launches.claimer import Claimer
from sweeps.launches.in_flight import Flight
from sweeps.launches.job_settings import JobSettings
from sweeps.launches.launch import Launch, Shape
from sweeps.plan.packs import Packing, Plan
from sweeps.provenance import ROOT
from sweeps.store.parts import Store
from sweeps.store.schema import Scalar
from sweeps.study.cell import ModelRef
from sweeps.study.manifest import Manifest
from sweeps.study.snapshot import code_hash, snapshot_code
from sweeps.tracking.tracker import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What a launch put into the queue.

    Attributes:
        left: packs that did not fit the cluster's limits; why says which.
        held: models whose quantized cells wait for their baseline, and why.
        unfit: packs whose next step of the out-of-memory ladder the cluster doesn't have, and what it said.
        error: why not all chunks could be submitted; None when they were.
    """

    plan: Plan
    launch: Launch | None = None
    jobs: int = 0
    left: int = 0
    why: str = ""
    held: Mapping[str, str] = field(default_factory=dict)
    unfit: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Submitter:
    """Submits what is left of one study.

    Attributes:
        overrides: gpus and mem_gb by model, where the configuration gives them.
        settings: what every job needs to know (sweeps.executors.slurm.node.job).
    """

    store: Store
    manifest: Manifest
    retry: frozenset[str]
    slurm: SlurmConfig
    device: str
    overrides: Mapping[str, Mapping[str, Any]]
    settings: JobSettings
    provenance: Callable[[str], Mapping[str, Scalar]]
    progress: Callable[[str], None] = lambda _: None

    @property
    def packing(self) -> Packing:
        return packing_for(self.slurm)

    def check(self) -> None:
        """Ask the cluster whether it takes such jobs, before anything is written.

        Raises:
            UserError: it doesn't; the message says which key is wrong.
        """
        models = dict.fromkeys(c.model for c in self.manifest.cells)
        for shape in dict.fromkeys(self.shape(model, 0) for model in models):
            check_request(self.slurm.request(shape))

    def submit(self, launch_id: str, flight: Flight) -> Submitted:
        """Claim and submit as much as the cluster's limits let in.

        Raises:
            SchedulerError: the cluster can't be asked for its limits; nothing was submitted.
        """
        self.progress("asking the cluster for its limits")
        # One reading of the sources gives both what jobs run and what they expect it to be.
        snapshot = self.slurm.code == "snapshot"
        code = snapshot_code(self.store.out) if snapshot else ROOT
        expected = code.name if snapshot else code_hash()
        limits = read_limits(partition=self.slurm.partition, account=self.slurm.account, qos=self.slurm.qos)
        parallel = self._parallel_left(flight)
        draft = Draft(submitter=self, limits=limits, launch_id=launch_id, code_hash=expected, parallel=parallel)
        claimer = Claimer(
            store=self.store,
            manifest=self.manifest,
            retry=self.retry,
            packing=self.packing,
            device=self.device,
            executor="slurm",
            launch=launch_id,
        )
        plan, claim = claimer.claim(draft.prepare)
        submitted = Submitted(
            plan=plan, left=draft.left, why=limits.why, held=dict(draft.held), unfit=dict(draft.unfit)
        )
        if claim is None or draft.launch is None:
            return submitted
        exclude = self._exclude(draft.launch, flight.nodes_that_failed(plan.measurement_keys()))
        run = Submission(submitter=self, launch=draft.launch, claim=claim, exclude=exclude, code=code)
        error = run.submit_all()
        return replace(submitted, launch=draft.launch, jobs=run.count, error=error)

    def _parallel_left(self, flight: Flight) -> int | None:
        """How many more jobs may run at once: earlier launches of the study that are not over have their share."""
        if self.slurm.max_parallel is None:
            return None
        earlier = [la for la, _ in flight.launches if la.sweep == self.manifest.sweep]
        return max(0, self.slurm.max_parallel - sum(la.settings.parallel or 0 for la in earlier))

    def _exclude(self, launch: Launch, failed: Collection[str]) -> str | None:
        """Nodes that jobs must not run on: the user's, and those that failed under this work, where others are left."""
        mine = [node for node in (self.slurm.exclude or "").split(",") if node]
        if failed:
            wanted = ",".join([*mine, *sorted(failed)])
            try:
                for shape in launch.shapes:
                    check_request(self.slurm.request(shape, wanted))
                return wanted
            except UserError:
                self.progress(
                    f"no other nodes than {', '.join(sorted(failed))}, which failed before: not excluding them"
                )
        return ",".join(mine) or None

    def shape(self, model: ModelRef, rung: int) -> Shape:
        """The resources of a job for a model, at a step of the out-of-memory ladder."""
        return self.slurm.shape(model, self.device, rung, self.overrides.get(model.label, {}))


def packing_for(slurm: SlurmConfig) -> Packing:
    """Packs that are predicted to take half the walltime: predictions are right within a factor of two."""
    return Packing(seconds=slurm.minutes * 30.0, cells=slurm.cells_per_job, baseline_apart=slurm.baseline_gate)


def submit_settings(
    *,
    slurm: SlurmConfig,
    device: str,
    batch_tokens: int,
    trust_remote_code: bool,
    tracking: TrackingConfig,
    references: Mapping[str, Mapping[str, float]],
) -> JobSettings:
    """What every job of a launch needs to know, as far as it is known before the launch is planned."""
    return JobSettings(
        device=device,
        batch_tokens=batch_tokens,
        trust_remote_code=trust_remote_code,
        requeues=slurm.requeues,
        signal_seconds=slurm.signal_seconds,
        tracking={**asdict(tracking), "dir": str(tracking.dir)},
        references=references,
        baseline_tolerance=slurm.baseline_tolerance,
    )
