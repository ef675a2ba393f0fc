"""``mode=audit``: prove that what studies planned is stored once and whole, or name what is not and what to do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Final

from rich.console import Console
from rich.markup import escape

from sweeps.commands.progress import saying
from sweeps.commands.selection import planned_parts
from sweeps.errors import EXIT_FAILED
from sweeps.launches.in_flight import read_flight
from sweeps.options import Options
from sweeps.results.audit import Fault, Finding, Planned, find_faults
from sweeps.store.parts import Store
from sweeps.study.manifest import changed_manifests
from sweeps.text import counted

MOST_SHOWN: Final = 10
"""Of each fault, in a terminal; in a pipe all of them."""


def audit(options: Options, console: Console) -> int:
    """Audit a study, or all of a directory; 1 where something is missing, doubled or not whole.

    Raises:
        UserError: nothing was planned there, or nothing of it is chosen.
    """
    # What earlier launches planned, e.g. of other models, need not be there; what is stored of it is looked at too.
    needed, more = planned_parts(options)
    planned = Planned(known={**more, **needed}, needed=needed.keys())
    store = Store(out=options.out)
    with saying(console) as say:
        found = list(find_faults(store, planned, read_flight(options.out), say))
    order = {fault: number for number, fault in enumerate(Fault)}
    found.sort(key=lambda finding: order[finding.fault])
    for fault, findings in groupby(found, key=lambda finding: finding.fault):
        _show(fault, list(findings), console)
    # A temporary copy may be named twice: each reading finds it damaged.
    for path in dict.fromkeys(store.damaged):
        what = "is damaged: what it held counts as missing; take it away once the study's command has run"
        console.print(f"[red]{escape(str(path))}[/] {what}", highlight=False, soft_wrap=True)
    changed = changed_manifests(options.out, options.asked_sweep)
    for path, why in changed.items():
        what = f"was changed: {why}. The command of that launch writes it as it was"
        console.print(f"[red]{escape(str(path))}[/] {escape(what)}", highlight=False, soft_wrap=True)
    _say_whole(planned, found, console)
    return EXIT_FAILED if found or store.damaged or changed else 0


def _show(fault: Fault, findings: Sequence[Finding], console: Console) -> None:
    console.print(
        f"[red]{counted(len(findings), 'measurement')} {fault}:[/] {escape(fault.advice)}.",
        highlight=False,
        soft_wrap=True,
    )
    shown = findings[:MOST_SHOWN] if console.is_terminal else findings
    for finding in shown:
        cell = finding.measurement.cell
        where = f"{cell.key[:10]}  {cell.model.label} {cell.quant_label}, {finding.measurement.eval.name}"
        console.print(f"  {where}: {finding.what}", markup=False, highlight=False, soft_wrap=True)
    if len(findings) > len(shown):
        console.print(f"  … and {len(findings) - len(shown):,} more: in a pipe (| cat) all are listed", highlight=False)


def _say_whole(planned: Planned, found: Sequence[Finding], console: Console) -> None:
    wrong = {finding.measurement.key for finding in found}
    whole = len(planned.needed) - len(wrong & set(planned.needed))
    console.print(
        f"{whole:,} of {counted(len(planned.needed), 'planned measurement')} there once, with the identity of their "
        f"keys, their provenance, and the numbers of their samples.{_of_earlier(planned, wrong)}",
        highlight=False,
        soft_wrap=True,
    )


def _of_earlier(planned: Planned, wrong: Collection[str]) -> str:
    """Return what is to be said of measurements that only earlier launches planned, e.g. of a joined directory."""
    earlier = planned.known.keys() - planned.needed
    if not earlier:
        return ""
    return f" Of {len(earlier):,} that earlier launches alone planned, {len(earlier & set(wrong)):,} have a fault."
