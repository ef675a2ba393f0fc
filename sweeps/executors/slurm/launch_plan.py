"""A launch before it is claimed: what may and can run now, in job arrays, written to the launch's directory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from kbit.evaluation.spec import EvalSpec
from sweeps.errors import UserError
from sweeps.executors.slurm.context import LaunchContext
from sweeps.executors.slurm.node.baseline_gate import gate_problem
from sweeps.executors.slurm.query import Limits, check_request
from sweeps.executors.slurm.query.where import here
from sweeps.executors.slurm.settings import START_SECONDS
from sweeps.files import store_time
from sweeps.launches.claimer import launch_provenance
from sweeps.launches.launch import Chunk, Launch, Shape, line_offsets
from sweeps.launches.spending import read_spending
from sweeps.plan.budget import fit
from sweeps.plan.order import is_baseline
from sweeps.plan.pack import Pack
from sweeps.plan.packs import Plan
from sweeps.store.schema import Row
from sweeps.study.manifest import Manifest
from sweeps.study.snapshot import freeze_evals

MOST_PER_CHUNK: Final = 500
"""Jobs of an array, where the cluster takes more: so many logs share a directory."""


@dataclass(kw_only=True)
class LaunchPlan:
    """A launch before it is claimed: what is left, cut down to what may and can run now, written to its directory."""

    context: LaunchContext
    limits: Limits
    launch_id: str
    code_hash: str
    parallel: int | None
    launch: Launch | None = None
    left: int = 0
    held: dict[str, str] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)
    beyond: int = 0

    def prepare(self, plan: Plan) -> Plan:
        """Return the part of a plan that is to be claimed; its launch is on disk when this returns."""
        context = self.context
        packs, gates = self._through_the_gate(self._that_fit(plan.packs))
        packs, allowances = self._within_budget(packs)
        shapes = list(dict.fromkeys(context.shape(p.model, p.rung) for p in packs))
        packs = self._within_limits(packs, len(shapes))
        self.launch = None
        if not packs or self.parallel == 0:
            self.left = max(self.left, len(packs))
            return replace(plan, packs=())
        shapes = list(dict.fromkeys(context.shape(p.model, p.rung) for p in packs))
        of_shape = {p.id: shapes.index(context.shape(p.model, p.rung)) for p in packs}
        chunks = self._chunks(packs, of_shape, gates)
        kept = {p for c in chunks for p in c.packs}
        self.left += len(packs) - len(kept)
        evals = context.manifest.evals
        frozen = dict(zip(evals, freeze_evals(evals, context.store.out), strict=True))
        packs = [_frozen(p, frozen) for p in packs if p.id in kept]
        user, cluster = here()
        self.launch = Launch(
            user=user,
            cluster=cluster,
            out=context.store.out,
            id=self.launch_id,
            sweep=context.manifest.sweep,
            shapes=tuple(shapes),
            chunks=tuple(chunks),
            settings=replace(
                context.job_settings,
                code_hash=self.code_hash,
                kill_wait=self.limits.kill_wait,
                parallel=self.parallel and sum(c.share(len(chunks), self.parallel) for c in chunks),
                baselines=_baselines(context.manifest),
                provenance=launch_provenance(self.launch_id, context.manifest.name),
                store_launched=store_time(context.store.out),
                allowances={p.id: allowances[p.id] for p in packs if p.id in allowances},
            ),
            offsets=line_offsets(packs),
            launched=time.time(),
        )
        self.launch.save(packs)
        return replace(plan, packs=tuple(packs))

    def _that_fit(self, packs: Sequence[Pack]) -> list[Pack]:
        """Leave out packs whose step of the ladder asks for more than the cluster has."""
        context, fit = self.context, []
        said: dict[Shape, str | None] = {}
        for pack in packs:
            shape = context.shape(pack.model, pack.rung)
            if pack.rung and shape not in said:
                try:
                    check_request(context.slurm.request(shape))
                    said[shape] = None
                except UserError as error:
                    said[shape] = str(error)
            problem = said.get(shape)
            if problem is None:
                fit.append(pack)
            else:
                self.unfit[pack.model.label] = problem
        return fit

    def _within_budget(self, packs: Sequence[Pack]) -> tuple[list[Pack], Mapping[str, float]]:
        """Return (packs that the budget pays for, device-seconds that each may take)."""
        self.beyond, budget = 0, self.context.budget
        if budget is None:
            return list(packs), {}
        left = read_spending(self.context.store, self.context.manifest.sweep).left(budget)
        fitting = fit(packs, left, self.context.devices, start=START_SECONDS)
        self.beyond = fitting.beyond
        return list(fitting.packs), fitting.allowances

    def _within_limits(self, packs: Sequence[Pack], shapes: int) -> list[Pack]:
        room = self.limits.room
        if room is None:
            self.left = 0
            return list(packs)
        free = max(0, room - (shapes if self.context.slurm.preflight else 0))
        self.left = max(0, len(packs) - free)
        return list(packs[:free])

    def _through_the_gate(self, packs: Sequence[Pack]) -> tuple[list[Pack], dict[str, str]]:
        """Return (packs that may be submitted; for each model whose baseline is among them, that pack's id)."""
        self.held = {}
        if not self.context.slurm.baseline_gate:
            return list(packs), {}
        context = self.context
        baselines = {p.model.label: p.id for p in packs if all(map(is_baseline, p.items))}
        problems = _baseline_problems(context, {p.model.label for p in packs} - set(baselines))
        self.held = {model: why for model, why in problems.items() if why}
        # A baseline comes before the cells that wait for it, also where limits let only some in.
        ordered = sorted(packs, key=lambda p: p.id not in baselines.values())
        return [p for p in ordered if p.model.label not in self.held], baselines

    def _chunks(self, packs: Sequence[Pack], of_shape: Mapping[str, int], gates: Mapping[str, str]) -> list[Chunk]:
        """Return arrays of one shape each; quantized packs come after their baseline where that is submitted too."""
        present = {p.id for p in packs}
        gates = {model: pack for model, pack in gates.items() if pack in present}
        groups: dict[tuple[int, str | None, bool], list[str]] = {}
        for pack in packs:
            model = pack.model.label if pack.model.label in gates else None
            groups.setdefault((of_shape[pack.id], model, pack.id in gates.values()), []).append(pack.id)
        size = max(1, min(self.limits.max_array_size, MOST_PER_CHUNK))
        chunks: list[Chunk] = []
        number_of: dict[str, int] = {}
        for (shape, model, is_gate), ids in sorted(groups.items(), key=lambda item: not item[0][2]):
            for start in range(0, len(ids), size):
                after = None if is_gate or model is None else number_of[model]
                chunks.append(
                    Chunk(number=len(chunks), shape=shape, packs=tuple(ids[start : start + size]), after=after)
                )
                if is_gate and model is not None:
                    number_of[model] = chunks[-1].number
        # Each array is throttled by itself: there can't be more of them than jobs that may run.
        return chunks if self.parallel is None else chunks[: self.parallel]


def _baselines(manifest: Manifest) -> dict[str, list[str]]:
    """Return baseline measurements by model: what the gate looks at."""
    found: dict[str, list[str]] = {}
    for m in manifest.measurements():
        if is_baseline((m.cell, (m.eval,))):
            found.setdefault(m.cell.model.label, []).append(m.key)
    return found


def _frozen(pack: Pack, frozen: Mapping[EvalSpec, EvalSpec]) -> Pack:
    """Return a pack whose task definitions are copies that nobody edits."""
    return replace(pack, items=tuple((cell, tuple(frozen.get(e, e) for e in specs)) for cell, specs in pack.items))


def _baseline_problems(context: LaunchContext, models: Iterable[str]) -> dict[str, str | None]:
    """Return why quantized cells must wait, or None, by model whose baseline is not to be run now."""
    wanted = {
        m.key: m.cell.model.label
        for m in context.manifest.measurements()
        if is_baseline((m.cell, (m.eval,))) and m.cell.model.label in set(models)
    }
    rows: dict[str, list[Row]] = {}
    for row in context.store.read(["measurement", "eval", "status", "metrics"], measurements=set(wanted)).to_pylist():
        rows.setdefault(wanted[row["measurement"]], []).append(row)
    references = context.job_settings.references
    problems: dict[str, str | None] = {}
    for model in models:
        count = sum(1 for label in wanted.values() if label == model)
        if count == 0:
            problems[model] = "the study has no baseline of it: add a block {bits: 16}"
        elif len(rows.get(model, [])) < count:
            problems[model] = "its baseline is not measured yet, and not to be run by this launch"
        else:
            tolerance = context.slurm.baseline_tolerance
            problems[model] = gate_problem(rows[model], references.get(model, {}), tolerance)
    return problems
