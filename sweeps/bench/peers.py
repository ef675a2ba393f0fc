"""Measure what others' bookkeeping takes for a thousand cells that compute nothing, beside ours.

Hydra's own sweeper runs them (its basic launcher, a function that returns at once). submitit submits them as one array,
a pickle each; sbatch is a script that answers with a job's number, so neither SLURM nor jobs are counted. Ours plans
and claims them, stores a result of each as a worker does, and folds.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from sweeps.bench.measuring import Took, measured

CELLS: Final = 1000
_HYDRA: Final = """
import hydra
@hydra.main(version_base="1.3", config_path=".", config_name="config")
def cell(config):
    return 0.0
cell()
"""
_HYDRA_CONFIG: Final = "bits: 4\ndtype: int\nblocksize: 64\n"
_SUBMITIT: Final = """
import sys
import submitit
def cell(bits, dtype, blocksize):
    return 0.0
executor = submitit.AutoExecutor(folder=sys.argv[1], cluster="slurm")
executor.update_parameters(slurm_array_parallelism=16, timeout_min=60)
values = [(bits, dtype, size) for bits in range(10) for dtype in range(10) for size in range({size})]
assert len(executor.map_array(cell, *zip(*values))) == {cells}
"""
_OURS: Final = """
import sys
from dataclasses import replace
from pathlib import Path
from sweeps.bench.synthetic import fill, Synthetic
from sweeps.launches.claimer import Claimer
from sweeps.launches.claims import Claims
from sweeps.plan.packs import Packing
from sweeps.store.parts import Store
study = Synthetic(out=Path(sys.argv[1]), measurements=4 * {cells})
whole = study.manifest()
manifest = replace(whole, cells=whole.cells[:{cells}], evals=whole.evals[:1])
store = Store(out=study.out)
manifest.save(store.out)
claimer = Claimer(
    store=store, manifest=manifest, retry=frozenset(), packing=Packing(cells=40), device="cpu", executor="local",
    launch="bench",
)
plan, claim = claimer.claim()
assert plan.todo == {cells}
fill(store, manifest)
store.fold()
Claims(out=store.out).release(claim)
"""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a peer took, and the files that it leaves."""

    took: Took
    files: int
    bytes: int


def peers(console: Console, cells: int = CELLS) -> dict[str, Kept]:
    """Measure each, print a table, and return it.

    Args:
        console: where to print.
        cells: a multiple of 100.

    Raises:
        CalledProcessError: one of them failed.
    """
    found: dict[str, Kept] = {}
    runs: Mapping[str, Callable[[Path, int], Took]] = {
        "Hydra's multirun, basic launcher": _hydra,
        "submitit, one array": _submitit,
        "ours: planned, claimed, a result of each stored, folded": _ours,
    }
    for name, run in runs.items():
        home = Path(tempfile.mkdtemp(prefix="kbit-peers-"))
        try:
            took = run(home, cells)
            files = [path for path in (home / "out").rglob("*") if path.is_file()]
            found[name] = Kept(took=took, files=len(files), bytes=sum(path.stat().st_size for path in files))
        finally:
            shutil.rmtree(home)
    _show(found, cells, console)
    return found


def _show(found: Mapping[str, Kept], cells: int, console: Console) -> None:
    table = Table(title=f"{cells:,} cells that compute nothing", title_justify="left")
    table.add_column("bookkeeping of")
    for name in ("CPU s", "s", "CPU ms a cell", "files", "kB a cell"):
        table.add_column(name, justify="right")
    for name, kept in found.items():
        took = kept.took
        per_cell = f"{1000 * took.cpu / cells:.1f}"
        size = f"{kept.bytes / cells / 1000:.1f}"
        table.add_row(name, f"{took.cpu:.1f}", f"{took.seconds:.1f}", per_cell, f"{kept.files:,}", size)
    console.print(table)


def _hydra(home: Path, cells: int) -> Took:
    (home / "app.py").write_text(_HYDRA)
    (home / "config.yaml").write_text(_HYDRA_CONFIG)
    axes = ["bits=range(10)", "dtype=range(10)", f"blocksize=range({cells // 100})"]
    where = f"hydra.sweep.dir={home / 'out'}"
    return measured([sys.executable, "-P", str(home / "app.py"), "--multirun", where, *axes])


def _submitit(home: Path, cells: int) -> Took:
    programs = home / "bin"
    programs.mkdir()
    for name, says in (("sbatch", "Submitted batch job 1"), ("srun", "")):
        (programs / name).write_text(f"#!/bin/sh\necho '{says}'\n")
        (programs / name).chmod(0o755)
    code = _SUBMITIT.format(cells=cells, size=cells // 100)
    return measured([sys.executable, "-P", "-c", code, str(home / "out")], programs=programs)


def _ours(home: Path, cells: int) -> Took:
    return measured([sys.executable, "-P", "-c", _OURS.format(cells=cells), str(home / "out")])
