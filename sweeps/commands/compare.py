"""``mode=compare``: two cells, or two sets of cells over all models, on every text set and task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from sweeps.commands.selection import candidates, chosen_inputs, say_notes
from sweeps.commands.writing import write_to
from sweeps.errors import UserError
from sweeps.options import Options
from sweeps.study.choice import Choice
from sweeps.text import counted, written

if TYPE_CHECKING:
    import pandas as pd

    from analysis.significance.comparing import Pairing


def compare(options: Options, console: Console) -> int:
    """Print the differences a - b with their intervals, or write them as a table.

    Raises:
        UserError: a or b is missing, chooses nothing, or nothing of one has a partner in the other.
    """
    from analysis.significance import Margins
    from analysis.significance.comparing import compare_cells, pair_cells, wanted_for
    from analysis.significance.showing import render_comparison
    from analysis.tables import TABLE_SUFFIXES, write_table

    if options.to is not None and options.to.suffix.lower() not in TABLE_SUFFIXES:
        raise UserError(f"to={str(options.to)!r} is not valid: a file that ends in {', '.join(TABLE_SUFFIXES)}")
    a, b = _side("a", options.a), _side("b", options.b)
    inputs = chosen_inputs(options)
    keys = {name: _keys(name, side, inputs.df) for name, side in (("a", a), ("b", b))}
    between = {name for name in (*a.where, *b.where) if a.where.get(name) != b.where.get(name)} - {"family", "model"}
    pairing = pair_cells(inputs.df, keys["a"], keys["b"], between)
    if not pairing.a:
        raise UserError(_why_no_pairs(keys, between))
    samples = inputs.samples(wanted_for(inputs.long, pairing))
    found = compare_cells(inputs.df, pairing, samples, margins=Margins(**options.margins))
    say_notes(inputs, console)
    if options.to is not None:
        write_to(lambda to: write_table(found, to), options.to)
        console.print(f"{counted(len(found), 'comparison')}: {options.to}", highlight=False, soft_wrap=True)
        return 0
    _say_pairs(pairing, inputs.df, (a, b), console)
    render_comparison(found, console)
    return 0


def _side(name: str, given: Choice | None) -> Choice:
    if given is None:
        raise UserError(
            f"mode=compare needs a= and b=, and {name}= is missing: each the first characters of a cell's key, or axis "
            "values, e.g. 'a={dtype: int, bits: 4}' 'b={dtype: float, bits: 4}'"
        )
    return given


def _keys(name: str, side: Choice, df: pd.DataFrame) -> list[str]:
    try:
        chosen = side.of(candidates(df))
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    keys = [str(key) for key in df.loc[chosen, "key"]]
    if side.cells and len(keys) > 1:
        shown = ", ".join(key[: len(side.cells[0]) + 4] for key in keys[:5])
        raise UserError(
            f"{name}={written(list(side.cells))} is the beginning of {len(keys)} keys ({shown}): write more"
        )
    return keys


def _why_no_pairs(keys: dict[str, list[str]], between: set[str]) -> str:
    many = " and ".join(f"{name} chooses {counted(len(own), 'cell')}" for name, own in keys.items())
    named = ", ".join(sorted(between)) or "nothing"
    return (
        f"{many}, and no measured one of a has a partner in b: of the same model and alike in all axes but those "
        f"that a and b name ({named}). Name the others that differ in both, or measure them: mode=table lists the cells"
    )


def _say_pairs(pairing: Pairing, df: pd.DataFrame, sides: tuple[Choice, Choice], console: Console) -> None:
    labels = df.drop_duplicates("key").set_index("key")
    for name, side, keys in zip(("a", "b"), sides, (pairing.a, pairing.b), strict=True):
        one = " ".join(str(labels.loc[keys[0], column]) for column in ("model", "label")) if len(keys) == 1 else ""
        said = one or f"{written({**side.where})}: {counted(len(keys), 'cell')}"
        console.print(f"{name}  {said}", markup=False, highlight=False, soft_wrap=True)
    alone = f"; {counted(len(pairing.alone), 'cell')} without a partner left out" if pairing.alone else ""
    console.print(f"{counted(pairing.models, 'model')}{alone}; difference is a - b", highlight=False, soft_wrap=True)
