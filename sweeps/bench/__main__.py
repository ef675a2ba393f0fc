"""Measure what the orchestrator takes for studies of several sizes, each step in a process of its own.

  python -m sweeps.bench                         3,500 and 35,000 measurements, in a temporary directory
  python -m sweeps.bench --sizes 350000 --to DIR the results directory stays
  python -m sweeps.bench --sizes 3500 35000 350000 --figure growth.svg
  python -m sweeps.bench --peers                 1,000 cells through Hydra's sweeper, submitit and ours instead

Results are made up, and written through the real store; models and texts are those inside the package. CPU seconds and
peak memory are those of the whole process, imports included; "growth" is how much faster than the measurements the CPU
seconds grow from the first size to the last: 1 is in proportion. "launch that follows all" is a whole launch whose
worker tells of results and measures nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from sweeps.bench.growth import SUFFIXES, draw
from sweeps.bench.measuring import Took, measured
from sweeps.bench.peers import peers
from sweeps.bench.synthetic import Synthetic
from sweeps.text import counted

SIZES: Final = (3_500, 35_000)
STORE: Final = "store each measurement"
FOLD: Final = "fold"
SAMPLES: Final = "load_samples of 100"
FOLLOW: Final = "launch that follows all"
_LAUNCH: Final = "from launch import main; main()"
_FILL: Final = """
from pathlib import Path
from sweeps.bench.synthetic import Synthetic, counted_flushes, fill
from sweeps.store.parts import Store
flushes = counted_flushes()
study = Synthetic(out=Path({out!r}), measurements={size})
manifest = study.manifest()
fill(Store(out=study.out), manifest)
print(flushes() / sum(1 for _ in manifest.measurements()))
"""
_FOLLOW: Final = """
import os, sys, time
from pathlib import Path
os.environ["TTY_COMPATIBLE"] = "1"  # the view is drawn as on a terminal
import sweeps.worker.pool
from sweeps.worker.execution import Execution
from sweeps.bench.synthetic import counted_flushes
sweeps.worker.pool.WORKER = "sweeps.bench.stand_in"
flushes, run = counted_flushes(), Execution.run
took = []
def timed(execution):
    before, began, wall = flushes(), time.process_time(), time.perf_counter()
    try:
        return run(execution)
    finally:
        took[:] = time.process_time() - began, time.perf_counter() - wall, flushes() - before
Execution.run = timed
from launch import main
try:
    main()
except SystemExit:
    pass  # nothing was stored
