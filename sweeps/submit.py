"""``executor=slurm``: claim what is left and hand it to SLURM as job arrays, through submitit. Waits for no job."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from kbit.evaluation.spec import EvalSpec
from sweeps.cell import ModelRef
from sweeps.claims import Claim
from sweeps.errors import UserError
from sweeps.gate import gate_problem
from sweeps.inflight import Flight
from sweeps.job import PackJob, PreflightJob
from sweeps.launches import Chunk, Launch, Shape, line_offsets
from sweeps.launching import Claimer
from sweeps.manifest import Manifest
from sweeps.plan import Pack, Packing, Plan
from sweeps.resources import SlurmConfig
from sweeps.slurm import Limits, check_request, look, read_limits
from sweeps.snapshot import code_hash, freeze_evals, job_setup, snapshot_code
from sweeps.store import Store

MOST_PER_CHUNK: Final = 500
"""Jobs of an array, where the cluster takes more: so many logs share a directory."""
TRIES: Final = 3
PREFLIGHT_MINUTES: Final = 15
PREFLIGHT_WARNING_SECONDS: Final = 20


class SubmitError(Exception):
    """sbatch failed; the message says what it said."""


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
        settings: what every job needs to know (sweeps.job).
    """

    store: Store
    manifest: Manifest
    retry: frozenset[str]
    slurm: SlurmConfig
    device: str
    overrides: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]
    provenance: Callable[[str], Mapping[str, Any]]
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
        code = snapshot_code(self.store.out) if snapshot else Path(__file__).parent.parent
        expected = code.name if snapshot else code_hash()
        limits = read_limits(partition=self.slurm.partition, account=self.slurm.account, qos=self.slurm.qos)
        draft = _Draft(submitter=self, limits=limits, launch_id=launch_id, code_hash=expected)
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
        run = _Submission(submitter=self, launch=draft.launch, claim=claim, exclude=exclude, code=code)
        error = run.submit_all()
        return replace(submitted, launch=draft.launch, jobs=run.count, error=error)

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


@dataclass(kw_only=True)
class _Draft:
    """A launch before it is claimed: what is left, cut down to what may and can run now, written to its directory."""

    submitter: Submitter
    limits: Limits
    launch_id: str
    code_hash: str
    launch: Launch | None = None
    left: int = 0
    held: dict[str, str] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)

    def prepare(self, plan: Plan) -> Plan:
        """The part of a plan that is to be claimed; its launch is on disk when this returns."""
        submitter = self.submitter
        packs, gates = self._through_the_gate(plan.packs)
        packs = self._that_fit(packs)
        shapes = list(dict.fromkeys(submitter.shape(p.model, p.rung) for p in packs))
        packs = self._within_limits(packs, len(shapes))
        self.launch = None
        if not packs:
            return replace(plan, packs=())
        shapes = list(dict.fromkeys(submitter.shape(p.model, p.rung) for p in packs))
        of_shape = {p.id: shapes.index(submitter.shape(p.model, p.rung)) for p in packs}
        chunks = self._chunks(packs, of_shape, gates)
        kept = {p for c in chunks for p in c.packs}
        self.left += len(packs) - len(kept)
        evals = submitter.manifest.evals
        frozen = dict(zip(evals, freeze_evals(evals, submitter.store.out), strict=True))
        packs = [_frozen(p, frozen) for p in packs if p.id in kept]
        self.launch = Launch(
            out=submitter.store.out,
            id=self.launch_id,
            sweep=submitter.manifest.sweep,
            shapes=tuple(shapes),
            chunks=tuple(chunks),
            settings={
                **submitter.settings,
                "code_hash": self.code_hash,
                "kill_wait": self.limits.kill_wait,
                "provenance": dict(submitter.provenance(self.launch_id)),
                "store_launched": _store_clock(submitter.store.out),
            },
            offsets=line_offsets(packs),
            launched=time.time(),
        )
        self.launch.save(packs)
        return replace(plan, packs=tuple(packs))

    def _that_fit(self, packs: Sequence[Pack]) -> list[Pack]:
        """Without packs whose step of the ladder asks for more than the cluster has."""
        submitter, fit = self.submitter, []
        said: dict[Shape, str | None] = {}
        for pack in packs:
            shape = submitter.shape(pack.model, pack.rung)
            if pack.rung and shape not in said:
                try:
                    check_request(submitter.slurm.request(shape))
                    said[shape] = None
                except UserError as error:
                    said[shape] = str(error)
            problem = said.get(shape)
            if problem is None:
                fit.append(pack)
            else:
                self.unfit[pack.model.label] = problem
        return fit

    def _within_limits(self, packs: Sequence[Pack], shapes: int) -> list[Pack]:
        room = self.limits.room
        if room is None:
            self.left = 0
            return list(packs)
        free = max(0, room - (shapes if self.submitter.slurm.preflight else 0))
        self.left = max(0, len(packs) - free)
        return list(packs[:free])

    def _through_the_gate(self, packs: Sequence[Pack]) -> tuple[list[Pack], dict[str, str]]:
        """(packs that may be submitted; for each model whose baseline is among them, that pack's id)."""
        self.held = {}
        if not self.submitter.slurm.baseline_gate:
            return list(packs), {}
        submitter = self.submitter
        baselines = {p.model.label: p.id for p in packs if all(c.quant.is_baseline for c, _ in p.items)}
        problems = _baseline_problems(submitter, {p.model.label for p in packs} - set(baselines))
        self.held = {model: why for model, why in problems.items() if why}
        # A baseline comes before the cells that wait for it, also where limits let only some in.
        ordered = sorted(packs, key=lambda p: p.id not in baselines.values())
        return [p for p in ordered if p.model.label not in self.held], baselines

    def _chunks(self, packs: Sequence[Pack], of_shape: Mapping[str, int], gates: Mapping[str, str]) -> list[Chunk]:
        """Arrays of one shape each; a model's quantized packs come after its baseline where that is submitted too."""
        present = {p.id for p in packs}
        gates = {model: pack for model, pack in gates.items() if pack in present}
        groups: dict[tuple[int, str | None, bool], list[str]] = {}
        for pack in packs:
            model = pack.model.label if pack.model.label in gates else None
            groups.setdefault((of_shape[pack.id], model, pack.id in gates.values()), []).append(pack.id)
        size = min(self.limits.max_array_size, MOST_PER_CHUNK)
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
        most = self.submitter.slurm.max_parallel
        # Each array is throttled by itself: there can't be more of them than jobs that may run.
        return chunks if most is None else chunks[:most]


