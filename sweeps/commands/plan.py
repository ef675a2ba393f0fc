"""``mode=plan``: say what a run would do, without doing it and without torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kbit.spec import Spec
from sweeps.commands.request import accepted
from sweeps.commands.selection import chosen_part, say_what_stays
from sweeps.errors import UnaskedError
from sweeps.executors.base import Executor, Order
from sweeps.launches.in_flight import read_flight
from sweeps.launches.spending import read_spending
from sweeps.options import Options
from sweeps.plan import accuracy
from sweeps.plan.accuracy import accuracy_of
from sweeps.plan.budget import budget_text, fit
from sweeps.plan.cost import CostModel
from sweeps.plan.exponents import exponent_rows
from sweeps.plan.notices import notices
from sweeps.plan.order import ORDERS
from sweeps.plan.packs import ROW_BYTES, Plan
from sweeps.plan.ways import ABOUT, DeviceMemory, Planned, check_ways, planned_ways, ways_rows
from sweeps.store.parts import Store
from sweeps.study.cell import ModelRef
from sweeps.study.grid import excluded_counts
from sweeps.study.resolve import Study, build_study
from sweeps.text import counted, size

MOST_UNRESOLVED_SHOWN: Final = 5


def plan(options: Options, console: Console) -> int:
    """Say what a run would do, without doing it and without torch."""
    executor, device = accepted(options)
    store = Store(out=options.out)
    store.check_may_write()
    with console.status("resolving models and data") as status:
        study = build_study(
            options.study, device=device, device_name=executor.device_name, strict=False, progress=status.update
        )
    manifest = chosen_part(options.choice, store.out, study.manifest)
    flight = read_flight(store.out)
    order = Order(options=options, device=device, store=store, manifest=manifest, console=console)
    try:
        executor.check(order)
    except UnaskedError as error:
        # Where there is no cluster, a plan for it is still of use.
        if not options.script:
            console.print(f"[yellow]not checked against the cluster: {escape(str(error))}[/]", highlight=False)
    if options.script:
        for script in executor.scripts(order, flight):
            console.print(script, markup=False, highlight=False, soft_wrap=True)
        return 0
    memory = executor.memory(order)
    ways, unsized = planned_ways(manifest, memory) if memory is not None else ([], [])
    planned, where = executor.describe(order, flight)
    on_gpu = _gpu_seconds(order, planned, ways)
    rows = [
        *_study_rows(order, study, planned),
        *where,
        *_accuracy_rows(order),
        ("order", ORDERS[options.order]),
        *_budget_rows(executor, order, planned),
        *_size_rows(order, planned, on_gpu),
    ]
    _show(f"plan of {manifest.sweep}", rows, console)
    if memory is not None:
        _say_ways(ways, on_gpu, memory, console)
        _say_unsized(unsized, console)
    say_what_stays(options, console)
    for notice in notices(store, manifest):
        console.print(f"[yellow]{escape(notice)}[/]", highlight=False)
    _say_unresolved(study, console)
    if memory is not None:
        check_ways(ways, memory, study.manifest.evals)
    return 0


def _study_rows(order: Order, study: Study, planned: Plan) -> list[tuple[str, str]]:
    """Return what the study has, and how far it is."""
    manifest = order.manifest
    cells = manifest.wanted_cells()
    chosen = f" of {len(manifest.cells):,}, chosen by {order.options.choice}"
    names = ", ".join(e.name for e in manifest.evals)
    return [
        ("models", f"{len({c.model for c in cells})}"),
        ("cells", f"{len(cells):,}" + ("" if manifest.chosen is None else chosen)),
        ("measurements", f"{sum(1 for _ in manifest.wanted()):,} ({names})"),
        *exponent_rows(cells),
        *((state, f"{n:,}") for state, n in planned.counts.items()),
        ("excluded", f"{len(manifest.excluded):,}"),
        *((f"  {n:,}", reason) for reason, n in excluded_counts(manifest.excluded).items()),
        ("merged", f"{study.duplicates:,} named more than once"),
    ]


def _size_rows(order: Order, planned: Plan, on_gpu: Mapping[tuple[ModelRef, Spec], float]) -> list[tuple[str, str]]:
    hub_bytes = sum(2 * (m.params or 0) for m in {c.model for c in order.manifest.wanted_cells()} if m.hub_id)
    return [
        ("GPU-hours", f"{sum(on_gpu.values()) / 3600:,.1f} predicted on H100-class GPUs"),
        ("disk", f"{size(planned.todo * ROW_BYTES)} of results, {size(hub_bytes)} of models from the hub"),
    ]


def _show(title: str, rows: Iterable[tuple[str, str]], console: Console) -> None:
    table = Table(title=title, show_header=False, box=None, title_justify="left")
    table.add_column(style="bold", justify="right")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, escape(value))
    console.print(table)


def _say_ways(
    ways: Sequence[Planned], seconds: Mapping[tuple[ModelRef, Spec], float], memory: DeviceMemory, console: Console
) -> None:
    """Show how each model runs at its bits, with the sum of what it takes on the fullest device."""
    table = Table(title=f"how models run on {escape(memory.words)}", box=None, title_justify="left", pad_edge=False)
    for name in ("model", "bits", "way", "GPU time", "memory, at most"):
        table.add_column(name, overflow="fold", justify="right" if name == "GPU time" else "left")
    for row in ways_rows(ways, seconds):
        table.add_row(*map(escape, row))
    console.print(table)
    if any(planned.sizes.known_from != "files" for planned in ways):
        console.print(ABOUT, highlight=False)


def _say_unsized(unsized: Sequence[ModelRef], console: Console) -> None:
    if unsized:
        names = ", ".join(m.label for m in unsized)
        console.print(
            f"[yellow]of unknown size: {escape(names)}[/]: models.FAMILY.members.NAME.params tells", highlight=False
        )


def _budget_rows(executor: Executor[Any], order: Order, planned: Plan) -> list[tuple[str, str]]:
    budget = order.options.budget
    if budget is None:
        return []
    spending = read_spending(order.store, order.manifest.sweep)
    fitting = fit(planned.packs, spending.left(budget), executor.devices(order), start=executor.start_seconds)
    held = f", {budget_text(spending.held, order.device)} for jobs in flight" if spending.held else ""
    return [
        ("budget", f"{budget_text(budget, order.device)}: {budget_text(spending.spent, order.device)} spent{held}"),
        (
            "fits",
            f"{counted(planned.todo - fitting.beyond, 'measurement')} of {planned.todo:,} to do, "
            f"{budget_text(fitting.seconds, order.device)} predicted",
        ),
    ]


def _gpu_seconds(order: Order, planned: Plan, ways: Sequence[Planned]) -> dict[tuple[ModelRef, Spec], float]:
    """Predict what is left of each quantization of a model; loading the model is its first one's.

    A model that is spread over GPUs has one of them at work at a time, and holds them all.
    """
    if not planned.packs:
        return {}
    cost = CostModel.from_rows(order.stored, "cuda")
    held = {(way.model, spec): way.choice.devices for way in ways if way.choice for spec in way.specs}
    seconds: dict[tuple[ModelRef, Spec], float] = defaultdict(float)
    loaded: set[ModelRef] = set()
    for cell, evals in (item for pack in planned.packs for item in pack.items):
        load = 0.0 if cell.model in loaded else cost.load(cell.model)
        loaded.add(cell.model)
        devices = held.get((cell.model, cell.quant), 1)
        seconds[cell.model, cell.quant] += devices * (load + cost.cell_seconds(cell, evals))
    return seconds


def _accuracy_rows(order: Order) -> list[tuple[str, str]]:
    """Return how good the predictions of the packs that are stored have been."""
    found = accuracy_of(order.store.read(accuracy.COLUMNS, encoded=True))
    return [] if found is None else [("predictions", found)]


def _say_unresolved(study: Study, console: Console) -> None:
    if study.unresolved:
        shown = ", ".join(study.unresolved[:MOST_UNRESOLVED_SHOWN])
        more = len(study.unresolved) - MOST_UNRESOLVED_SHOWN
        console.print(
            f"[yellow]The commit of {len(study.unresolved)} hub name(s) is unknown here[/] ({shown}"
            f"{f' and {more} more' if more > 0 else ''}): what is done of them can't be told. "
            "mode=fetch, where there is a network, resolves and downloads them.",
            highlight=False,
        )