print()
print(*took)
"""
_FOLD: Final = "from pathlib import Path; from sweeps.store.parts import Store; Store(out=Path({out!r})).fold()"
_LOAD: Final = "import sweeps; sweeps.load_results({out!r})"
_READ_SAMPLES: Final = """
import time
from pathlib import Path
import sweeps
from sweeps.store.parts import Store
keys = Store(out=Path({out!r})).read(["measurement"]).column("measurement").to_pylist()
began = time.perf_counter()
assert len(sweeps.load_samples({out!r}, keys[:: max(1, len(keys) // 100)][:100])) == 100
print(time.perf_counter() - began)
"""


def steps(study: Synthetic) -> Iterator[tuple[str, Took]]:
    """Measure each step of a study's life, in order."""
    python, out = [sys.executable, "-P", "-c"], str(study.out)

    def launch(*arguments: str) -> Took:
        return measured([*python, _LAUNCH, *arguments])

    yield "mode=plan, nothing stored", launch("mode=plan", *study.overrides)
    elsewhere = replace(study, out=study.out / "followed").overrides
    yield FOLLOW, measured([*python, _FOLLOW, "report=false", "executor.workers=1", *elsewhere])
    yield STORE, measured([*python, _FILL.format(out=out, size=study.measurements)])
    yield "load_results, nothing folded", measured([*python, _LOAD.format(out=out)])
    yield FOLD, measured([*python, _FOLD.format(out=out)])
    yield "load_results", measured([*python, _LOAD.format(out=out)])
    yield SAMPLES, measured([*python, _READ_SAMPLES.format(out=out)])
    yield "mode=plan, all stored", launch("mode=plan", *study.overrides)
    yield "launch with nothing to do", launch("report=false", *study.overrides)
    yield "mode=status", launch("mode=status", f"out={out}")
    yield "mode=table to=x.parquet", launch("mode=table", f"to={out}/x.parquet", f"out={out}")
    places = ["by=[model,bits]", "columns=[dtype]"]
    yield "mode=table as a pivot", launch("mode=table", *places, f"to={out}/pivot.csv", f"out={out}")


def show(found: Mapping[int, Mapping[str, Took]], console: Console) -> None:
    """Print a row per step, with columns for each size."""
    table = Table(title="CPU s / s / peak MB", title_justify="left")
    table.add_column("step")
    for size in found:
        table.add_column(f"{size:,}", justify="right")
    table.add_column("growth", justify="right")
    first, last = min(found), max(found)
    for name in found[first]:
        took = [found[size][name] for size in found]
        cells = [f"{t.cpu:.1f} / {t.seconds:.1f} / {t.peak / 1e6:.0f}" for t in took]
        ratio = found[last][name].cpu / found[first][name].cpu * first / last
        table.add_row(name, *cells, f"{ratio:.2f}" if len(found) > 1 else "")
    console.print(table)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m sweeps.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="N", help="measurements")
    parser.add_argument("--to", type=Path, help="keep the results directories there")
    parser.add_argument("--figure", type=Path, metavar="FILE", help=f"draw the growth there: {', '.join(SUFFIXES)}")
    parser.add_argument("--peers", action="store_true", help="Hydra's sweeper and submitit beside ours, on 1,000 cells")
    arguments = parser.parse_args()
    if arguments.figure is not None and arguments.figure.suffix not in SUFFIXES:
        parser.error(f"--figure {arguments.figure}: its name ends with one of {', '.join(SUFFIXES)}")
    console = Console()
    if arguments.peers:
        peers(console)
        return
    home = arguments.to or Path(tempfile.mkdtemp(prefix="kbit-bench-"))
    try:
        wanted = sorted(arguments.sizes)
        found = dict(_study(Synthetic(out=(home / str(n)).absolute(), measurements=n), console) for n in wanted)
        show(found, console)
        if arguments.figure is not None:
            draw(found, arguments.figure)
    finally:
        if arguments.to is None:
            shutil.rmtree(home)


def _study(study: Synthetic, console: Console) -> tuple[int, dict[str, Took]]:
    """Measure a study; return how many measurements it has, and what each step took."""
    count = sum(1 for _ in study.manifest().measurements())
    found: dict[str, Took] = {}
    for name, took in steps(study):
        found[name] = took
        notes = [f"{took.cpu:.1f} CPU s, {took.peak / 1e6:.0f} MB"]
        if name == STORE:
            notes += [_size(study.out, "parts", count), f"{float(took.said):.2f} flushes to disk a measurement"]
        if name == FOLLOW:
            cpu, seconds, flushes = map(float, took.said.split()[-3:])
            notes.append(f"{cpu:.2f} CPU s of the launcher for progress ({cpu / count * 1e6:.0f} µs a measurement)")
            notes.append(f"{flushes:.0f} flushes to disk in {seconds:.1f} s")
        if name == FOLD:
            notes.append(_size(study.out, "packs", count))
        if name == SAMPLES:
            notes.append(f"{float(took.said):.2f} s without start and keys")
        console.print(f"{count:,}: {name}: {'; '.join(notes)}", highlight=False, soft_wrap=True)
    return count, found


def _size(out: Path, where: str, count: int) -> str:
    sizes = [path.stat().st_size for path in (out / where).glob("*.*") if not path.name.startswith(".")]
    return f"{counted(len(sizes), 'file')} of {sum(sizes) / count:,.0f} bytes a measurement"


if __name__ == "__main__":
    main()
