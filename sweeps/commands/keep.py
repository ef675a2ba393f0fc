"""``mode=keep``: write the chosen results as one file, to publish or to send; analysis reads it like a directory."""

from __future__ import annotations

from rich.console import Console

from sweeps.commands.selection import chosen_rows
from sweeps.commands.writing import write_to
from sweeps.errors import UserError
from sweeps.options import Options
from sweeps.results.frames import long_frame
from sweeps.results.kept import SUFFIX, write_kept
from sweeps.results.table import rows_of
from sweeps.store.parts import Store


def keep(options: Options, console: Console) -> int:
    """Write each planned measurement's row, and outcomes of its samples.

    Raises:
        UserError: nothing is chosen, ``to=`` is missing or can't be written, or ``samples=`` names what no sample has.
    """
    import pyarrow as pa

    if options.to is None or options.to.suffix.lower() != SUFFIX:
        given = "null" if options.to is None else repr(str(options.to))
        raise UserError(f"to={given} is not valid with mode=keep: name a file that ends in {SUFFIX}")
    rows = rows_of(options.out, options.asked_sweep)
    if options.choice:
        chosen = chosen_rows(options, long_frame(rows))
        rows = rows.take(pa.array(chosen.index.to_numpy(), pa.int64()))
    write_to(lambda to: write_kept(rows, Store(out=options.out), to, options.samples), options.to)
    size = options.to.stat().st_size / 1e6
    console.print(f"{len(rows):,} measurements, {size:.1f} MB: {options.to}", highlight=False, soft_wrap=True)
    how = f"python -m analysis report {options.to} reads it, as do sweeps.load_results and load_samples."
    console.print(how, highlight=False, soft_wrap=True)
    return 0
