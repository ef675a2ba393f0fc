"""``mode=run executor=slurm``: check, reconcile, submit what is left, say what was done; ``watch=true`` follows it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape

from sweeps.errors import EXIT_FAILED, EXIT_INTERRUPTED, SchedulerError, UserError
from sweeps.executors.slurm.config import SlurmConfig, counted, shape_text
from sweeps.executors.slurm.poison import record_poison
from sweeps.executors.slurm.query import Sighting
from sweeps.executors.slurm.show.manage import why_never_run
from sweeps.executors.slurm.show.watch import WatchView
from sweeps.executors.slurm.submit import Submitted, Submitter, packing_for, submit_settings
from sweeps.launches.claimer import (
    counts_text,
    launch_provenance,
    new_launch,
    out_dir,
    plain,
    plan_study,
    tracking_config,
)
from sweeps.launches.in_flight import Flight, read_flight, reconcile, reconcile_twice
from sweeps.plan.cost import load_seconds
from sweeps.plan.packs import Plan, parse_retry
from sweeps.results.report import show_results
from sweeps.results.table import measurement_states
from sweeps.status import UNRECORDED, State
from sweeps.store.parts import Store
from sweeps.study.manifest import Manifest
from sweeps.study.resolve import build_study
from sweeps.worker.devices import DEVICES
from sweeps.worker.execution import batch_tokens

MOST_TRIES: Final = 3
"""Times that a watch submits the same work, which ends each time without a record."""
WATCH_SECONDS: Final = 15.0
"""Between two looks of watch=true: two calls each, for however many people watch a cluster."""


def run_on_slurm(cfg: DictConfig, console: Console) -> int:
    """Submit what is left of a study; returns the exit code.

    Raises:
        UserError, SpecError: the request is wrong; nothing was submitted.
    """
    retry = parse_retry(plain(cfg.retry))
    slurm = SlurmConfig.from_config(plain(cfg.executor))
    device = slurm_device(cfg.executor.device, slurm)
    tokens = batch_tokens(cfg.executor.batch_tokens, device)
    tracking = tracking_config(cfg)
    store = Store(out=_shared_dir(out_dir(cfg)))
    store.check_writable()
    with console.status("resolving models and data") as status:
        study = build_study(cfg, device=device, strict=True, progress=status.update)
        manifest = study.manifest
        name = manifest.name
        submitter = Submitter(
            store=store,
            manifest=manifest,
            retry=retry,
            slurm=slurm,
            device=device,
            overrides=member_values(cfg, manifest, ("gpus", "mem_gb")),
            settings=submit_settings(
                slurm=slurm,
                device=device,
                batch_tokens=tokens,
                trust_remote_code=bool(cfg.trust_remote_code),
                tracking=tracking,
                references=_references(cfg, manifest),
            ),
            provenance=partial(launch_provenance, manifest=name),
            progress=status.update,
        )
        status.update("asking the cluster whether it takes such jobs")
        submitter.check()
        status.update("asking the cluster about earlier jobs")
        sighting = reconcile_twice(
            store.out, lambda n: status.update(f"waiting to be sure: SLURM does not know {n} job(s)")
        )
        _say_problems(sighting, console)
        for text in record_poison(store, manifest, read_flight(store.out)):
            console.print(f"[yellow]{escape(text)}[/]", highlight=False)
        manifest.save(store.out)
        try:
            submitted = submitter.submit(new_launch(), read_flight(store.out))
        except SchedulerError as error:
            raise UserError(f"executor=slurm: {error}. Nothing was submitted") from error
    _say(submitted, manifest, slurm, console)
    if cfg.watch:
        return _watch(submitter, console)
    if submitted.launch is None and submitted.plan.counts["in flight"]:
        console.print("mode=status says how those in flight do; watch=true follows them.", highlight=False)
    elif submitted.launch is None and not submitted.left:
        failed = show_results(store, manifest, console, figures=False)
        return EXIT_FAILED if failed or submitted.held or submitted.unfit else 0
    return EXIT_FAILED if submitted.error else 0


def plan_rows(
    cfg: DictConfig, store: Store, manifest: Manifest, retry: frozenset[str], device: str, flight: Flight
) -> tuple[Plan, list[tuple[str, str]]]:
    """For mode=plan: the plan, and what would be submitted in words, without asking the cluster."""
    slurm = SlurmConfig.from_config(plain(cfg.executor))
    plan = plan_study(store, manifest, retry, packing_for(slurm), device, flight)
    overrides = member_values(cfg, manifest, ("gpus", "mem_gb"))
    shapes = Counter(slurm.shape(p.model, device, p.rung, overrides.get(p.model.label, {})) for p in plan.packs)
    rows = [("jobs", f"{len(plan.packs):,} of {slurm.minutes} min, each with cells of one model")]
    rows += [
        (f"{n:,}", f"with {shape_text(s)}" + (f" (step {s.rung} of the out-of-memory ladder)" if s.rung else ""))
        for s, n in shapes.most_common()
    ]
    return plan, rows


def slurm_device(asked: str, slurm: SlurmConfig) -> str:
    """'cpu' or 'cuda': what jobs compute on.

    Raises:
        UserError: not a device, or a GPU without asking SLURM for one.
    """
    if asked not in DEVICES:
        raise UserError(f"executor.device={asked!r} is not valid: one of {', '.join(DEVICES)}")
    if asked == "cuda" and slurm.gpus == 0:
        raise UserError("executor.device='cuda' with executor.gpus=0: ask for GPUs, or for executor.device=cpu")
    return asked if asked != "auto" else "cpu" if slurm.gpus == 0 else "cuda"


def hours(seconds: float) -> str:
    """A time for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def member_values(cfg: DictConfig, manifest: Manifest, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """What the configuration says of models beside what they are, by label: the named values, where given."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for group, family in plain(cfg.models).items():
        for member, values in family["members"].items():
            given = {n: values[n] for n in names if values.get(n) is not None}
            if given:
                found[str(family.get("family") or group), str(member)] = given
    models = dict.fromkeys(c.model for c in manifest.cells)
    return {m.label: found[m.family, m.name] for m in models if (m.family, m.name) in found}


def _references(cfg: DictConfig, manifest: Manifest) -> dict[str, dict[str, float]]:
    """The values that the configuration expects of baselines, by model label."""
    evals = tuple(f"{e.name}_" for e in manifest.evals)
    found: dict[str, dict[str, float]] = {}
    for label, values in member_values(cfg, manifest, ("reference",)).items():
        given = values["reference"]
        if not isinstance(given, dict) or not all(
            str(name).startswith(evals) and isinstance(value, int | float) for name, value in given.items()
        ):
            raise UserError(
                f"{label}: reference={given!r} is not valid: numbers by EVAL_METRIC, e.g. {{{evals[0]}loss: 3.14}}; "
                f"this study's evaluations: {', '.join(e.name for e in manifest.evals)}"
            )
        found[label] = given
    return found


def _shared_dir(out: Path) -> Path:
    """Refuse a results directory that jobs can't be told of, or whose file system isn't there."""
    if "%" in str(out):
        raise UserError(f"out={str(out)!r}: SLURM takes % in a path for a job's number; choose another directory")
    if not out.parent.is_dir():
        raise UserError(
            f"out={str(out)!r}: {out.parent} does not exist. Is its file system mounted? "
            "Make that directory, or name one that this machine and the cluster's nodes share"
        )
    return out


def _say_problems(sighting: Sighting | None, console: Console) -> None:
    for problem in sighting.problems if sighting else ():
        console.print(f"[yellow]{escape(problem)}[/]", highlight=False)


def _say(submitted: Submitted, manifest: Manifest, slurm: SlurmConfig, console: Console) -> None:
    plan, launch = submitted.plan, submitted.launch
    if launch is not None:
        measurements = sum(len(p.measurements()) for p in plan.packs)
        cells = len({c.key for p in plan.packs for c, _ in p.items})
        jobs = counted(len(plan.packs), "job")
        if submitted.jobs < len(plan.packs):
            jobs = f"{submitted.jobs:,} of {jobs}"
        seconds = sum(p.seconds + load_seconds(p.model) for p in plan.packs)
        shapes = " or ".join(map(shape_text, launch.shapes))
        console.print(
            f"[bold]{manifest.sweep}[/]: {jobs} submitted for {counted(cells, 'cell')}, "
            f"{counted(measurements, 'measurement')}, {hours(seconds)} predicted; "
            f"each job has {shapes} for {slurm.minutes} min. {counts_text(plan)}".rstrip(),
            highlight=False,
        )
    elif not submitted.left and not submitted.held and not submitted.unfit:
        console.print(f"[bold]{manifest.sweep}[/]: nothing to submit. {counts_text(plan)}", highlight=False)
    for model, why in submitted.held.items():
        console.print(f"[yellow]{escape(model)} is held back: {escape(why)}[/]", highlight=False)
    for model, why in submitted.unfit.items():
        text = f"{model} ran out of memory, and there is no larger job: {why}"
        console.print(f"[yellow]{escape(text)}[/]", highlight=False)
    if submitted.left:
        text = f"{counted(submitted.left, 'more job')} did not fit ({submitted.why or 'executor.max_parallel'})"
        console.print(
            f"[yellow]{escape(text)}: run the same command again later, or with watch=true.[/]", highlight=False
        )
    if submitted.error:
        text = f"{submitted.error}: {submitted.jobs} jobs were submitted; the same command submits the rest"
        console.print(f"[red]{escape(text)}[/]", highlight=False)
    if launch is not None:
        waiting = "They wait for a preflight of a few minutes. " if slurm.preflight else ""
        console.print(
            f"Jobs are named {launch.chunk_name(0)[:-1]}*. {waiting}You can log out. mode=status says how they "
            "do, mode=logs why cells failed, mode=cancel ends them; watch=true follows them.",
            highlight=False,
        )


def _watch(submitter: Submitter, console: Console) -> int:
    """Follow a study, submitting what limits kept out, until nothing is left; Ctrl-C only stops looking."""
    store, manifest = submitter.store, submitter.manifest
    # What somebody cancels meanwhile stays cancelled, and what fails again is not tried for ever.
    submitter = replace(submitter, retry=frozenset(UNRECORDED) - {State.CANCELLED})
    try:
        with WatchView(console=console, out=store.out, manifest=manifest) as view:
            _follow(submitter, view)
    except KeyboardInterrupt:
        console.print(
            "\nNot watching any more; the jobs go on. mode=status says how they do, mode=cancel ends them.",
            highlight=False,
        )
        return EXIT_INTERRUPTED
    failed = show_results(store, manifest, console, figures=True)
    states = measurement_states(store.out, manifest, read_flight(store.out))
    unfinished = {m for m, state in states.items() if not state.is_final}
    for why, measurements in why_never_run(store.out, unfinished).items():
        text = f"{counted(len(measurements), 'measurement')} can't run: {why}. mode=logs says more"
        console.print(f"[red]{escape(text)}[/]", highlight=False, soft_wrap=True)
    if unfinished:
        console.print(f"{len(unfinished)} of {counted(len(states), 'measurement')} not done: mode=status says more")
    return EXIT_FAILED if failed or unfinished else 0


def _follow(submitter: Submitter, view: WatchView) -> None:
    store, manifest = submitter.store, submitter.manifest
    tries: Counter[str] = Counter()
    while True:
        sighting = reconcile(store.out)
        for text in record_poison(store, manifest, read_flight(store.out)):
            view.note(text)
        flight = read_flight(store.out)
        view.show(flight, sighting)
        plan = plan_study(store, manifest, submitter.retry, submitter.packing, submitter.device, flight)
        worn_out = plan.todo and all(tries[m] >= MOST_TRIES for m in plan.measurement_keys())
        if worn_out and not plan.counts["in flight"]:
            view.note(f"{plan.todo} measurements ended {MOST_TRIES} times without a record: not submitted again")
            return
        if plan.todo and not worn_out:
            held = _top_up(submitter, view, tries)
            if held and not plan.counts["in flight"]:
                return
        elif not plan.counts["in flight"]:
            return
        time.sleep(WATCH_SECONDS)


def _top_up(submitter: Submitter, view: WatchView, tries: Counter[str]) -> Mapping[str, str]:
    """Submit what fits now, and count that; returns why some of it never will."""
    try:
        submitted = submitter.submit(new_launch(), read_flight(submitter.store.out))
    except (SchedulerError, UserError) as error:
        view.note(str(error))
        return {}
    if submitted.launch is not None:
        tries.update(submitted.plan.measurement_keys())
        view.note(f"{counted(submitted.jobs, 'more job')} submitted")
    if submitted.error:
        view.note(submitted.error)
    return {**submitted.held, **submitted.unfit} if submitted.launch is None and not submitted.left else {}
