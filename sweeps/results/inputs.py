"""Read what analysis works on: one study, or all of one or several results directories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sweeps.errors import UserError
from sweeps.results.kept import is_kept
from sweeps.results.table import left_out, load_samples, load_tables
from sweeps.store.reading import damaged_files
from sweeps.store.samples import Samples
from sweeps.study.manifest import Manifest

if TYPE_CHECKING:
    from analysis.inputs import Inputs


def read_inputs(outs: Sequence[Path], *, sweep: str | None = None, manifest: Manifest | None = None) -> Inputs:
    """Read the results of one or several directories; a cell that several hold counts once, a measured one first.

    Args:
        outs: results directories, or files that ``mode=keep`` wrote.
        sweep: only this study.
        manifest: exactly what this launch planned, whatever else the directory holds.

    Raises:
        UserError: a directory isn't there, or none of them holds the study, or any.
    """
    from analysis.inputs import Inputs

    for out in outs:
        if not out.is_dir() and not is_kept(out):
            raise UserError(
                f"out={str(out)!r} is no directory: name one that a study wrote, e.g. out=results, or a .parquet file "
                "that mode=keep wrote"
            )
    df, long = load_tables(outs, sweep=sweep, manifest=manifest)

    def read_samples(measurements: Sequence[str]) -> dict[str, Samples]:
        found: dict[str, Samples] = {}
        for out in outs:
            found = {**load_samples(out, [m for m in measurements if m not in found]), **found}
        return found

    name = manifest.sweep if manifest is not None else sweep or "all"
    directories = [out for out in outs if not is_kept(out)]
    notes = [note for out in directories for note in left_out(out, name if name != "all" else None)]
    notes += [
        f"{path} is damaged and left out: what it held counts as missing, and the study's command measures it again"
        for out in directories
        for path in damaged_files(out)
    ]
    title = name if name != "all" else f"All studies of {', '.join(out.absolute().name for out in outs)}"
    return Inputs(name=name, title=title, df=df, long=long, read_samples=read_samples, notes=notes)