@dataclass(kw_only=True)
class _Submission:
    """One claimed launch on its way into the queue."""

    submitter: Submitter
    launch: Launch
    claim: Claim
    exclude: str | None
    code: Path
    count: int = 0
    _jobs: dict[str, str] = field(default_factory=dict)

    def submit_all(self) -> str | None:
        """Preflights, then arrays that depend on them; the words of sbatch when it stopped half-way."""
        slurm, launch = self.submitter.slurm, self.launch
        code = self.code
        try:
            for shape in sorted({c.shape for c in launch.chunks}) if slurm.preflight else ():
                self._submit(
                    launch.preflight_name(shape), shape, self._preflight(shape), ["--preflight", str(shape)], code
                )
            for chunk in launch.chunks:
                jobs = [self._pack_job(chunk, i) for i in range(len(chunk.packs))]
                self.submitter.progress(f"submitting {chunk.number + 1} of {len(launch.chunks)} job arrays")
                self._submit(
                    launch.chunk_name(chunk.number), chunk.shape, jobs, ["--chunk", str(chunk.number)], code, chunk
                )
                self.count += len(jobs)
        except SubmitError as error:
            return str(error)
        finally:
            launch.record_submitted(self._jobs)
        return None

    def _preflight(self, shape: int) -> list[PreflightJob]:
        return [PreflightJob(out=str(self.launch.out), launch=self.launch.id, shape=shape)]

    def _pack_job(self, chunk: Chunk, index: int) -> PackJob:
        return PackJob(
            out=str(self.launch.out),
            launch=self.launch.id,
            claim=self.claim.number,
            chunk=chunk.number,
            index=index,
        )

    def _submit(
        self,
        name: str,
        shape: int,
        jobs: Sequence[PackJob | PreflightJob],
        which: Sequence[str],
        code: Path,
        chunk: Chunk | None = None,
    ) -> None:
        """One array. Where sbatch fails, the queue is asked before it is tried again: it may have been taken.

        Raises:
            SubmitError: it was not, or nobody knows.
        """
        folder = (
            self.launch.logs(chunk.number)
            if chunk
            else self.launch.out / "logs" / self.launch.id / f"preflight-{shape}"
        )
        folder.mkdir(parents=True, exist_ok=True)
        for attempt in range(TRIES):
            executor = self._executor(folder, name, shape, which, code, chunk, len(jobs))
            try:
                first = executor.submit_array(jobs)[0]
                self._jobs[name] = first.job_id.partition("_")[0]
                return
            except Exception as error:
                said = _words(error)
            self.submitter.progress(f"sbatch failed ({said}): asking the queue")
            taken = self._taken(name)
            if taken is not None:
                self._jobs[name] = taken
                return
            if not _is_transient(said):
                break
            time.sleep(2.0 * (attempt + 1))
        raise SubmitError(said)

    def _taken(self, name: str) -> str | None:
        """The id of a job that sbatch said it failed to submit, but the queue has."""
        sighting = look([name], self.launch.launched)
        if sighting.queue is None:
            raise SubmitError("; ".join(sighting.problems) or "the queue can't be asked")
        jobs = {**(sighting.accounting or {}), **sighting.queue}
        # What SLURM refuses has a record too: it ended without ever having a node.
        found = [job.job for (known, _), job in jobs.items() if known == name and (job.nodes or not job.terminal)]
        return found[0].partition("_")[0] if found else None

    def _executor(
        self, folder: Path, name: str, shape: int, which: Sequence[str], code: Path, chunk: Chunk | None, count: int
    ) -> Any:
        import submitit

        launch, slurm = self.launch, self.submitter.slurm
        command = [sys.executable, "-P", "-m", "sweeps.job", "--out", str(launch.out), "--launch", launch.id]
        command += ["--claim", str(self.claim.number), *which, "--"]
        executor = submitit.SlurmExecutor(folder=folder, python=shlex.join(command), max_num_timeout=slurm.requeues + 1)
        parameters = slurm.request(launch.shapes[shape], self.exclude).parameters()
        additional = {**parameters.pop("additional_parameters", {}), "kill-on-invalid-dep": "yes"}
        additional["requeue" if slurm.requeues else "no-requeue"] = True
        if chunk is None:
            parameters["time"] = min(parameters["time"], PREFLIGHT_MINUTES)
        else:
            depends = [self._jobs[launch.preflight_name(shape)]] if slurm.preflight else []
            depends += [self._jobs[launch.chunk_name(chunk.after)]] if chunk.after is not None else []
            if depends:
                parameters["dependency"] = "afterok:" + ":".join(depends)
        environment = job_setup(code)
        executor.update_parameters(
            **parameters,
            job_name=name,
            setup=[*slurm.setup, *environment],
            # A preflight is short, and has nothing to finish.
            signal_delay_s=slurm.signal_seconds if chunk else min(slurm.signal_seconds, PREFLIGHT_WARNING_SECONDS),
            stderr_to_stdout=True,
            array_parallelism=self._parallel(chunk, count),
            additional_parameters=additional,
        )
        return executor

    def _parallel(self, chunk: Chunk | None, count: int) -> int:
        """This array's share of max_parallel."""
        most = self.submitter.slurm.max_parallel
        if chunk is None or most is None:
            return max(1, count)
        arrays = len(self.launch.chunks)
        return max(1, most // arrays + (chunk.number < most % arrays))


def packing_for(slurm: SlurmConfig) -> Packing:
    """Packs that are predicted to take half the walltime: predictions are right within a factor of two."""
    return Packing(seconds=slurm.minutes * 30.0, cells=slurm.cells_per_job, baseline_apart=slurm.baseline_gate)


def submit_settings(
    *,
    slurm: SlurmConfig,
    device: str,
    batch_tokens: int,
    trust_remote_code: bool,
    tracking: Any,
    references: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """What every job of a launch needs to know, in JSON's types."""
    return {
        "device": device,
        "batch_tokens": batch_tokens,
        "trust_remote_code": trust_remote_code,
        "requeues": slurm.requeues,
        "signal_seconds": slurm.signal_seconds,
        "tracking": {**asdict(tracking), "dir": str(tracking.dir)},
        "references": references,
        "baseline_tolerance": slurm.baseline_tolerance,
    }


def _frozen(pack: Pack, frozen: Mapping[EvalSpec, EvalSpec]) -> Pack:
    """A pack whose task definitions are copies that nobody edits."""
    return replace(pack, items=tuple((cell, tuple(frozen[e] for e in specs)) for cell, specs in pack.items))


def _baseline_problems(submitter: Submitter, models: Iterable[str]) -> dict[str, str | None]:
    """For models whose baseline is not to be run now: why their quantized cells must wait, or None."""
    wanted = {
        m.key: m.cell.model.label
        for m in submitter.manifest.measurements()
        if m.cell.quant.is_baseline and m.cell.model.label in set(models)
    }
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in submitter.store.read(["measurement", "eval", "status", "metrics"], measurements=set(wanted)).to_pylist():
        rows.setdefault(wanted[row["measurement"]], []).append(row)
    references = submitter.settings["references"]
    problems: dict[str, str | None] = {}
    for model in models:
        count = sum(1 for label in wanted.values() if label == model)
        if count == 0:
            problems[model] = "the study has no baseline of it: add a block {bits: 16}"
        elif len(rows.get(model, [])) < count:
            problems[model] = "its baseline is being run by another launch"
        else:
            tolerance = submitter.slurm.baseline_tolerance
            problems[model] = gate_problem(rows[model], references.get(model, {}), tolerance)
    return problems


def _store_clock(out: Path) -> float:
    """Now, by the clock that stamps the store's files."""
    probe = out / "launches" / f".clock-{time.time_ns()}.tmp"
    probe.parent.mkdir(parents=True, exist_ok=True)
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _words(error: Exception) -> str:
    """What sbatch said, in one line."""
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [type(error).__name__])[-1]


def _is_transient(said: str) -> bool:
    return any(
        word in said for word in ("Unable to contact", "timed out", "Connection refused", "try again", "connect")
    )
