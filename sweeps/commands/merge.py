"""``mode=merge``: join other results directories to this one; where they disagree, say so."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sweeps.commands.progress import saying
from sweeps.commands.remote import copy_remote, split_remote
from sweeps.commands.status import say_left
from sweeps.errors import EXIT_FAILED, UserError, did_you_mean
from sweeps.files import list_files
from sweeps.launches.in_flight import read_flight
from sweeps.options import Options
from sweeps.store.joining import SIDES, Conflict, Joined, Side, join
from sweeps.store.parts import Store
from sweeps.text import counted

MOST_SHOWN: Final = 20
"""Conflicts in a terminal; in a pipe all of them."""


def merge(options: Options, console: Console) -> int:
    """Join the directories of ``from=``; 1 where they disagree, or a file there is damaged.

    Raises:
        UserError: a source can't be read, or is none; nothing of it was joined.
    """
    prefer = _preferred(options.prefer)
    if not options.sources:
        raise UserError("mode=merge needs from=DIR, or 'from=[DIR,HOST:DIR]': results directories to join to out=")
    sources = {source: None if split_remote(source) else _local(source, options.out) for source in options.sources}
    store = Store(out=options.out)
    store.check_writable()
    is_clean = True
    for source, directory in sources.items():
        with saying(console) as say, _at_hand(source, directory, say) as there:
            other = Store(out=there)
            busy = read_flight(store.out).held
            joined = join(store, other, name=source, busy=busy, prefer=prefer, say=say)
        damaged = [path.name for path in other.damaged]
        is_clean &= not damaged and (not joined.conflicts or prefer is not None)
        _show(source, joined, prefer, console)
        if damaged:
            names = ", ".join(dict.fromkeys(damaged))
            console.print(f"[yellow]{escape(source)}: damaged there, and left out: {escape(names)}[/]", soft_wrap=True)
    say_left(options, read_flight(store.out), console)
    return 0 if is_clean else EXIT_FAILED


def _preferred(value: str | None) -> Side | None:
    for side in SIDES:
        if value == side:
            return side
    if value is not None:
        raise UserError(
            f"prefer={value} is not valid: mine (what is in out= stays), theirs, or null, which reports where they "
            f"disagree and changes nothing there.{did_you_mean(value, SIDES)}"
        )
    return None


def _local(source: str, out: Path) -> Path:
    """Return a source's directory on this machine.

    Raises:
        UserError: it isn't there, or is no results directory, or is this one.
    """
    path = Path(source).expanduser().absolute()
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"from={source} {what}: name a results directory, or HOST:DIR for one on another machine")
    if out.exists() and path.samefile(out):
        raise UserError(f"from={source} is out= itself: name other results directories")
    _require_plans(source, path)
    return path


def _require_plans(source: str, path: Path) -> None:
    if not list_files(path / "manifests", "*.json"):
        raise UserError(f"from={source} is not a results directory: no study was planned there (manifests/*.json)")


@contextmanager
def _at_hand(source: str, directory: Path | None, say: Callable[[str], None]) -> Iterator[Path]:
    """Have a source's files on this machine."""
    if directory is not None:
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="kbit-merge-") as copy:
        copy_remote(source, Path(copy), say)
        _require_plans(source, Path(copy))
        yield Path(copy)


def _show(source: str, joined: Joined, prefer: Side | None, console: Console) -> None:
    parts = [
        f"{counted(joined.added, 'measurement')} joined",
        f"{joined.equal:,} measured in both and equal" if joined.equal else "",
        f"{joined.known:,} here before" if joined.known else "",
        f"{counted(joined.studies, 'plan')} joined" if joined.studies else "",
    ]
    console.print(f"{source}: {', '.join(p for p in parts if p)}.", markup=False, highlight=False, soft_wrap=True)
    if joined.again:
        what = f"{joined.again:,} of the joined had results here that were dropped; these count now."
        console.print(f"[yellow]{what} mode=drop retires them too[/]", highlight=False, soft_wrap=True)
    if joined.busy:
        what = f"{counted(joined.busy, 'measurement')} left to the launch that has them here"
        console.print(f"[yellow]{what}: when it is done, run this again[/]", highlight=False, soft_wrap=True)
    if joined.conflicts:
        _show_conflicts(joined.conflicts, prefer, console)


@dataclass(frozen=True, kw_only=True)
class _Difference:
    """What differs most between two rows: a metric, relative to the larger value; infinite where that says nothing."""

    what: str
    mine: str
    theirs: str
    size: float


def _difference(conflict: Conflict) -> _Difference:
    mine, theirs = conflict.mine, conflict.theirs
    if theirs is None:
        return _Difference(what="result", mine=mine["status"], theirs="dropped", size=math.inf)
    if mine["status"] != theirs["status"]:
        return _Difference(what="status", mine=mine["status"], theirs=theirs["status"], size=math.inf)
    ours, others = dict(mine["metrics"] or ()), dict(theirs["metrics"] or ())
    if ours.keys() != others.keys():
        return _Difference(what="metrics", mine=", ".join(ours), theirs=", ".join(others), size=math.inf)
    sizes = {name: _relative(ours[name], others[name]) for name in ours}
    name = max(sizes, key=lambda n: sizes[n], default=None)
    if name is None or sizes[name] == 0:
        return _Difference(what="samples or bits", mine="", theirs="other", size=0.0)
    return _Difference(what=name, mine=f"{ours[name]:.9g}", theirs=f"{others[name]:.9g}", size=sizes[name])


def _relative(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    found = abs(a - b) / max(abs(a), abs(b))
    return found if math.isfinite(found) else math.inf


def _show_conflicts(conflicts: list[Conflict], prefer: Side | None, console: Console) -> None:
    """Print what disagrees, what differs most first, and what was done about it."""
    from analysis.tables.text import print_whole

    found = sorted(((_difference(c), c.mine) for c in conflicts), key=lambda pair: -pair[0].size)
    shown = found[:MOST_SHOWN] if console.is_terminal else found
    table = Table(box=None, pad_edge=False)
    for name in ("measurement", "model", "cell", "evaluation", "differs", "mine", "theirs", "relative"):
        table.add_column(name, no_wrap=True)
    for difference, row in shown:
        relative = f"{difference.size:.1e}" if math.isfinite(difference.size) else "-"
        words = (row["measurement"][:10], row["model"], row["label"], row["eval"], difference.what)
        table.add_row(*map(escape, (*words, difference.mine, difference.theirs, relative)))
    done = {
        None: "what was here counts as before; prefer=mine or prefer=theirs decides",
        "mine": "what was here counts (prefer=mine)",
        "theirs": "theirs count, and what was here was dropped (prefer=theirs); mode=drop undo=true takes that back",
    }
    many = f"{counted(len(found), 'measurement')} of both with different numbers"
    style = "red" if prefer is None else "yellow"
    console.print(f"[{style}]{many}:[/] {done[prefer]}.", highlight=False, soft_wrap=True)
    print_whole(table, console)
    if len(found) > len(shown):
        console.print(f"{len(found) - len(shown):,} more, which differ less: in a pipe (| cat) all are listed")
