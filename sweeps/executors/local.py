"""``mode=run``: freeze the study, then run what is left of it, on this machine or through SLURM."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Mapping
from typing import Final

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape

from sweeps.errors import EXIT_FAILED, EXIT_INTERRUPTED, PoolError, UserError, did_you_mean
from sweeps.launches.claimer import (
    Claimer,
    counts_text,
    launch_provenance,
    new_launch,
    out_dir,
    plain,
    tracking_config,
)
from sweeps.launches.claims import Claim, Claims
from sweeps.launches.in_flight import has_scheduler, read_flight, reconcile_twice
from sweeps.plan.packs import Packing, Plan, parse_retry
from sweeps.results.progress import RunView
from sweeps.results.report import show_results
from sweeps.store.parts import Store
from sweeps.study.manifest import Manifest
from sweeps.study.resolve import build_study
from sweeps.tracking.tracker import TrackingConfig
from sweeps.worker.devices import Workers, plan_workers, resolve_device
from sweeps.worker.execution import Execution, batch_tokens, worker_log
from sweeps.worker.settings import WorkerSettings

EXECUTORS: Final = ("local", "slurm")
_LOCAL_KEYS: Final = ("name", "device", "batch_tokens", "workers")


def run(cfg: DictConfig, console: Console) -> int:
    """Run what is left of a study; returns the exit code.

    Raises:
        UserError, SpecError: the request is wrong; nothing was run.
    """
    check_executor(plain(cfg.executor))
    if cfg.executor.name == "slurm":
        from sweeps.executors.slurm.executor import run_on_slurm

        return run_on_slurm(cfg, console)
    return _run_here(cfg, console)


def check_executor(executor: Mapping[str, object]) -> None:
    """Refuse an executor that does not exist, and keys of one that isn't chosen.

    Raises:
        UserError: either.
    """
    name = executor["name"]
    if name not in EXECUTORS:
        raise UserError(
            f"executor.name={name!r} is not valid: one of {', '.join(EXECUTORS)}.{did_you_mean(str(name), EXECUTORS)}"
        )
    foreign = [k for k, v in executor.items() if v is not None and k not in _LOCAL_KEYS] if name == "local" else []
    if name == "slurm" and executor["workers"] is not None:
        foreign = ["workers"]
    if foreign:
        other = next(e for e in EXECUTORS if e != name)
        raise UserError(f"executor.{foreign[0]} is a key of executor={other}: add executor={other}, or leave it out")


def _run_here(cfg: DictConfig, console: Console) -> int:
    retry = parse_retry(plain(cfg.retry))
    device = resolve_device(cfg.executor.device)
    tokens = batch_tokens(cfg.executor.batch_tokens, device)
    tracking = tracking_config(cfg)
    store = Store(out=out_dir(cfg))
    store.check_writable()
    with console.status("resolving models and data") as status:
        study = build_study(cfg, device=device, strict=True, progress=status.update)
        if has_scheduler():
            # What dead SLURM jobs held is free only once that is known.
            reconcile_twice(store.out, lambda n: status.update(f"waiting to be sure: SLURM does not know {n} job(s)"))
    manifest = study.manifest
    workers = plan_workers(device, cfg.executor.workers, max(c.model.params or 0 for c in manifest.cells))
    name = manifest.save(store.out)
    launch = new_launch()
    plan, claim = Claimer(
        store=store,
        manifest=manifest,
        retry=retry,
        packing=Packing(workers=workers.count),
        device=device,
        executor="local",
        launch=launch,
    ).claim()
    if claim is None:
        console.print(f"[bold]{manifest.sweep}[/]: nothing to do. {counts_text(plan)}")
        for line in who_holds(store) if plan.counts["in flight"] else ():
            console.print(line, highlight=False)
        return _ending(store, manifest, console, figures=False)
    console.print(
        f"[bold]{manifest.sweep}[/]: {sum(len(p.items) for p in plan.packs)} cells, {plan.todo} measurements "
        f"in {len(plan.packs)} packs on {workers.count} {device} worker(s) with {workers.threads} thread(s). "
        f"{counts_text(plan)}\nResults stream to {store.out}; Ctrl-C is safe: the same command goes on from there."
    )
    settings = WorkerSettings(
        batch_tokens=tokens,
        trust_remote_code=bool(cfg.trust_remote_code),
        provenance=launch_provenance(launch, name),
    )
    try:
        _execute(plan, store, claim, workers, settings, tracking, console)
    except KeyboardInterrupt:
        console.print("\n[yellow]interrupted[/]: finished measurements are stored; the same command runs the rest.")
        return EXIT_INTERRUPTED
    except PoolError as error:
        console.print(f"[red]{error}[/]", highlight=False)
        return EXIT_FAILED
    except OSError as error:
        console.print(f"[red]{escape(f'results can not be written any more: {error}')}[/]\nWhat is stored is safe.")
        return EXIT_FAILED
    finally:
        _close(store, claim, plan, console)
    return _ending(store, manifest, console, figures=True)


def who_holds(store: Store) -> list[str]:
    """A sentence for each launch that may be at work."""
    flight = read_flight(store.out)
    here = [f"{c.sweep} is being run by launch {c.launch}, process {c.pid} on {c.host}." for c in flight.local]
    return here + [f"{la.sweep} is being run by SLURM jobs {la.chunk_name(0)[:-1]}*." for la, _ in flight.launches]


def _execute(
    plan: Plan,
    store: Store,
    claim: Claim,
    workers: Workers,
    settings: WorkerSettings,
    tracking: TrackingConfig,
    console: Console,
) -> None:
    claims = Claims(out=store.out)
    view = RunView(console=console, cells=Counter(m.cell.key for p in plan.packs for m in p.measurements()))
    execution = Execution(
        packs=plan.packs,
        store=store,
        workers=workers,
        settings=settings,
        tracking=tracking,
        on_event=view.on_event,
        warn=lambda text: console.print(f"[yellow]{escape(text)}[/]"),
        log=worker_log(store.out / "logs" / claim.launch),
        beat=lambda running: claims.heartbeat(claim, running),
    )
    previous = {s: signal.signal(s, _interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with view:
            execution.run()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _close(store: Store, claim: Claim, plan: Plan, console: Console) -> None:
    """Compact what interrupted packs left as parts, and give back what was claimed."""
    try:
        for pack in plan.packs:
            store.compact(pack.id)
        Claims(out=store.out).release(claim)
    except OSError as error:
        console.print(f"[yellow]{escape(f'{store.out} can not be tidied up: {error}')}[/]")


def _ending(store: Store, manifest: Manifest, console: Console, *, figures: bool) -> int:
    """Table, figures, findings, where everything lies; which cells failed."""
    failed = show_results(store, manifest, console, figures=figures)
    return EXIT_FAILED if failed else 0
