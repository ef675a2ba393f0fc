"""Packs through worker processes on this machine: claim, run, show what came of it."""

from __future__ import annotations

import signal
from collections import Counter
from dataclasses import replace
from math import inf

from rich.console import Console
from rich.markup import escape

from sweeps.errors import EXIT_FAILED, EXIT_INTERRUPTED, PoolError
from sweeps.events import Event, Measured, Withheld
from sweeps.executors.base import EXECUTORS, Order
from sweeps.executors.settings import LocalSettings
from sweeps.launches.claimer import Claimer, counts_text, launch_provenance, new_launch
from sweeps.launches.claims import Claim, Claims
from sweeps.launches.in_flight import read_flight
from sweeps.launches.spending import BudgetWatch, read_spending
from sweeps.plan.budget import spent_text
from sweeps.plan.cost import COLUMNS, CostModel
from sweeps.plan.packs import IN_FLIGHT, Packing, Plan
from sweeps.plan.time_left import TimeLeft
from sweeps.results.progress import RunView
from sweeps.results.report import has_report, show_results
from sweeps.store.parts import Store
from sweeps.worker.devices import Workers, plan_workers
from sweeps.worker.execution import Execution, batch_tokens, worker_log
from sweeps.worker.settings import WorkerSettings


def run_here(order: Order, settings: LocalSettings) -> int:
    """Run what is left of a study on this machine; return the exit code."""
    store, manifest, console = order.store, order.manifest, order.console
    workers = workers_for(order, settings)
    launch = new_launch()
    budget = order.options.budget
    left = inf if budget is None else read_spending(store, manifest.sweep).left(budget)
    plan, claim = Claimer(
        store=store,
        manifest=manifest,
        retry=order.options.retry,
        packing=Packing(workers=workers.count, order=order.options.order),
        device=order.device,
        executor="local",
        launch=launch,
    ).claim(lambda plan: plan if left else replace(plan, packs=()))
    if claim is None and plan.todo:
        _say_spent(order, plan.todo)
        return _ending(order, report=False)
    if claim is None:
        console.print(f"[bold]{manifest.sweep}[/]: nothing to do. {counts_text(plan)}")
        for line in who_holds(store) if plan.counts[IN_FLIGHT] else ():
            console.print(line, highlight=False)
        # All of it may have been measured by other studies, or by a launch that was cut before its end.
        return _ending(order, report=not plan.counts[IN_FLIGHT] and not has_report(store, manifest))
    console.print(
        f"[bold]{manifest.sweep}[/]: {sum(len(p.items) for p in plan.packs)} cells, {plan.todo} measurements "
        f"in {len(plan.packs)} packs on {workers.count} {order.device} worker(s) with {workers.threads} thread(s). "
        f"{counts_text(plan)}\nResults stream to {store.out}; Ctrl-C is safe: the same command goes on from there."
    )
    job = WorkerSettings(
        batch_tokens=batch_tokens(settings.batch_tokens, order.device),
        trust_remote_code=order.options.trust_remote_code,
        provenance=launch_provenance(launch, manifest.name),
        witness=manifest.path(store.out).relative_to(store.out).as_posix(),
    )
    try:
        withheld = _execute(order, plan, claim, workers, job, left)
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
        _close(store, claim, console)
    unfinished = _unfinished(store, plan) if budget is not None else 0
    if unfinished:
        _say_spent(order, unfinished)
    code = _ending(order, report=True)
    order.mirror_tables()
    return EXIT_FAILED if withheld else code


def _unfinished(store: Store, plan: Plan) -> int:
    """Count a plan's measurements that are not stored, whatever came of them."""
    keys = set(plan.measurement_keys())
    return len(keys - set(store.read(["measurement"], measurements=keys).column("measurement").to_pylist()))


def _say_spent(order: Order, left: int) -> None:
    assert order.options.budget is not None
    spending = read_spending(order.store, order.manifest.sweep)
    text = spent_text(order.options.budget, spending.spent, left, order.device)
    order.console.print(f"[yellow]{order.manifest.sweep}: {text}[/]", highlight=False)


def who_holds(store: Store) -> list[str]:
    """Return a sentence for each launch that may be at work."""
    flight = read_flight(store.out)
    claims = Claims(out=store.out)
    here = [f"{c.sweep} is being run by {claims.holder(c)}." for c in flight.local]
    for launch, _ in flight.launches:
        name = flight.executors[launch.id]
        title = EXECUTORS[name].title if name in EXECUTORS else name
        here.append(f"{launch.sweep} is being run by {title} jobs {launch.chunk_name(0)[:-1]}*.")
    return here


def _execute(order: Order, plan: Plan, claim: Claim, workers: Workers, settings: WorkerSettings, left: float) -> bool:
    """Run packs until they are done, or until ``left`` device-seconds are spent; tell whether data had changed."""
    store, console = order.store, order.console
    claims = Claims(out=store.out)
    cost = CostModel.from_rows(store.read(COLUMNS).to_pylist(), order.device)
    time_left = TimeLeft(packs=plan.packs, cost=cost, workers=workers.count)
    cells = Counter(m.cell.key for p in plan.packs for m in p.measurements())
    view = RunView(console=console, cells=cells, left=time_left)
    watch = BudgetWatch(left=left)

    def on_event(event: Event, worker: int) -> None:
        view.on_event(event, worker)
        match event:
            case Measured():
                cost.learn(event.row)
                time_left.measured(event.row["pack"])
            case Withheld():
                time_left.measured(event.pack)
        if left < inf and watch.is_spent(event, worker):
            execution.stop(inf)

    execution = Execution(
        packs=plan.packs,
        store=store,
        workers=workers,
        settings=settings,
        tracking=order.options.tracking,
        on_event=on_event,
        warn=lambda text: console.print(f"[yellow]{escape(text)}[/]"),
        log=worker_log(store.out / "logs" / claim.launch),
        beat=lambda running: claims.heartbeat(claim, running),
        predict=lambda pack, warm: pack.predicted(cost, warm=warm),
    )
    previous = {s: signal.signal(s, _interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with view:
            execution.run()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return bool(view.withheld)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _close(store: Store, claim: Claim, console: Console) -> None:
    """Fold what workers stored, and give back what was claimed."""
    try:
        store.fold()
        Claims(out=store.out).release(claim)
    except OSError as error:
        console.print(f"[yellow]{escape(f'{store.out} can not be tidied up: {error}')}[/]")


def _ending(order: Order, *, report: bool) -> int:
    """Show the table, findings, where everything lies, and which cells failed; return the exit code.

    Args:
        order: the launch; ``report=false`` keeps it from writing one.
        report: write the study's report.
    """
    wanted = report and order.options.report
    failed = show_results(order.store, order.manifest, order.console, report=wanted)
    return EXIT_FAILED if failed else 0


def workers_for(order: Order, settings: LocalSettings) -> Workers:
    """Return how this machine is used for a study.

    Raises:
        UserError: executor.workers or executor.threads is not valid.
    """
    workers = settings.workers
    if workers == "auto" and order.device == "cpu" and any(e.device is not None for e in order.manifest.evals):
        # What is timed has the machine for itself.
        workers = 1
    largest = max(c.model.params or 0 for c in order.manifest.wanted_cells())
    return plan_workers(order.device, workers, settings.threads, largest)
