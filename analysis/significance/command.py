"""``python -m analysis compare OUT [OUT2 …] --a … --b …``: two cells, or two sets of cells over all models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import pandas as pd

from analysis.inputs import Inputs
from kbit.errors import SpecError

HELP: Final = "compare two cells, or two sets of cells, on every text set and task"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "the beginning of a cell's key, or AXIS=VALUE …"
    parser.add_argument("--a", nargs="+", required=True, metavar="A", help=what)
    parser.add_argument("--b", nargs="+", required=True, metavar="B", help=what)
    parser.add_argument(
        "--to", type=Path, metavar="FILE", help="write a table instead: .csv, .parquet, .md, .tex or .html"
    )


def run(arguments: argparse.Namespace, inputs: Inputs) -> int:
    """Print the comparison, or write it; 2 where nothing can be compared."""
    from rich.console import Console

    from analysis.significance.comparing import compare_cells, pair_cells, wanted_for
    from analysis.significance.showing import render_comparison
    from analysis.tables import write_table

    sides = [_where(name, given) for name, given in (("--a", arguments.a), ("--b", arguments.b))]
    between = {name for side in sides for name in side if sides[0].get(name) != sides[1].get(name)}
    a, b = (_keys(inputs.df, side) for side in sides)
    pairing = pair_cells(inputs.df, a, b, between - {"key"})
    if not pairing.a:
        print(f"nothing to compare: --a chooses {len(a)} cells, --b {len(b)}, and none measured are a pair")
        return 2
    found = compare_cells(inputs.df, pairing, inputs.samples(wanted_for(inputs.long, pairing)))
    print(f"{len(pairing.a)} and {len(pairing.b)} cells of {pairing.models} models; difference is a - b")
    if arguments.to is None:
        render_comparison(found, Console())
    else:
        print(write_table(found, arguments.to))
    return 0


def _where(side: str, given: list[str]) -> dict[str, tuple[str, ...]]:
    """Read AXIS=VALUE,VALUE … ; a word without '=' is the beginning of a key, and stands alone.

    Raises:
        SpecError: it doesn't.
    """
    words = [text for text in given if "=" not in text]
    if words and len(given) > 1:
        raise SpecError(
            side,
            " ".join(given),
            f"{', '.join(words)} can't stand beside other words. Give the beginning of one cell's key, or AXIS=VALUE "
            "words alone, e.g. dtype=int bits=3,4",
        )
    if words:
        return {"key": (words[0],)}
    pairs = [text.partition("=") for text in given]
    return {name: tuple(values.split(",")) for name, _, values in pairs}


def _keys(df: pd.DataFrame, where: dict[str, tuple[str, ...]]) -> list[str]:
    chosen = pd.Series(True, index=df.index)
    for name, values in where.items():
        if name == "key":
            chosen &= df["key"].str.startswith(values)
        elif name in df:
            chosen &= df[name].map(_text).isin(values)
        else:
            chosen &= False
    return [str(key) for key in df.loc[chosen, "key"]]


def _text(value: object) -> str:
    if value is None or value is pd.NA or value != value:
        return "null"
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    return str(value).lower() if number is None else f"{number:g}"
