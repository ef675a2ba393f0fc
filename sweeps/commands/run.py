"""``mode=run``: freeze the study, then have the executor run what is left of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from rich.console import Console
from rich.markup import escape

from sweeps.commands.request import accepted
from sweeps.commands.selection import chosen_part, say_what_stays
from sweeps.executors.base import Order, with_jobs
from sweeps.launches.in_flight import read_flight
from sweeps.options import Options
from sweeps.plan.notices import notices
from sweeps.plan.ways import check_ways, planned_ways
from sweeps.store.parts import Store
from sweeps.study.resolve import build_study
from sweeps.text import counted


def run(options: Options, console: Console) -> int:
    """Run what is left of a study.

    Raises:
        UserError, SpecError: the request is wrong; nothing was run.
    """
    executor, device = accepted(options)
    store = Store(out=options.out)
    store.check_may_write()
    with console.status("resolving models and data") as status:
        study = build_study(
            options.study, device=device, device_name=executor.device_name, strict=True, progress=status.update
        )
        order = Order(
            options=options,
            device=device,
            store=store,
            manifest=chosen_part(options.choice.without_states(), options.out, study.manifest),
            console=console,
            progress=status.update,
        )
        executor.check(order)
        memory = executor.memory(order)
        if memory is not None:
            check_ways(planned_ways(order.manifest, memory)[0], memory, order.manifest.evals)
        # What dead jobs held is free only once that is known.
        for other in with_jobs(store.out):
            status.update(f"asking {other.title} about earlier jobs")
            for problem in other.observe(store.out, partial(_waiting, other.title, console, status.update)).problems:
                console.print(f"[yellow]{escape(problem)}[/]", highlight=False)
        # What became of the jobs decides what status= chooses.
        order = replace(order, manifest=chosen_part(options.choice, options.out, study.manifest))
    store.check_writable()
    say_what_stays(options, console)
    for notice in notices(store, order.manifest):
        console.print(f"[yellow]{escape(notice)}[/]", highlight=False)
    # A directory that can't be read is refused before anything in it changes.
    read_flight(store.out)
    study.manifest.save(store.out)
    store.fold()
    return executor.run(order)


def _waiting(title: str, console: Console, say: Callable[[str], None], jobs: int, seconds: float) -> None:
    text = f"waiting to be sure, {seconds:.0f} s at most: {title} does not know {counted(jobs, 'job')}"
    say(text)
    if not console.is_terminal:
        console.print(text, highlight=False)
