"""Submit what is left of a study, say what was done, and with ``watch=true`` follow it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from rich.console import Console
from rich.markup import escape

from sweeps.errors import EXIT_FAILED, EXIT_INTERRUPTED, SchedulerError, UserError
from sweeps.executors.base import Order
from sweeps.executors.slurm.context import launch_context
from sweeps.executors.slurm.poison import record_poison
from sweeps.executors.slurm.query.command import ignored_variables
from sweeps.executors.slurm.query.reconcile import reconcile
from sweeps.executors.slurm.settings import SlurmSettings, shape_text
from sweeps.executors.slurm.show.logs import why_never_run
from sweeps.executors.slurm.show.watch import WatchView
from sweeps.executors.slurm.submit import Submitted, Submitter
from sweeps.launches.claimer import Seen, counts_text, new_launch, plan_study
from sweeps.launches.in_flight import read_flight
from sweeps.launches.spending import read_spending
from sweeps.plan.budget import HOUR, budget_text, spent_text
from sweeps.plan.cost import load_seconds
from sweeps.plan.packs import IN_FLIGHT
from sweeps.results.report import has_report, show_results
from sweeps.results.table import measurement_states
from sweeps.status import UNRECORDED, State
from sweeps.text import counted, hours

MOST_TRIES: Final = 3
"""Times that a watch submits the same work, which ends each time without a record."""
WATCH_SECONDS: Final = 15.0
"""Between two looks of watch=true: two calls each, for however many people watch a cluster."""


def submit_study(order: Order, slurm: SlurmSettings) -> int:
    """Submit what is left of a study; return the exit code.

    Raises:
        UserError: SLURM can't be asked; nothing was submitted.
    """
    store, manifest, console = order.store, order.manifest, order.console
    with console.status("planning what is left") as status:
        context = launch_context(replace(order, progress=status.update), slurm)
        submitter = Submitter(context=context, retry=order.options.retry)
        for text in record_poison(store, manifest, read_flight(store.out)):
            console.print(f"[yellow]{escape(text)}[/]", highlight=False)
        try:
            submitted = submitter.submit(new_launch(), read_flight(store.out))
        except SchedulerError as error:
            raise UserError(f"executor=slurm: {error}. Nothing was submitted") from error
    if ignored := ignored_variables():
        console.print(
            f"Ignored, here and in the check: {', '.join(ignored)}. Keys of executor= say what jobs ask for.",
            highlight=False,
        )
    _say(submitted, submitter, console)
    if order.options.watch:
        code = _watch(submitter, console, report=order.options.report)
        if code != EXIT_INTERRUPTED:
            order.mirror_tables()
        return code
    if submitted.launch is None and submitted.plan.counts[IN_FLIGHT]:
        console.print("mode=status says how those in flight do; watch=true follows them.", highlight=False)
    elif submitted.launch is None and not submitted.left:
        report = order.options.report and not has_report(store, manifest)
        failed = show_results(store, manifest, console, report=report)
        return EXIT_FAILED if failed or submitted.held or submitted.unfit else 0
    return EXIT_FAILED if submitted.error else 0


def _say(submitted: Submitted, submitter: Submitter, console: Console) -> None:
    manifest, slurm = submitter.context.manifest, submitter.context.slurm
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
    elif not submitted.left and not submitted.held and not submitted.unfit and not submitted.beyond:
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
    if submitted.beyond:
        console.print(f"[yellow]{escape(_budget_words(submitter, submitted.beyond))}[/]", highlight=False)
    if submitted.error:
        text = f"{submitted.error}: {submitted.jobs} jobs were submitted; the same command submits the rest"
        console.print(f"[red]{escape(text)}[/]", highlight=False)
    if launch is not None and submitted.jobs:
        waiting = "They wait for a preflight of a few minutes. " if slurm.preflight else ""
        console.print(
            f"Jobs are named {launch.chunk_name(0)[:-1]}*. {waiting}You can log out. mode=status says how they "
            "do, mode=logs why cells failed, mode=cancel ends them; watch=true follows them.",
            highlight=False,
        )


def _budget_words(submitter: Submitter, beyond: int) -> str:
    context = submitter.context
    assert context.budget is not None
    spending = read_spending(context.store, context.manifest.sweep)
    if not spending.left(context.budget) and not spending.held:
        return spent_text(context.budget, spending.spent, beyond, context.device)
    spent, held = (budget_text(s, context.device) for s in (spending.spent, spending.held))
    return (
        f"budget={context.budget / HOUR:g} pays for no more ({spent} spent, {held} for jobs in flight): "
        f"{counted(beyond, 'measurement')} left. The same command with a larger budget= goes on."
    )


def _watch(submitter: Submitter, console: Console, *, report: bool) -> int:
    """Follow a study, submitting what limits kept out, until nothing is left; Ctrl-C only stops looking."""
    store, manifest = submitter.context.store, submitter.context.manifest
    # What somebody cancels meanwhile stays cancelled, and what fails again is not tried for ever.
    submitter = replace(submitter, retry=frozenset(UNRECORDED) - {State.CANCELLED})
    try:
        with WatchView(console=console, out=store.out, manifest=manifest) as view:
            spent = _follow(submitter, view)
    except KeyboardInterrupt:
        console.print(
            "\nNot watching any more; the jobs go on. mode=status says how they do, mode=cancel ends them.",
            highlight=False,
        )
        return EXIT_INTERRUPTED
    failed = show_results(store, manifest, console, report=report)
    states = measurement_states(store.out, manifest, read_flight(store.out))
    unfinished = {m for m, state in states.items() if not state.is_final}
    for why, measurements in why_never_run(store.out, unfinished).items():
        text = f"{counted(len(measurements), 'measurement')} can't run: {why}. mode=logs says more"
        console.print(f"[red]{escape(text)}[/]", highlight=False, soft_wrap=True)
    if unfinished:
        console.print(f"{len(unfinished)} of {counted(len(states), 'measurement')} not done: mode=status says more")
    return EXIT_FAILED if failed or (unfinished and not spent) else 0


def _follow(submitter: Submitter, view: WatchView) -> bool:
    """Follow a study to its end; tell whether its budget was the end."""
    store, manifest = submitter.context.store, submitter.context.manifest
    tries: Counter[str] = Counter()
    while True:
        snapshot = reconcile(store.out)
        for text in record_poison(store, manifest, read_flight(store.out)):
            view.note(text)
        flight = read_flight(store.out)
        view.show(flight, snapshot)
        seen = Seen.after(flight, store)
        context = submitter.context
        plan = plan_study(manifest, seen, retry=submitter.retry, packing=context.packing, device=context.device)
        worn_out = plan.todo and all(tries[m] >= MOST_TRIES for m in plan.measurement_keys())
        if worn_out and not plan.counts[IN_FLIGHT]:
            view.note(f"{plan.todo} measurements ended {MOST_TRIES} times without a record: not submitted again")
            return False
        if plan.todo and not worn_out:
            held = _top_up(submitter, view, tries)
            if held and not plan.counts[IN_FLIGHT]:
                if "budget" in held:
                    view.note(held["budget"])
                return "budget" in held
        elif not plan.counts[IN_FLIGHT]:
            return False
        time.sleep(WATCH_SECONDS)


def _top_up(submitter: Submitter, view: WatchView, tries: Counter[str]) -> Mapping[str, str]:
    """Submit what fits now, and count that; return why some of it never will."""
    try:
        submitted = submitter.submit(new_launch(), read_flight(submitter.context.store.out))
    except (SchedulerError, UserError) as error:
        view.note(str(error))
        return {}
    if submitted.launch is not None:
        tries.update(submitted.plan.measurement_keys())
        view.note(f"{counted(submitted.jobs, 'more job')} submitted")
    if submitted.error:
        view.note(submitted.error)
    beyond = {"budget": _budget_words(submitter, submitted.beyond)} if submitted.beyond else {}
    return {**submitted.held, **submitted.unfit, **beyond} if submitted.launch is None and not submitted.left else {}
