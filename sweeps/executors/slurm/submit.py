"""``executor=slurm``: claim what is left and hand it to SLURM as job arrays, through submitit. Waits for no job."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from sweeps.errors import UserError
from sweeps.executors.slurm.context import LaunchContext
from sweeps.executors.slurm.launch_plan import LaunchPlan
from sweeps.executors.slurm.query import check_request, read_limits
from sweeps.executors.slurm.sbatch import Submission
from sweeps.launches.claimer import Claimer
from sweeps.launches.in_flight import InFlight
from sweeps.launches.launch import Launch
from sweeps.plan.packs import Plan
from sweeps.provenance import ROOT
from sweeps.study.snapshot import code_hash, snapshot_code


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """The outcome of submitting a launch.

    Attributes:
        left: packs that did not fit the cluster's limits; why says which.
        held: models whose quantized cells wait for their baseline, and why.
        unfit: packs whose next step of the out-of-memory ladder the cluster doesn't have, and what it said.
        beyond: measurements that the budget does not pay for.
        error: why not all chunks could be submitted; None when they were.
    """

    plan: Plan
    launch: Launch | None = None
    jobs: int = 0
    left: int = 0
    why: str = ""
    held: Mapping[str, str] = field(default_factory=dict)
    unfit: Mapping[str, str] = field(default_factory=dict)
    beyond: int = 0
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Submitter:
    """Submits what is left of one study."""

    context: LaunchContext
    retry: frozenset[str]

    def submit(self, launch_id: str, flight: InFlight) -> Submitted:
        """Claim and submit as much as the cluster's limits let in.

        Raises:
            SchedulerError: the cluster can't be asked for its limits; nothing was submitted.
        """
        context, slurm = self.context, self.context.slurm
        context.progress("asking the cluster for its limits")
        # One reading of the sources gives both what jobs run and what they expect it to be.
        snapshot = slurm.code == "snapshot"
        code = snapshot_code(context.store.out) if snapshot else ROOT
        expected = code.name if snapshot else code_hash()
        limits = read_limits(partition=slurm.partition, account=slurm.account, qos=slurm.qos)
        parallel = self._parallel_left(flight)
        draft = LaunchPlan(context=context, limits=limits, launch_id=launch_id, code_hash=expected, parallel=parallel)
        claimer = Claimer(
            store=context.store,
            manifest=context.manifest,
            retry=self.retry,
            packing=context.packing,
            device=context.device,
            executor="slurm",
            launch=launch_id,
        )
        plan, claim = claimer.claim(draft.prepare)
        submitted = Submitted(
            plan=plan,
            left=draft.left,
            why=limits.why,
            held=dict(draft.held),
            unfit=dict(draft.unfit),
            beyond=draft.beyond,
        )
        if claim is None or draft.launch is None:
            return submitted
        exclude = self._exclude(draft.launch, flight.nodes_that_failed(plan.measurement_keys()))
        run = Submission(context=context, launch=draft.launch, claim=claim, exclude=exclude, code=code)
        error = run.submit_all()
        return replace(submitted, launch=draft.launch, jobs=run.count, error=error)

    def _parallel_left(self, flight: InFlight) -> int | None:
        """Count the jobs that may still run at once.

        Earlier launches of the study that are not over have their share.
        """
        if self.context.slurm.max_parallel is None:
            return None
        earlier = [la for la, _ in flight.launches if la.sweep == self.context.manifest.sweep]
        return max(0, self.context.slurm.max_parallel - sum(la.settings.parallel or 0 for la in earlier))

    def _exclude(self, launch: Launch, failed: Collection[str]) -> str | None:
        """Return nodes that jobs must not run on: the user's, and those that failed under this work.

        The latter only where others are left.
        """
        mine = [node for node in (self.context.slurm.exclude or "").split(",") if node]
        if failed:
            wanted = ",".join([*mine, *sorted(failed)])
            try:
                for shape in launch.shapes:
                    check_request(self.context.slurm.request(shape, wanted))
                return wanted
            except UserError:
                self.context.progress(
                    f"no other nodes than {', '.join(sorted(failed))}, which failed before: not excluding them"
                )
        return ",".join(mine) or None
